"""The config of a run: sections, loading, names. This package imports neither torch nor ray.

The config classes of the trainers, `SFTConfig`, `DPOConfig`, ..., are created at their first use, which imports torch.
"""

from typing import Any

from myllm_ray.config import trainers
from myllm_ray.config.errors import CheckpointError, ConfigError, DataError, TrainingError, UserError
from myllm_ray.config.load import load_config, to_yaml, validate
from myllm_ray.config.schema import TrainerConfig

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "TrainerConfig",
    "TrainingError",
    "UserError",
    "load_config",
    "to_yaml",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name.endswith("Config"):
        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
