"""The changes between two runs that may explain a difference, and what can be made of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myllm_ray.runs.difference import WHERE, Change, environment_changes, shown
from myllm_ray.runs.folder import RunFolder

Key = tuple[str | int, ...]
ABSENT = "<absent>"
"""The value of a key that a config does not have."""
_TOGETHER = (
    (("run", "max_steps"), ("run", "epochs")),
    (("scheduler", "warmup_steps"), ("scheduler", "warmup_ratio")),
    (("model", "name"), ("model", "config"), ("model", "factory")),
    (("tokenizer",),),
    (("run", "amendments"),),
)
"""Keys that can only change together: exactly one of them has a value, or their parts belong to each other."""
_NEUTRAL = (
    ("run", "name"),
    ("run", "storage"),
    ("run", "overwrite"),
    ("checkpoint",),
    ("logging",),
    ("evaluation",),
    ("callbacks",),
    ("tracking",),
    ("data", "cache"),
    ("stability", "hang_seconds"),
    ("scaling", "max_failures"),
    ("scaling", "resources_per_worker"),
    ("scaling", "gpus_per_worker"),
    ("scaling", "timeout_seconds"),
)
"""Keys that can't change a loss: where a run is stored, and what it observes."""
_LAYOUT = (
    ("scaling",),
    ("accelerator", "name"),
    ("accelerator", "stage"),
    ("accelerator", "offload"),
    ("accelerator", "options"),
    ("accelerator", "activation_checkpointing"),
    ("accelerator", "compile"),
    ("accelerator", "device"),
    ("batch", "micro_size"),
    ("batch", "find_micro_size"),
    ("optimizer", "fused"),
    ("run", "determinism"),
    ("model", "attention"),
)
"""Keys that change how a step is computed but not what it computes: runs must agree within rounding."""
_SIZES = re.compile(r"size|layers|heads|num_|^n_|dim|type|tie_|bias|experts")
"""Keys of a model's config that change the names or the shapes of its tensors."""


@dataclass
class Candidate:
    """A change from run A to run B that may be the cause.

    `kind` is config, layout, package, code, variable, hardware or data. `keys` are the keys of the config that change.
    The remaining fields are filled by the reruns: `effect` is a text, and `why_not` is why it can't be made again.
    """

    kind: str
    changes: list[Change]
    keys: list[tuple[Key, Any]] = field(default_factory=list)
    status: str = "not run"
    """cause, part, no effect, rounding, impossible, or not run."""
    effect: str = ""
    why_not: str = ""

    @property
    def text(self) -> str:
        """The change as text, such as "optimizer.lr 0.003 → 0.001"."""
        return ", ".join(map(str, self.changes))


