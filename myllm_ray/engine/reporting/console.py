"""The callback `console`: a live panel in a terminal, plain lines elsewhere, or one JSON object per event.

With Ray it runs in the driver. It shows what `events.py` publishes in its process, the logged metrics, the progress of
long preparations (`common/progress.py`) and the phase of rank 0 from its heartbeat.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.live import Live
from rich.text import Text

from myllm_ray.common.progress import current
from myllm_ray.common.types import RunState
from myllm_ray.config.sections import Section
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.liveness.heartbeat import read_heartbeat
from myllm_ray.engine.reporting import terminal
from myllm_ray.engine.reporting.events import Event, make_event, seconds_of
from myllm_ray.engine.reporting.monitor import metrics_of
from myllm_ray.engine.reporting.panel import RunPanel
from myllm_ray.engine.reporting.terminal import console, duration, number, print_json

log = logging.getLogger(__name__)
_PER_SECOND = 1
"""Refreshes of the panel per second, at any number of steps per second. Each takes 2 to 4 ms."""
_HEARTBEAT_SECONDS, _SAMPLE_SECONDS, _PROGRESS_SECONDS = 1.0, 3.0, 5.0
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
    "mfu",
)


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
        elif name == "mfu":
            shown.append(f"MFU {value:.1%}")
        else:
            shown.append(
                f"{name.replace('validation_', 'validation ')} {value:.4g}"
                if math.isfinite(value)
                else f"{name} {value}"
            )
    return "  ".join(shown)


class ConsoleCallback(Callback):
    """Shows a run: a live panel in a terminal, one line per logged step elsewhere, or JSON lines."""

    class Config(Section):
        """Settings of the console."""

        format: Literal["auto", "panel", "plain", "json"] = Field(
            "auto",
            description="auto: a panel in a terminal, plain lines elsewhere. --log-format and MYLLM_RAY_LOG_FORMAT "
            "have priority",
        )

    config: Config
    main_only = True
    on_driver = True

    def __init__(self, config: Config | None = None, **options: Any):
        super().__init__(config, **options)
        self.panel = RunPanel()
        self._format: terminal.Format | None = None
        self._observed = False
        self._early = ""
        self._live: Live | None = None
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        # Reentrant: a signal handler may publish an event. It is never held while `Live` is called, whose thread holds
        # the lock of `Live` while it calls `_render`.
        self._lock = threading.RLock()
        self._next = {"heartbeat": 0.0, "sample": 0.0, "progress": 0.0}
        self._stdout: _Lines | None = None

    # Hooks. A run that `train` has started publishes events; a manually constructed one calls the hooks only.

    def on_event(self, event: Event) -> None:
        self._observed = True
        self.show(event)

    def on_train_start(self, state: RunState) -> None:
        if not self._observed:
            self.panel.folder = state.folder or ""
            self.panel.name = Path(self.panel.folder).name
            self.show(make_event("train_start", state.step, 0, total_steps=state.total_steps))

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self.show(make_event("log", state.step, 0, **metrics_of(state, metrics)))

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        if not self._observed:
            self.show(make_event("evaluation", state.step, 0, metrics=metrics))

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        if not self._observed:
            self.show(make_event("checkpoint", state.step, 0, folder=folder))

    def on_train_end(self, state: RunState) -> None:
        self._early = state.requests.get("stop", "") if state.step < state.total_steps and state.exit is None else ""
        if not self._observed:
            kind, reason = state.exit or ("done", None)
            self.show(make_event("end", state.step, status=kind, reason=reason, checkpoint=None))

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
        self._thread = None
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        if self._stdout is not None:
            self._stdout.close()
            self._stdout = None
            terminal.streams_warnings = False
        self._format = None  # a later event opens it again

    def show(self, event: Event) -> None:
        """Takes over an event and shows it in the format of the output."""
        with self._lock:
            if self._format is None:
                self._open()
            self.panel.apply(event)
            if self._format == "json":
                print_json(event)
            elif self._format == "plain":
                for line in self._lines(event):
                    console.print(line, markup=False)
        if self._format == "panel":
            self._show_panel(event)

    def _show_panel(self, event: Event) -> None:
        if event["event"] == "end":
            self.close()
            if event["status"] != "failed":  # the error is printed by the command, or raised
                console.print(self._summary(event), markup=False)
        elif event["event"] not in ("start", "request", "warning"):  # a run that is refused at once shows no panel
            with self._lock:
                if self._live is not None:
                    return
                # The panel disappears at the end, and a summary replaces it. Prints of user code appear above it.
                live = self._live = Live(
                    console=console,
                    refresh_per_second=_PER_SECOND,
                    get_renderable=self._render,
                    transient=True,
                    vertical_overflow="crop",
                )
            live.start()

    def _open(self) -> None:
        self._format = terminal.log_format(self.config.format)
        if self._format == "json":
            self._stdout = _Lines(sys.stdout)
            sys.stdout = self._stdout  # type: ignore[assignment]
            terminal.streams_warnings = True
        if self._format != "panel":
            self._stop.clear()
            self._thread = threading.Thread(target=self._work, name="console", daemon=True)
            self._thread.start()

    def _render(self) -> Any:
        try:
            with self._lock:
                self.poll()
                return self.panel.render(time.time(), console.width)
        except Exception as error:  # in the thread of `Live`, where it would be printed into the panel
            log.debug("the panel can't be drawn", exc_info=True)
            return Text(f"the panel can't be drawn: {error}")

    def _work(self) -> None:
        while not self._stop.wait(1.0):
            with self._lock:
                self.poll()
                found = self.panel.progress or self.panel.beat.get("progress")
                now = time.monotonic()
                if found and found["seconds"] >= _PROGRESS_SECONDS and now >= self._next["progress"]:
                    self._next["progress"] = now + _PROGRESS_SECONDS
                    print_progress(found)

    def poll(self) -> None:
        """Reads what is not sent: the progress of this process, and rank 0's heartbeat and samples."""
        now, folder = time.monotonic(), self.panel.folder
        found = current(at_least=0.5)
        self.panel.apply({"event": "progress", **(found.as_json() if found else {})})
        if folder and self.panel.phase == "training" and now >= self._next["heartbeat"]:
            self._next["heartbeat"] = now + _HEARTBEAT_SECONDS
            self.panel.apply({"event": "heartbeat", **(read_heartbeat(folder) or {})})
        if folder and self.panel.main == "reward" and now >= self._next["sample"]:
            self._next["sample"] = now + _SAMPLE_SECONDS
            sample = last_row(Path(folder) / "samples.jsonl")
            if sample is not None and sample != {k: (self.panel.sample or {}).get(k) for k in sample}:
                if self._format == "json":
                    self.show(make_event("sample", rank=0, **sample))
                else:
                    self.panel.apply({**sample, "event": "sample"})

    def _lines(self, event: Event) -> list[str]:
        """Returns the plain lines of an event."""
        name = event["event"]
        if name == "train_start":
            where = f" in {self.panel.folder}" if self.panel.folder else ""
            resuming = f", resuming from step {event['step']}" if event["step"] else ""
            return [f"training {event['total_steps']} steps{where}{resuming}"]
        if name == "log":
            shown = format_metrics(event["metrics"])
            return [f"step {event['step']}/{event['total_steps']}  epoch {event['epoch']}  {shown}"]
        if name == "checkpoint":
            return [f"saved {event['folder']}"]
        if name == "end" and event["status"] == "done":
            return [f"done: {event['step']} steps{f' (stopped early: {self._early})' if self._early else ''}"]
        if name == "end" and event["status"] != "failed":
            return [f"{event['status']} after step {event['step']}/{self.panel.total}: {event['reason']}"]
        return []

    def _summary(self, event: Event) -> str:
        """Returns the lines that replace the panel at the end."""
        panel = self.panel
        took = duration(seconds_of(event) - panel.started) if panel.started is not None else "–"
        restarts = f", {panel.restarts} restart{'s' * (panel.restarts > 1)}" if panel.restarts else ""
        why = event["reason"] or self._early
        lines = [
            f"{panel.name or 'run'}: {event['status']}, {event['step'] or 0:,} of {panel.total:,} steps in {took}"
            f"{restarts}{f' ({why})' if why else ''}"
        ]
        if panel.metrics:
            shown = [f"{panel.main} {number(panel.metrics.get(panel.main))}"]
            if panel.validation and panel.best:
                shown.append(f"validation loss {number(panel.validation[1])}")
                shown.append(f"best {number(panel.best[1])} at step {panel.best[0]:,}")
            lines.append(f"  {', '.join(shown)}")
        if event["checkpoint"]:
            lines.append(f"  checkpoint {event['checkpoint']}")
        return "\n".join(lines)


