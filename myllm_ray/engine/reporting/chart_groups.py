"""Which charts show the metrics of a run: every metric is in exactly one chart, and the charts are in groups."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from myllm_ray.engine.reporting.page import Chart, Charts, Trace

_VALIDATION = "validation_"
_GROUPS = (
    ("Evaluation", r"^evaluate/"),
    ("Optimization", r"^(grad_norm|learning_rate|lr|loss_scale|skipped_steps|weight_decay|momentum|update)"),
    ("Speed and memory", r"tokens_per_second|^tokens$|mfu|flops|memory|bytes$|seconds|^time[_/]|wait|gpu|cpu"),
    ("Experts", r"^experts/|router"),
    (
        "Rewards and policy",
        r"reward|^kl|entropy|^score|importance|clip_fraction|advantage|^values?[_/]|explained_variance|groups_without|"
        r"^length|^ended|log_probs|calibration|margin|^loss/(policy|value)$",
    ),
    ("Loss", r"loss|perplexity|accuracy|nll|bits_per"),
    ("Data", r"skipped_rows|long_documents|^data"),
)
ORDER = (
    "Loss",
    "Loss by source",
    "Evaluation",
    "Rewards and policy",
    "Optimization",
    "Speed and memory",
    "Experts",
    "Data",
    "Other",
)
_FIRST = (
    *("loss", "perplexity", "token_accuracy", "reward", "kl", "grad_norm", "learning_rate"),
    *("tokens_per_second", "mfu", "tflops_per_second"),
)
_PAIRS = re.compile(r"^(?P<prefix>.+)/(?:chosen|rejected)$")
_LAYERS = re.compile(r"^experts/(?:layer_\d+/)?(?P<what>[^/]+)$")
_MOST = 16
"""Largest number of curves of one chart."""


def charts_of(metrics: Iterable[str], sources: Sequence[str] = ()) -> list[Charts]:
    """Returns the groups of charts for the metrics of one run.

    Args:
        metrics: names of the metrics.
        sources: names of the data sources, whose losses are `loss/<source>`.
    """
    titles: dict[str, list[str]] = {}
    for name in metrics:
        titles.setdefault(_title(name, sources), []).append(name)
    groups: dict[str, list[Chart]] = {}
    for title in sorted(titles, key=lambda t: (_FIRST.index(t) if t in _FIRST else len(_FIRST), t)):
        names = sorted(titles[title], key=lambda n: (n.startswith(_VALIDATION), _numbered(n)))
        for first in range(0, len(names), _MOST):
            part = names[first : first + _MOST]
            traces = [Trace(name, _label(name, title, sources)) for name in part]
            more = f" ({first + 1} to {first + len(part)})" if len(names) > _MOST else ""
            groups.setdefault(group_of(names[0], sources), []).append(Chart(title + more, traces))
    return [Charts(group, groups[group]) for group in ORDER if group in groups]


def group_of(name: str, sources: Sequence[str] = ()) -> str:
    """Returns the group of a metric."""
    base = name.removeprefix(_VALIDATION)
    if base.startswith("loss/") and base[5:] in sources:
        return "Loss by source"
    return next((group for group, pattern in _GROUPS if re.search(pattern, base)), "Other")


def _title(name: str, sources: Sequence[str]) -> str:
    base = name.removeprefix(_VALIDATION)
    if base.startswith("loss/") and base[5:] in sources:
        return "validation loss by source" if name != base else "loss by source"
    if base.startswith("time/"):
        return "seconds per step"
    if pair := _PAIRS.match(base):
        return pair["prefix"]
    if layer := _LAYERS.match(base):
        return f"experts/{layer['what']}"
    return base


def _label(name: str, title: str, sources: Sequence[str]) -> str:
    base = name.removeprefix(_VALIDATION)
    if title.endswith("by source"):
        return base[5:]
    if base.startswith("time/"):
        return base.removeprefix("time/")
    if title.startswith("experts/"):
        return base.removeprefix("experts/")
    short = base.removeprefix(f"{title}/") if base != title else "training"
    if name == base:
        return short
    return "validation" if short == "training" else f"validation {short}"


def _numbered(name: str) -> list[tuple[int, str]]:
    """Returns a key that orders `layer_2` before `layer_10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
