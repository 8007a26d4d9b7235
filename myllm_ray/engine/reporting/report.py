"""The file `report.html`: the curves of a run on one page that needs no server and no JavaScript."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl, write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.charts import COLOURS, Line, line_chart, page

_CHARTS = (
    ("Loss", ("loss", "validation_loss")),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Reward", ("reward", "validation_reward")),
    ("Preference accuracy", ("rewards/accuracies", "validation_rewards/accuracies")),
    ("Accuracy", ("accuracy", "validation_accuracy")),
    ("KL divergence", ("kl",)),
    ("Entropy", ("entropy",)),
    ("Answer length", ("length", "validation_length")),
    ("Tokens per second", ("tokens_per_second",)),
    ("Token accuracy", ("token_accuracy", "validation_token_accuracy")),
)


class ReportCallback(Callback):
    """Writes `report.html` when the run ends, also after an error."""

    main_only = True

    def on_train_end(self, state: RunState) -> None:
        self._write(state, "finished" if state.step >= state.total_steps else "stopped early")

    def on_exception(self, state: RunState, error: BaseException) -> None:
        self._write(state, f"ended by {type(error).__name__}: {error}")

    @staticmethod
    def _write(state: RunState, how: str) -> None:
        if state.folder:
            folder = Path(state.folder)
            write_atomic(folder / "report.html", render(list(read_jsonl(folder / "metrics.jsonl")), folder, state, how))


def render(rows: list[dict[str, Any]], folder: Path, state: RunState, how: str) -> str:
    """Returns the page as HTML.

    Args:
        rows: the objects in `metrics.jsonl`.
        folder: the run's folder.
        state: the final state of the run.
        how: how the run ended, as plain text.
    """
    charts = "".join(_chart(title, names, rows) for title, names in _CHARTS)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return page(
        folder.name,
        f"<p>{state.step} of {state.total_steps} steps, {html.escape(how)}</p>"
        f"<div class=charts>{charts}</div><h2>Config</h2><pre>{html.escape(text)}</pre>",
    )


def _chart(title: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    series = [(name, [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]) for name in names]
    lines = [Line(name, points, colour) for (name, points), colour in zip(series, COLOURS, strict=False) if points]
    return line_chart(title, lines, "step") if lines else ""