@contextmanager
def progress_shown() -> Iterator[None]:
    """Shows the progress of long tasks in the block, for commands without a run: a bar, or a line every 5 seconds."""
    panel, format, stop = RunPanel(), terminal.log_format(), threading.Event()

    def take() -> dict[str, Any] | None:
        found = current(at_least=0.5)
        panel.apply({"event": "progress", **(found.as_json() if found else {})})
        return panel.progress

    def lines() -> None:
        while not stop.wait(_PROGRESS_SECONDS):
            if found := take():
                print_progress(found)

    if format == "panel":
        show = lambda: panel.activity(console.width) if take() else Text("")  # noqa: E731
        with Live(console=console, refresh_per_second=_PER_SECOND, get_renderable=show, transient=True):
            yield
        return
    thread = threading.Thread(target=lines, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(5)


def print_progress(found: dict[str, Any]) -> None:
    """Prints the state of a task as a line."""
    if terminal.log_format() == "json":
        print_json(make_event("progress", **{k: found[k] for k in ("task", "done", "total", "seconds")}))
        return
    if found.get("total") and found["done"]:
        share = found["done"] / found["total"]
        said = f"{share:.0%}, {duration(found['seconds'] * max(0.0, 1 - share) / share)} left"
    else:
        said = f"{duration(found['seconds'])} so far"
    console.print(f"{found['task']}: {said}", markup=False)


def last_row(path: Path) -> dict[str, Any] | None:
    """Returns the last complete object of a JSON Lines file, from its last 64 kB, or None."""
    try:
        with open(path, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        return row if isinstance(row, dict) else None
    return None


class _Lines:
    """A standard output that prints each line as the event `output`, so that all output is JSON lines.

    Args:
        under: the original stream.
    """

    def __init__(self, under: Any):
        self.under = self.rich_proxied_file = under  # rich writes to the second one
        self._partial = ""

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            print_json(make_event("output", text=line))
        return len(text)

    def flush(self) -> None:
        self.under.flush()

    def close(self) -> None:
        """Writes the last line if it has no newline, and restores the original stream."""
        if self._partial:
            self.write("\n")
        if sys.stdout is self:
            sys.stdout = self.under

    def __getattr__(self, name: str) -> Any:
        return getattr(self.under, name)
