"""The console: the panel as text at several widths, plain lines, JSON lines, and the progress of long tasks."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, MakeConfig
from rich.console import Console

from myllm_ray import train
from myllm_ray.common.progress import Task, current, track
from myllm_ray.common.types import RunState
from myllm_ray.config import ConfigError
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting import console as console_module
from myllm_ray.engine.reporting import terminal
from myllm_ray.engine.reporting.console import ConsoleCallback, progress_shown
from myllm_ray.engine.reporting.events import Event
from myllm_ray.engine.reporting.panel import RunPanel

NOON = 1_800_000_000.0


def at(seconds: float, event: str, step: int | None = None, **fields: Any) -> Event:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(NOON + seconds)) + f".{int(seconds % 1 * 1000):03d}+00:00"
    return {"time": stamp, "event": event, "step": step, **fields}


def logged(seconds: float, step: int, **metrics: float) -> Event:
    values = {"loss": 5 - step / 50, "learning_rate": 3e-4, "grad_norm": 0.8123, "tokens_per_second": 12345.6}
    return at(
        seconds,
        "log",
        step,
        epoch=1,
        total_steps=200,
        metrics=values | {"time": NOON + seconds} | metrics,
        telemetry={"host_memory": 1.25e9, "data_wait": 0.0123},
    )


def text(panel: RunPanel, seconds: float, width: int) -> str:
    out = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    out.print(panel.render(NOON + seconds, width))
    return out.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def started() -> RunPanel:
    panel = RunPanel()
    panel.apply(at(0, "start", name="tiny", folder="/runs/tiny"))
    return panel


def training() -> RunPanel:
    panel = started()
    panel.apply(at(9, "train_start", 0, total_steps=200))
    for step in range(1, 101):
        panel.apply(logged(10 + step / 2, step))
    panel.apply(at(60, "evaluation", 100, metrics={"validation_loss": 3.25}))
    panel.apply(at(61, "checkpoint", 100, folder="/runs/tiny/checkpoints/step-00000100"))
    return panel


def test_the_panel_of_a_training_run() -> None:
    shown = text(training(), 65, 100)
    for piece in (
        "100 / 200",
        "50.0%",
        "0:00:50 left",  # 100 steps at two a second
        "loss        3.000",
        "█▇",
        "validation  3.250     at step 100, the best so far",
        "lr          3.00e-04",
        "tokens/s    12,346",
        "grad norm   0.8123",
        "data wait   1.2%",
        "memory      1.2 GB",
        "elapsed     0:01:05",
        "checkpoint  step 100, 0:00:04 ago",
        "restarts    0",
        "now         training",
    ):
        assert piece in shown, (piece, shown)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_the_panel_fits_every_width_and_does_not_move(width: int) -> None:
    """No line is longer than the terminal, and labels keep their places when values change."""
    one, other = training(), training()
    other.apply(logged(61, 101, loss=123456.789, grad_norm=1e-9, tokens_per_second=9.0))
    other.apply({"event": "progress", "task": "evaluating", "done": 3, "total": 40, "seconds": 2.0})
    first, second = text(one, 65, width).splitlines(), text(other, 100_000, width).splitlines()
    assert {len(line) for line in first + second} == {min(width, 120)}
    assert len(first) == len(second), "the height does not change"
    for label in ("step ", "now ", "loss ", "tokens/s", "checkpoint", "restarts"):
        place = [(i, line.find(label)) for i, line in enumerate(first) if label in line]
        assert place == [(i, line.find(label)) for i, line in enumerate(second) if label in line]
    assert "evaluating" in "".join(second)


def test_phases_restarts_and_the_curve_after_a_restart() -> None:
    panel = started()
    panel.apply(at(0, "phase", phase="preparing data"))
    assert "now         preparing data" in text(panel, 3, 80)
    panel.apply({"event": "progress", "task": "tokenizing rows", "done": 30, "total": 120, "seconds": 10.0})
    assert "tokenizing rows" in text(panel, 3, 80)
    assert " 25.0%  0:00:30 left" in text(panel, 3, 80)
    panel.apply({"event": "progress"})
    assert "tokenizing" not in text(panel, 3, 80)

    panel = training()
    panel.apply(at(70, "restart", reason="worker 1 died: its process was killed", restarts=1))
    panel.apply(at(71, "phase", phase="starting 2 workers"))
    shown = text(panel, 72, 100)
    assert "restarts    1, the last: worker 1 died: its process was killed" in shown
    assert "now         starting 2 workers" in shown
    panel.apply(at(75, "train_start", 40, total_steps=200))
    assert "40 / 200" in text(panel, 76, 100)
    assert len(panel._curve) == 40, "steps that are trained again replace their points"


def test_phases_of_the_heartbeat_are_shown_when_they_last() -> None:
    panel = training()
    panel.apply({"event": "heartbeat", "phase": "checkpoint", "seconds": 0.2})
    assert "now         training" in text(panel, 66, 80), "no flicker"
    panel.apply({"event": "heartbeat", "phase": "checkpoint", "seconds": 1.2})
    assert "now         saving a checkpoint" in text(panel, 66, 80)


def test_rewards_and_a_sample() -> None:
    panel = started()
    panel.apply(at(9, "train_start", 0, total_steps=200))
    panel.apply(logged(10, 1, reward=0.25, kl=0.0123, length=17.5))
    panel.apply({"event": "sample", "step": 1, "response": "two\nlines", "reward": 1.0})
    shown = text(panel, 11, 100)
    for piece in ("reward      0.2500", "KL          0.0123", "length      17.50", "loss        4.980"):
        assert piece in shown, (piece, shown)
    assert "sample      1.000  'two lines' at step 1" in shown


def test_the_curve_of_a_long_run_is_bounded() -> None:
    panel = started()
    for step in range(1, 10_001):
        panel.apply(logged(step, step))
    assert len(panel._curve) <= 2048
    line = next(line for line in text(panel, 10_000, 120).splitlines() if "loss" in line)
    assert line.count("█") >= 1
    assert line.count("▁") >= 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [(2.34567, "2.346"), (0.0, "0.0000"), (123.456, "123.5"), (1e-9, "1.00e-09"), (None, "–"), (float("nan"), "nan")],
)
def test_numbers(value: Any, shown: str) -> None:
    assert terminal.number(value) == shown


def test_durations() -> None:
    assert [terminal.duration(s) for s in (-3, 5, 3661, 90061)] == ["0:00:00", "0:00:05", "1:01:01", "1d 01:01:01"]


def test_progress_of_nested_tasks() -> None:
    assert current() is None
    with Task("outer", 10) as outer:
        for item in track(range(3), "inner", 3):
            assert (current().task, current().done) == ("inner", item)  # type: ignore[union-attr]
        outer.advance(5)
        found = current()
        assert found is not None
        assert (found.task, found.done, found.total) == ("outer", 5, 10)
        assert found.left == pytest.approx(found.seconds, rel=0.5)
        assert current(at_least=100) is None
    assert current() is None


class Talks(Callback):
    """A callback that prints."""

    main_only = True

    def on_step_end(self, state: RunState) -> None:
        print(f"user code at step {state.step}")


@pytest.fixture
def format_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(terminal.VARIABLE, "json")


def test_json_lines(make_config: MakeConfig, capsys: pytest.CaptureFixture[str], format_json: None) -> None:
    """Every line of the output is an event, also what user code prints."""
    stdout = sys.stdout
    train(make_config("run.max_steps=2", callbacks=["console", "jsonl", f"{__name__}:Talks"]))
    assert sys.stdout is stdout
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = [row["event"] for row in rows if row["event"] != "phase"]
    assert found == [
        "start",
        "train_start",
        "output",
        "log",
        "output",
        "evaluation",
        "log",
        "checkpoint",
        "attempt",
        "end",
    ]
    assert [row["text"] for row in rows if row["event"] == "output"] == ["user code at step 1", "user code at step 2"]
    log = next(row for row in rows if row["event"] == "log")
    assert log["metrics"]["loss"] > 0
    assert log["telemetry"]["host_memory"] > 1e7
    assert 0 <= log["telemetry"]["data_wait"] <= 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_panel_leaves_prints_and_a_summary(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a terminal: the panel is drawn and removed; lines of user code are above it; a summary remains."""
    screen = Terminal()
    drawn = Console(file=screen, force_terminal=True, width=100, highlight=False, soft_wrap=True, color_system=None)
    monkeypatch.setattr(terminal, "console", drawn)
    monkeypatch.setattr(console_module, "console", drawn)
    monkeypatch.setenv("TERM", "xterm")
    folder = train(make_config("run.max_steps=3", callbacks=["console", "jsonl", f"{__name__}:Talks"])).folder
    shown = screen.getvalue()
    assert "╭─ run ─" in shown
    for step in (1, 2, 3):
        assert shown.count(f"user code at step {step}") == 1
    summary = shown[shown.rindex("run: done, 3 of 3 steps in 0:0") :]
    assert f"checkpoint {folder}/checkpoints/step-00000003" in summary
    assert "validation loss" in summary
    assert "╭" not in summary


