"""`report.html`: the curves of a run on one page, without a server and without JavaScript."""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl, write_atomic
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 220, 56, 24
_CHARTS = (("Loss", ("loss", "validation_loss")), ("Gradient norm", ("grad_norm",)), ("Learning rate", ("learning_rate",)),
           ("Reward", ("reward", "validation_reward")), ("Preference accuracy", ("rewards/accuracies", "validation_rewards/accuracies")),
           ("Accuracy", ("accuracy", "validation_accuracy")), ("KL divergence", ("kl",)), ("Entropy", ("entropy",)),
           ("Answer length", ("length", "validation_length")), ("Tokens per second", ("tokens_per_second",)), ("Token accuracy", ("token_accuracy", "validation_token_accuracy")))
_COLOURS = ("#1f6feb", "#d1242f")
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;color:#1f2328}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(540px,1fr));gap:1.5rem}svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#59636e}pre{background:#f6f8fa;padding:1rem;overflow:auto}"""


class ReportCallback(Callback):
    """Writes `report.html` when the run ends, also when it ends by an error."""

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
    """The page as HTML: `rows` are the lines of `metrics.jsonl`."""
    charts = "".join(_chart(title, names, rows) for title, names in _CHARTS)
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    return (f"<!doctype html><meta charset=utf-8><title>{html.escape(folder.name)}</title><style>{_STYLE}</style>"
            f"<h1>{html.escape(folder.name)}</h1><p>{state.step} of {state.total_steps} steps, {html.escape(how)}</p>"
            f"<div class=charts>{charts}</div><h2>Config</h2><pre>{html.escape(text)}</pre>\n")


def _chart(title: str, names: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    series = [(name, [(r["step"], r[name]) for r in rows if math.isfinite(r.get(name, math.nan))]) for name in names]
    series = [(name, points) for name, points in series if points]
    if not series:
        return ""
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> str:
        return (f"{_LEFT + (x - x0) / ((x1 - x0) or 1) * (_WIDTH - _LEFT - 8):.1f},"
                f"{8 + (y1 - y) / ((y1 - y0) or 1) * (_HEIGHT - _BOTTOM - 16):.1f}")

    lines = "".join(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(place(*p) for p in points)}"/>'
                    + "".join(f'<circle r="2" fill="{colour}" cx="{c[0]}" cy="{c[1]}"/>' for c in
                              (place(*p).split(",") for p in points if len(points) < 30))
                    for (_, points), colour in zip(series, _COLOURS, strict=False))
    legend = " ".join(f'<span style="color:{colour}">{name}</span>' for (name, _), colour in zip(series, _COLOURS, strict=False))
    return (f'<figure><figcaption><b>{title}</b> {legend}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}">'
            f'<path d="M{_LEFT} 8V{_HEIGHT - _BOTTOM}H{_WIDTH}" fill="none" stroke="#d1d9e0"/>{lines}'
            f'<text x="4" y="16">{y1:.3g}</text><text x="4" y="{_HEIGHT - _BOTTOM}">{y0:.3g}</text>'
            f'<text x="{_LEFT}" y="{_HEIGHT - 6}">step {x0}</text><text x="{_WIDTH - 60}" y="{_HEIGHT - 6}">step {x1}</text>'
            f'</svg></figure>')
