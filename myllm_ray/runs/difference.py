"""The differences of two runs, from their records alone: `myllm-ray runs diff`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from myllm_ray.common.flatten import flatten
from myllm_ray.runs.folder import RunFolder

WHERE = (
    "run.name",
    "run.storage",
    "run.overwrite",
    "checkpoint.resume",
    "data.cache",
    "data.local_cache",
    "data.local_cache_gb",
)
"""Keys that say where a run is stored. They differ between any two runs and are not compared."""


@dataclass(frozen=True)
class Change:
    """A value that differs between two runs. `kind` is config, code, package, hardware, variable or data."""

    kind: str
    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.name} {shown(self.a)} → {shown(self.b)}"


@dataclass(frozen=True)
class FirstDifference:
    """The first step at which a quantity of two runs differs, with both values."""

    step: int
    name: str
    a: float | str | None
    b: float | str | None


@dataclass
class Differences:
    """All differences of two runs."""

    changes: list[Change]
    batch: FirstDifference | None
    """The first step with another batch, by the hashes in ledger.jsonl."""
    loss: FirstDifference | None
    """The first logged step with another loss, or another metric if both runs have no loss."""
    steps: tuple[int, int]
    """The last step of each run."""
    notes: list[str] = field(default_factory=list)
    """What could not be compared."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs, neither in what the runs were given nor in what they did."""
        return not self.changes and self.batch is None and self.loss is None and self.steps[0] == self.steps[1]

    def as_json(self) -> dict[str, Any]:
        """Returns the differences as JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare(a: RunFolder, b: RunFolder) -> Differences:
    """Compares the configs, environments, data and records of two runs.

    Raises:
        ConfigError: a file of a run can't be read.
    """
    notes = []
    for run in (a, b):
        if "code" not in run.environment:
            notes.append(f"{run.path}: an older version recorded neither the code nor the hardware of the run")
        if not run.ledger:
            notes.append(f"{run.path}: no ledger.jsonl, so batches can't be compared")
        if not run.metrics:
            notes.append(f"{run.path}: no metrics.jsonl (callback jsonl), so losses can't be compared")
    return Differences(
        [*config_changes(a, b), *environment_changes(a, b)],
        first_batch(a, b),
        first_metric(a, b, ("loss",)) or first_metric(a, b),
        (a.last_step, b.last_step),
        notes,
    )


def config_changes(a: RunFolder, b: RunFolder) -> list[Change]:
    """Returns the keys of the config that differ, except where the runs are stored."""
    # The checkpoint of another run, from which a run starts, is not a matter of storage.
    starts = any(run.get("checkpoint.resume", "never") not in ("auto", "never") for run in (a, b))
    skip = [key for key in WHERE if not (starts and key == "checkpoint.resume")]
    return _changes("config", flatten(a.config), flatten(b.config), skip)


def environment_changes(a: RunFolder, b: RunFolder) -> list[Change]:
    """Returns the differences in code, packages, hardware, environment variables and data.

    What only one run records, because the other is of an older version, is not compared.
    """
    first, second = a.environment, b.environment
    found: list[Change] = []
    codes = [{name: entry.get("hash") for name, entry in (e.get("code") or {}).items()} for e in (first, second)]
    sides: dict[str, tuple[Any, Any]] = {
        "code": (codes[0], codes[1]),
        "package": (_packages(first), _packages(second)),
        "hardware": (first.get("hardware"), second.get("hardware")),
        "variable": (first.get("variables"), second.get("variables")),
        "data": (_data(first), _data(second)),
    }
    for kind, (x, y) in sides.items():
        if isinstance(x, Mapping) and isinstance(y, Mapping) and (kind == "variable" or (x and y)):
            found += _changes(kind, x, y)
    return found


def _packages(environment: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the versions of Python and packages, also from the flat keys of older versions."""
    known = ("python", "myllm_ray", "torch", "transformers", "ray", "safetensors", "numpy")
    flat = {name: environment[name] for name in known if name in environment}
    return {**flat, **(environment.get("packages") or {})}


def _data(environment: Mapping[str, Any]) -> dict[str, Any]:
    tokenizer = (environment.get("plan") or {}).get("tokenizer")
    found = dict(environment.get("data") or {})
    found.pop("batch.global_size", None)  # a key of the config
    return {**found, **({"tokenizer": tokenizer} if tokenizer else {})}


def _changes(kind: str, a: Mapping[str, Any], b: Mapping[str, Any], skip: Iterable[str] = ()) -> list[Change]:
    names = [name for name in dict.fromkeys([*a, *b]) if name not in set(skip)]
    return [Change(kind, name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def first_batch(a: RunFolder, b: RunFolder) -> FirstDifference | None:
    """Returns the first common step whose batches differ, or None."""
    first, second = a.ledger, b.ledger
    for step in sorted(first.keys() & second.keys()):
        if first[step] != second[step]:
            return FirstDifference(step, "batch", first[step], second[step])
    return None


def first_metric(a: RunFolder, b: RunFolder, names: Iterable[str] | None = None) -> FirstDifference | None:
    """Returns the first difference of a metric in the steps that both runs have logged, by exact values.

    Args:
        a: a run.
        b: the other run.
        names: only these metrics; default: all that both runs have.
    """
    first, second = a.metrics, b.metrics
    for step in sorted(first.keys() & second.keys()):
        both = [n for n in first[step] if n in second[step] and (names is None or n in names)]
        for name in both:
            x, y = first[step][name], second[step][name]
            if x != y and not (x != x and y != y):  # two NaNs are equal here
                return FirstDifference(step, name, x, y)
    return None


def shown(value: Any) -> str:
    """Returns a value for a line of text; None as "not set"."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