@pytest.mark.parametrize(
    ("environment", "config", "expected"),
    [
        ({}, "auto", "panel"),
        ({"TERM": "dumb"}, "auto", "plain"),
        ({"NO_COLOR": "1"}, "auto", "panel"),
        ({terminal.VARIABLE: "plain"}, "panel", "plain"),
        ({terminal.VARIABLE: "json"}, "auto", "json"),
        ({}, "plain", "plain"),
    ],
)
def test_the_format(environment: dict[str, str], config: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(terminal.VARIABLE, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(terminal, "console", Console(file=io.StringIO(), force_terminal=True))
    assert terminal.log_format(config) == expected
    monkeypatch.setattr(terminal, "console", Console(file=io.StringIO()))
    assert terminal.log_format("auto") in ("plain", environment.get(terminal.VARIABLE)), "a file gets lines"


def test_no_colour_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    out = Console(file=io.StringIO(), force_terminal=True, width=80)
    out.print(training().render(NOON, 80))
    assert "\x1b[36m" not in out.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["print", "progress"])
def test_the_former_names_are_refused_with_the_new_one(make_config: MakeConfig, name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown name '{name}'; did you mean console"):
        make_config(callbacks=[name])


def test_a_manually_constructed_run_prints_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ConsoleCallback()
    state = RunState(step=0, total_steps=2, folder="/runs/x")
    shown.on_train_start(state)
    state.step = 2
    shown.on_log(state, {"loss": 1.5})
    shown.on_checkpoint(state, "/runs/x/checkpoints/step-00000002")
    shown.on_train_end(state)
    shown.close()
    assert capsys.readouterr().out.splitlines() == [
        "training 2 steps in /runs/x",
        "step 2/2  epoch 0  loss 1.5",
        "saved /runs/x/checkpoints/step-00000002",
        "done: 2 steps",
    ]


def test_long_tasks_print_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console_module, "_PROGRESS_SECONDS", 0.6)
    with progress_shown(), Task("writing weights", 4) as task:
        for _ in range(4):
            time.sleep(0.4)
            task.advance()
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("writing weights: ") for line in lines)
    assert lines[0].endswith(" left")


def test_the_page_shows_what_is_rendered() -> None:
    """docs/terminal.md: each capture of a real terminal equals the panel that its recorded events give."""
    page = (ROOT / "docs" / "terminal.md").read_text()
    folder = Path(__file__).parent / "captures"
    files = sorted(folder.glob("*.jsonl"))
    assert [path.stem for path in files] == ["after-a-kill", "tokenizing", "training"]
    for path in files:
        *rows, last = (json.loads(line) for line in path.read_text().splitlines())
        panel = RunPanel()
        for row in rows:
            panel.apply(row)
        out = Console(width=last["width"], file=io.StringIO(), color_system=None)
        out.print(panel.render(last["now"], last["width"]))
        assert f"```text\n{out.file.getvalue()}```" in page, path.name  # type: ignore[attr-defined]
