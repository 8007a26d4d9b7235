"""myllm_ray trains language models from one YAML file. Public names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

from myllm_ray.config.resolve import SHORT_NAMES

__version__ = "0.1.0"

_PUBLIC = {
    "TrainerEngine": "myllm_ray.engine.loop",
    "BaseTrainer": "myllm_ray.trainers.base",
    "TrainerSection": "myllm_ray.config.trainers",
    "OptimizerManager": "myllm_ray.engine.optimizer",
    "SchedulerManager": "myllm_ray.engine.scheduler",
    "CheckpointManager": "myllm_ray.engine.checkpointing.manager",
    "SingleGPUAccelerator": "myllm_ray.accelerators.single",
    "Accelerator": "myllm_ray.accelerators.base",
    "Callback": "myllm_ray.engine.callbacks",
    "Tracker": "myllm_ray.engine.reporting.trackers.base",
    "TrackerSection": "myllm_ray.engine.reporting.trackers.base",
    "Section": "myllm_ray.config.section",
    "StepOutput": "myllm_ray.common.types",
    "TrainerConfig": "myllm_ray.config.schema",
    "UserError": "myllm_ray.config.errors",
    "load_config": "myllm_ray.config.load",
    "train": "myllm_ray.orchestration.launch",
    "sweep": "myllm_ray.orchestration.sweeps.sweep",
    "load_sweep": "myllm_ray.config.sweep",
}
"""Public names and the modules that define them. `import myllm_ray` alone does not import torch or ray."""
for _kind in ("trainers", "accelerators", "callbacks", "trackers"):
    _PUBLIC |= {_path.partition(":")[2]: _path.partition(":")[0] for _path in SHORT_NAMES[_kind].values()}
for _name, _path in SHORT_NAMES["trainers"].items():
    _PUBLIC[_path.partition(":")[2].removesuffix("Trainer") + "Config"] = "myllm_ray.config.trainers"
    _PUBLIC[f"{_name}_loop"] = "myllm_ray.orchestration.loops"
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'myllm_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
