"""The config: schema, loading, names. No torch, no ray."""

from myllm_ray.config.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from myllm_ray.config.load import load_config, to_yaml, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import DPOConfig, GRPOConfig, PPOConfig, PretrainConfig, RewardConfig, SFTConfig

__all__ = ["CheckpointError", "ConfigError", "DPOConfig", "DataError", "GRPOConfig", "PPOConfig", "PretrainConfig", "RewardConfig",
           "SFTConfig", "TrainerConfig", "TrainingError", "UserError", "load_config", "to_yaml", "validate"]
