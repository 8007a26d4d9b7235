"""The live panel of a run: a pure function of the run's events, the heartbeat of rank 0 and the time."""

from __future__ import annotations

from collections import deque
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from myllm_ray.engine.reporting.events import Event, seconds_of
from myllm_ray.engine.reporting.terminal import duration, memory, number, sparkline

_LABEL = 12
_WIDEST = 120
_POINTS = 2048
"""Most points of the sparkline that are kept; then neighbours are averaged."""
_AVERAGED = 50
"""Number of logged steps from which the time left is estimated."""
_PHASES = {"evaluation": "evaluating", "checkpoint": "saving a checkpoint", "rollout": "sampling answers"}
"""Phases of a rank that are shown when they take a second or longer."""
_METRICS = (
    ("validation_reward", "validation"),
    ("kl", "KL"),
    ("length", "length"),
    ("rewards/accuracies", "accuracy"),
    ("accuracy", "accuracy"),
    ("perplexity", "perplexity"),
    ("tflops_per_second", "TFLOP/s"),
    ("skipped_steps", "skipped"),
)
"""Further metrics that are shown if the run logs them, with their labels."""


class RunPanel:
    """What is known about a run, from the events that `apply` receives."""

    def __init__(self) -> None:
        self.name, self.folder = "", ""
        self.started: float | None = None
        self.phase = ""
        self.step, self.total, self.epoch = 0, 0, 0
        self.metrics: dict[str, Any] = {}
        self.telemetry: dict[str, float] = {}
        self.checkpoint: tuple[int, float] | None = None
        self.validation: tuple[int, float] | None = None
        self.best: tuple[int, float] | None = None
        self.restarts, self.reason = 0, ""
        self.sample: dict[str, Any] | None = None
        self.beat: dict[str, Any] = {}
        self.progress: dict[str, Any] | None = None
        self._curve: list[tuple[int, float]] = []
        self._times: deque[tuple[float, int]] = deque(maxlen=_AVERAGED)

    @property
    def main(self) -> str:
        """The name of the metric with the sparkline: the loss of a policy gradient does not measure progress."""
        return "reward" if "reward" in self.metrics else "loss"

    def apply(self, event: Event) -> None:
        """Takes over what an event says. Unknown events are ignored."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler is not None:
            handler(event)

    def _on_start(self, event: Event) -> None:
        self.name, self.folder, self.started = event["name"], event["folder"], seconds_of(event)

    def _on_phase(self, event: Event) -> None:
        self.phase, self.beat = event["phase"], {}

    def _on_train_start(self, event: Event) -> None:
        self.phase, self.step, self.total = "training", event["step"], event["total_steps"]
        if self.started is None:  # a manually constructed run has no event `start`
            self.started = seconds_of(event)
        self._curve = [point for point in self._curve if point[0] <= self.step]  # later steps are trained again
        self._times.clear()

    def _on_log(self, event: Event) -> None:
        if "loss" not in event["metrics"] and self.metrics:  # the evaluation before the first step
            return
        self.step, self.epoch, self.total = event["step"], event["epoch"], event["total_steps"]
        self.metrics, self.telemetry = event["metrics"], event["telemetry"]
        if isinstance(value := self.metrics.get(self.main), (int, float)):
            self._curve.append((self.step, value))
            if len(self._curve) > _POINTS:
                pairs = zip(self._curve[::2], self._curve[1::2], strict=False)
                self._curve = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
        self._times.append((float(self.metrics.get("time", seconds_of(event))), self.step))

    def _on_evaluation(self, event: Event) -> None:
        value = event["metrics"].get("validation_loss")
        if not isinstance(value, (int, float)):
            return
        self.validation = (event["step"], value)
        if self.best is None or value <= self.best[1]:
            self.best = self.validation

    def _on_checkpoint(self, event: Event) -> None:
        name = str(event["folder"]).rpartition("step-")[2]
        self.checkpoint = (int(name) if name.isdigit() else event["step"], seconds_of(event))

    def _on_restart(self, event: Event) -> None:
        self.restarts, self.reason, self.beat = event["restarts"], str(event["reason"]), {}

    def _on_amendment(self, event: Event) -> None:
        self.beat = {}

    def _on_sample(self, event: Event) -> None:
        self.sample = event

    def _on_heartbeat(self, event: Event) -> None:
        self.beat = event

    def _on_progress(self, event: Event) -> None:
        self.progress = event if event.get("task") else None

    @property
    def left(self) -> float | None:
        """The estimated seconds of the remaining steps."""
        if len(self._times) < 2 or self._times[-1][1] <= self._times[0][1]:
            return None
        (first, a), (last, b) = self._times[0], self._times[-1]
        return (last - first) / (b - a) * max(0, self.total - self.step)

    def render(self, now: float, width: int) -> Panel:
        """Returns the panel.

        Args:
            now: the time in seconds since the epoch.
            width: the width of the terminal. The panel is at most 120 wide.
        """
        width = min(width, _WIDEST)
        inside = width - 4
        lines = self._lines(now, inside)
        for line in lines:
            line.truncate(inside, overflow="ellipsis", pad=True)
        folder = self.folder if len(self.folder) <= inside - 4 else f"…{self.folder[-(inside - 5) :]}"
        return Panel(
            Group(*lines),
            width=width,
            title=Text(self.name, "bold") if self.name else None,
            title_align="left",
            subtitle=Text(folder, "dim") if folder else None,
            subtitle_align="left",
            border_style="dim",
            padding=(0, 1),
        )

    def _lines(self, now: float, inside: int) -> list[Text]:
        elapsed = duration(now - self.started) if self.started is not None else "–"
        if not self.total:
            return [self.activity(inside), _pair("elapsed", elapsed), *self._restarted()]
        done = f"{self.step:>{len(f'{self.total:,}')},} / {self.total:,}"
        left = "–" if self.left is None else f"{duration(self.left)} left"
        value = number(self.metrics.get(self.main))
        curve = sparkline([v for _, v in self._curve], max(8, inside - _LABEL - 12))
        lines = [
            _bar("step", self.step, self.total, done, left, inside),
            self.activity(inside),
            _pair(self.main, f"{value:<10}").append(curve, "cyan"),
        ]
        if self.main == "loss" or self.validation:
            lines.append(_pair("validation", self._validation()))
        lines += _columns(self._pairs(now, elapsed), inside)
        if self.sample is not None:
            lines.append(_pair("sample", _sample(self.sample)))
        return [*lines, *self._restarted()]

    def _pairs(self, now: float, elapsed: str) -> list[tuple[str, str]]:
        found, machine = self.metrics, self.telemetry
        speed = found.get("tokens_per_second")
        wait = machine.get("data_wait")
        held = [memory(machine["host_memory"])] if "host_memory" in machine else ["–"]
        if "device_memory" in machine:
            held.append(f"device {memory(machine['device_memory'])}")
        pairs = [
            ("lr", f"{found['learning_rate']:.2e}" if "learning_rate" in found else "–"),
            ("tokens/s", f"{speed:,.0f}" if isinstance(speed, (int, float)) else "–"),
            ("grad norm", number(found.get("grad_norm"))),
            ("data wait", f"{wait:.1%}" if wait is not None else "–"),
            ("epoch", str(self.epoch)),
            ("memory", ", ".join(held)),
            ("elapsed", elapsed),
            ("checkpoint", self._saved(now)),
        ]
        if self.main == "reward":
            pairs.insert(0, ("loss", number(found.get("loss"))))
        if isinstance(mfu := found.get("mfu"), (int, float)):
            pairs.append(("MFU", f"{mfu:.1%}"))
        extra = [(label, number(found[name])) for name, label in _METRICS if name in found]
        return pairs + extra

    def activity(self, inside: int) -> Text:
        """Returns the line that says what the run is doing, with a bar if its end can be estimated."""
        found = self.progress or self.beat.get("progress")
        if found and found.get("total"):
            share = min(1.0, found["done"] / found["total"])
            left = found["seconds"] * (1 - share) / share if share else None
            said = "–" if left is None else f"{duration(left)} left"
            return _bar("now", found["done"], found["total"], str(found["task"]), said, inside)
        text = str(found["task"]) if found else self.phase
        if found is None and self.phase == "training" and self.beat.get("seconds", 0.0) >= 1.0:
            text = _PHASES.get(str(self.beat.get("phase")), text)
        return _pair("now", text)

    def _validation(self) -> str:
        if self.validation is None or self.best is None:
            return "–"
        step, value = self.validation
        best = "the best so far" if self.best == self.validation else f"best {number(self.best[1])} at {self.best[0]:,}"
        return f"{number(value):<10}at step {step:,}, {best}"

    def _saved(self, now: float) -> str:
        if self.checkpoint is None:
            return "–"
        step, at = self.checkpoint
        return f"step {step:,}, {duration(now - at)} ago"

    def _restarted(self) -> list[Text]:
        if not self.restarts:
            return [_pair("restarts", "0")] if self.total else []
        return [_pair("restarts", f"{self.restarts}, the last: {self.reason}", "yellow")]


def _pair(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label:<{_LABEL}}", "dim"), (value, style), no_wrap=True)


def _columns(pairs: list[tuple[str, str]], inside: int) -> list[Text]:
    """Returns the pairs in one to three columns of constant width."""
    count = 3 if inside >= 110 else 2 if inside >= 66 else 1
    width = inside // count
    lines = []
    for first in range(0, len(pairs), count):
        line = Text(no_wrap=True)
        for label, value in pairs[first : first + count]:
            cell = _pair(label, value)
            cell.truncate(width - 1, overflow="ellipsis", pad=True)
            line.append_text(cell).append(" ")
        lines.append(line)
    return lines


def _bar(label: str, done: float, total: float, text: str, left: str, inside: int) -> Text:
    """Returns a line with a bar; its parts have constant widths."""
    share = min(1.0, max(0.0, done / total))
    tail = f"  {share:>6.1%}  {left:>12}"
    room = inside - _LABEL - len(tail)
    columns = max(min(24, room), min(len(text), room))
    width = room - columns - 2
    width = width if width >= 6 else 0  # a narrow terminal has no place for a bar
    shown = Text(text, no_wrap=True)
    shown.truncate(columns if width else room, overflow="ellipsis", pad=True)
    full = int(width * share)
    line = Text.assemble((f"{label:<{_LABEL}}", "dim"), shown, no_wrap=True)
    if width:
        line.append("  ").append("━" * full, "cyan").append("─" * (width - full), "dim")
    return line.append(tail)


def _sample(sample: dict[str, Any]) -> str:
    text = " ".join(str(sample.get("response", "")).split())
    return f"{number(sample.get('reward'))}  {text!r} at step {sample.get('step')}"
