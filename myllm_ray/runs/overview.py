"""Everything about one run on one page: `myllm-ray runs show`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from myllm_ray.common.flatten import flatten
from myllm_ray.common.types import is_measured
from myllm_ray.config.errors import CheckpointError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.runs.folder import RunFolder
from myllm_ray.runs.listing import Activity, Summary, is_higher_better, summarize


@dataclass(frozen=True)
class MetricRange:
    """The first, last and best value of a metric, with the step of the best one."""

    name: str
    first: float
    last: float
    best: float
    best_step: int


@dataclass
class Overview:
    """The content of the page. `config` has the keys that differ from their defaults, with both values."""

    summary: Summary
    config: dict[str, Any]
    environment: dict[str, Any]
    attempts: list[dict[str, Any]]
    interventions: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    metrics: list[MetricRange] = field(default_factory=list)
    remote: str | None = None
    """What the remote checkpoint store contains, or why it can't be read; None without a store."""

    def as_json(self) -> dict[str, Any]:
        """Returns the overview as JSON."""
        return asdict(self)


def overview(run: RunFolder) -> Overview:
    """Reads all records of a run.

    Raises:
        ConfigError: a file of the run can't be read.
    """
    summary = summarize(run.path, Activity().active([run.path]))
    best = run.best_checkpoint()
    checkpoints = [
        {"step": c.step, "bytes": c.bytes, "best": c.path == best, "path": str(c.path)} for c in run.checkpoints()
    ]
    return Overview(
        summary=summary,
        config=differing(run.config),
        environment=run.environment,
        attempts=run.attempts,
        interventions=list(run.rows("interventions.jsonl")),
        checkpoints=checkpoints,
        metrics=_ranges(run),
        remote=_remote(run),
    )


def _remote(run: RunFolder) -> str | None:
    url = run.remote_url()
    if url is None:
        return None
    try:
        return f"{url}: {len(run.remote_names())} checkpoints"
    except CheckpointError as error:
        return str(error)


def _ranges(run: RunFolder) -> list[MetricRange]:
    series: dict[str, list[tuple[float, int]]] = {}
    for step, row in run.metrics.items():
        for name, value in row.items():
            if name != "epoch" and not is_measured(name) and value == value:
                series.setdefault(name, []).append((value, step))
    found = []
    for name, values in series.items():
        best = (max if is_higher_better(name) else min)(values, key=lambda pair: pair[0])
        found.append(MetricRange(name, values[0][0], values[-1][0], *best))
    return found


def differing(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a resolved config whose values differ from their defaults.

    The section of a trainer is returned whole: its defaults are in the trainer's file, whose import takes seconds.

    Args:
        raw: the content of `config.yaml`.
    """
    defaults = _defaults(TrainerConfig)
    flat = flatten(raw)
    return {
        key: value
        for key, value in flat.items()
        # Keys of sections without a default as a whole, such as `tokenizer`, are left out if they are not set.
        if (defaults[key] != value if key in defaults else value not in (None, {}, []))
    }


def _defaults(cls: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Returns the defaults of a section by dotted key, as `config.yaml` writes them. Keys without one are absent."""
    found: dict[str, Any] = {}
    for name, described in cls.model_fields.items():
        key = f"{prefix}{described.alias or name}"
        nested = described.annotation
        value = described.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            found |= flatten(value.model_dump(mode="json"), key)
        elif value is not PydanticUndefined:
            found |= flatten(value, key)
        elif isinstance(nested, type) and issubclass(nested, BaseModel):
            found |= _defaults(nested, f"{key}.")
    return found
