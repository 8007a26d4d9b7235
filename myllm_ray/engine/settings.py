"""What the engine itself reads from a config, also from the short dict of a run wired by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from myllm_ray.common.types import as_mapping
from myllm_ray.config.errors import ConfigError


@dataclass
class EngineSettings:
    """Steps are optimizer steps. None for an interval means never."""

    max_steps: int | None = None
    epochs: int | None = None
    gradient_clip: float | None = 1.0
    seed: int = 0
    log_every: int = 1
    samples_every: int | None = None
    save_every: int | None = None
    save_at_end: bool = True
    evaluate_every: int | None = None
    evaluate_at_start: bool = False
    evaluate_at_end: bool = True
    evaluate_batches: int | None = None
    batch_size: int = 8
    micro_size: int | None = None
    stability: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Any) -> EngineSettings:
        """Read a run's config, or a dict such as {"num_epochs": 3, "gradient_clip": 1.0, "batch_size": 8}."""
        raw = as_mapping(config)
        run, checkpoint = raw.get("run") or {}, raw.get("checkpoint") or {}
        evaluation, logging, batch = raw.get("evaluation") or {}, raw.get("logging") or {}, raw.get("batch") or {}
        settings = cls(
            max_steps=run.get("max_steps") or raw.get("max_steps"),
            epochs=run.get("epochs") or raw.get("num_epochs"),
            gradient_clip=raw.get("gradient_clip"),
            seed=run.get("seed", raw.get("seed", 0)),
            log_every=logging.get("every_steps", 1),
            samples_every=logging.get("samples_every_steps"),
            save_every=checkpoint.get("every_steps"),
            save_at_end=checkpoint.get("at_end", True),
            evaluate_every=evaluation.get("every_steps"),
            evaluate_at_start=evaluation.get("at_start", False),
            evaluate_at_end=evaluation.get("at_end", True),
            evaluate_batches=evaluation.get("max_batches"),
            batch_size=batch.get("global_size", raw.get("batch_size", 8)),
            micro_size=batch.get("micro_size"),
            stability=raw.get("stability") or {},
        )
        if settings.max_steps is None and settings.epochs is None:
            settings.epochs = 1
        if settings.max_steps is not None and settings.epochs is not None:
            raise ConfigError("give max_steps or epochs, not both: they say when the run is done")
        return settings
