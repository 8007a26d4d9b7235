"""myllm_ray: train language models from one YAML file. Public names, imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "TrainerEngine": "myllm_ray.engine.engine",
    "BaseTrainer": "myllm_ray.trainers.base",
    "PretrainTrainer": "myllm_ray.trainers.pretrain",
    "SFTTrainer": "myllm_ray.trainers.sft",
    "RewardTrainer": "myllm_ray.trainers.reward",
    "DPOTrainer": "myllm_ray.trainers.dpo",
    "PPOTrainer": "myllm_ray.trainers.ppo",
    "GRPOTrainer": "myllm_ray.trainers.grpo",
    "OptimizerManager": "myllm_ray.engine.optimizer",
    "SchedulerManager": "myllm_ray.engine.scheduler",
    "CheckpointManager": "myllm_ray.engine.checkpoint",
    "SingleGPUAccelerator": "myllm_ray.accelerators.single",
    "DDPAccelerator": "myllm_ray.accelerators.ddp",
    "FSDPAccelerator": "myllm_ray.accelerators.fsdp",
    "Callback": "myllm_ray.engine.callbacks",
    "EarlyStoppingCallback": "myllm_ray.engine.callbacks",
    "PrintCallback": "myllm_ray.engine.displays",
    "ProgressCallback": "myllm_ray.engine.displays",
    "JSONLCallback": "myllm_ray.engine.records",
    "StepOutput": "myllm_ray.common.types",
    "TrainerConfig": "myllm_ray.config.schema",
    **{f"{name}Config": "myllm_ray.config.trainers" for name in ("Pretrain", "SFT", "Reward", "DPO", "PPO", "GRPO")},
    "UserError": "myllm_ray.config.errors",
    "load_config": "myllm_ray.config.load",
    "train": "myllm_ray.orchestration.launch",
    "sweep": "myllm_ray.orchestration.sweeps.sweep",
    "load_sweep": "myllm_ray.config.sweep",
    "pretrain_loop": "myllm_ray.orchestration.loops",
    **{f"{name}_loop": "myllm_ray.orchestration.loops" for name in ("sft", "reward", "dpo", "ppo", "grpo")},
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'myllm_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