def config_candidates(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[list[Candidate], list[Change]]:
    """Returns the changes of the config that may matter, and the changed keys that can't.

    All keys of the layout are one candidate, because they are only valid together. Keys of which exactly one has a
    value change together, too.
    """
    candidates: list[Candidate] = []
    neutral: list[Change] = []
    layout = Candidate("layout", [])
    for group in _grouped(_units(a, b, ())):
        changes = [Change("config", dotted(key), _readable(x), _readable(y)) for key, x, y in group]
        keys = [(key, y) for key, _, y in group]
        unused = all(_is_in(key, _NEUTRAL) and not _is_start(key, x, y) for key, x, y in group)
        if unused or _is_own_validation(a, b, [key for key, _ in keys]):
            neutral += [c for c in changes if c.name not in WHERE]
        elif all(_is_in(key, _LAYOUT) for key, _ in keys):
            layout.changes += changes
            layout.keys += keys
        else:
            candidates.append(Candidate("config", changes, keys))
    return [*candidates, *([layout] if layout.changes else [])], neutral


def environment_candidates(a: RunFolder, b: RunFolder) -> list[Candidate]:
    """Returns the changes of code, packages, hardware, variables and data."""
    found = environment_changes(a, b)
    codes = {c.name for c in found if c.kind == "code"}
    candidates = []
    for change in found:
        # The version of this package says less than the hash of its files.
        if change.kind == "package" and change.name == "myllm_ray" and "myllm_ray" in codes:
            continue
        if change.kind == "code" and _is_in_a_package(change, found, a, b):
            continue
        candidates.append(Candidate(change.kind, [change]))
    return candidates


def _is_in_a_package(change: Change, found: Iterable[Change], a: RunFolder, b: RunFolder) -> bool:
    """Whether a changed component belongs to a package whose version has changed, so both are the same change."""
    for other in found:
        if other.kind != "package":
            continue
        folders = [(run.environment.get("locations") or {}).get(other.name) for run in (a, b)]
        sources = [((run.environment.get("code") or {}).get(change.name) or {}).get("path") for run in (a, b)]
        if all(f and s and str(s).rpartition("/")[0] == str(f) for f, s in zip(folders, sources, strict=True)):
            return True
    return False


def _units(a: Any, b: Any, key: Key) -> list[tuple[Key, Any, Any]]:
    """Returns the smallest changed parts of two configs as (key, value in A, value in B)."""
    if (key,) in _TOGETHER:
        return [(key, a, b)] if a != b else []
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = dict.fromkeys([*a, *b])
        return [unit for n in names for unit in _units(a.get(n, ABSENT), b.get(n, ABSENT), (*key, n))]
    lists = isinstance(a, list) and isinstance(b, list) and len(a) == len(b)
    if lists and all(isinstance(item, Mapping) for item in [*a, *b]):
        return [unit for i in range(len(a)) for unit in _units(a[i], b[i], (*key, i))]
    return [(key, a, b)] if a != b else []


def _grouped(units: Sequence[tuple[Key, Any, Any]]) -> list[list[tuple[Key, Any, Any]]]:
    groups: dict[Any, list[tuple[Key, Any, Any]]] = {}
    for unit in units:
        together = next((group for group in _TOGETHER if unit[0] in group), unit[0])
        groups.setdefault(together, []).append(unit)
    return list(groups.values())


def _is_in(key: Key, prefixes: Iterable[Key]) -> bool:
    return any(key[: len(prefix)] == prefix for prefix in prefixes)


def _is_start(key: Key, a: Any, b: Any) -> bool:
    """Whether a key names the checkpoint of another run from which the run starts."""
    return key == ("checkpoint", "resume") and not {a, b} <= {"auto", "never", ABSENT}


def _is_own_validation(a: Mapping[str, Any], b: Mapping[str, Any], keys: Sequence[Key]) -> bool:
    """Whether keys belong to validation data with files of their own, which are not trained on."""
    sections = [(raw.get("data") or {}).get("validation") for raw in (a, b)]
    return all(key[:2] == ("data", "validation") for key in keys) and not any(
        isinstance(s, Mapping) and s.get("split") for s in sections
    )


def with_keys(raw: Mapping[str, Any], keys: Iterable[tuple[Key, Any]]) -> dict[str, Any]:
    """Returns a copy of a config with other values of some keys."""
    found: dict[str, Any] = copy.deepcopy(dict(raw))
    for key, value in keys:
        target: Any = found
        for part in key[:-1]:
            if isinstance(target, dict) and not isinstance(target.get(part), (dict, list)):
                target[part] = {}
            target = target[part]
        if value == ABSENT:
            target.pop(key[-1], None)
        else:
            target[key[-1]] = copy.deepcopy(value)
    return found


def why_incomparable(a: RunFolder, b: RunFolder) -> str | None:
    """Returns why a difference of two runs needs no explanation, or None: they have other trainers or other models.

    Rates of dropout and other keys of a model's config may differ, except those that change its tensors.
    """
    if a.get("trainer") != b.get("trainer"):
        return f"the runs have different trainers: {a.get('trainer')} and {b.get('trainer')}"
    first, second = a.get("model", {}), b.get("model", {})
    for key in ("name", "factory"):
        if first.get(key) != second.get(key):
            one, two = (shown(section.get(key) or "another model") for section in (first, second))
            return f"the runs have different models: model.{key} is {one} and {two}"
    x, y = first.get("config") or {}, second.get("config") or {}
    for key in dict.fromkeys([*x, *y]):
        value, other = x.get(key), y.get(key)
        if value != other and _SIZES.search(str(key)):
            return f"the runs have different models: model.config.{key} is {shown(value)} and {shown(other)}"
    return None


def dotted(key: Key) -> str:
    """Returns a key as text, such as data.train.0.path."""
    return ".".join(map(str, key))


def _readable(value: Any) -> Any:
    """Returns a value for a table. Of a tokenizer, only what is set."""
    if value == ABSENT:
        return None
    if isinstance(value, Mapping):
        given = {k: v for k, v in value.items() if v is not None}
        return ", ".join(f"{k}: {v}" for k, v in given.items()) or None
    return value
