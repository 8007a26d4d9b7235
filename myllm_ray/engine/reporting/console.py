"""Callbacks that print lines or show a progress bar in the terminal. With Ray they run in the driver."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

_console = Console(highlight=False, soft_wrap=True)


_ALL = (
    "loss",
    "validation_loss",
    "perplexity",
    "reward",
    "validation_reward",
    "accuracy",
    "rewards/accuracies",
    "kl",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
_FEW = ("loss", "reward", "tokens_per_second")


def format_metrics(metrics: dict[str, Any], names: tuple[str, ...] = _ALL) -> str:
    """Returns the metrics with the given names in one line; missing ones are left out."""
    shown = []
    for name in names:
        value = metrics.get(name)
        if not isinstance(value, (int, float)):
            continue
        if name == "learning_rate":
            shown.append(f"lr {value:.2e}")
        elif name == "tokens_per_second":
            shown.append(f"{value:,.0f} tok/s")
        else:
            shown.append(
                f"{name.replace('validation_', 'validation ')} {value:.4g}"
                if math.isfinite(value)
                else f"{name} {value}"
            )
    return "  ".join(shown)


class PrintCallback(Callback):
    """Prints one line per logged step, and lines at start, end and for each checkpoint."""

    main_only = True
    on_driver = True

    def on_train_start(self, state: RunState) -> None:
        where = f" in {state.folder}" if state.folder else ""
        resuming = f", resuming from step {state.step}" if state.step else ""
        _console.print(f"training {state.total_steps} steps{where}{resuming}")

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        _console.print(f"step {state.step}/{state.total_steps}  epoch {state.epoch}  {format_metrics(metrics)}")

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        _console.print(f"saved {folder}")

    def on_train_end(self, state: RunState) -> None:
        if state.exit is not None:
            _console.print(f"{state.exit.kind} after step {state.step}/{state.total_steps}: {state.exit.reason}")
            return
        reason = state.requests.get("stop")
        early = f" (stopped early: {reason})" if reason and state.step < state.total_steps else ""
        _console.print(f"done: {state.step} steps{early}")


class ProgressCallback(Callback):
    """Shows a progress bar (rich) with loss and speed. Shows nothing if the output is not a terminal."""

    main_only = True
    on_driver = True

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_start(self, state: RunState) -> None:
        if not _console.is_terminal or self._progress:  # the bar exists already if the workers were restarted
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=_console,
        )
        self._progress.start()
        self._task = self._progress.add_task("training", total=state.total_steps, completed=state.step, shown="")

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        if self._progress:
            self._progress.update(self._task, completed=state.step, shown=format_metrics(metrics, _FEW))

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
