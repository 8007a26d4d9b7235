"""The console of a sweep in its three formats."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from myllm_ray.config.sweep import validate_sweep
from myllm_ray.engine.reporting import terminal
from myllm_ray.orchestration.sweeps import console as module
from myllm_ray.orchestration.sweeps.console import SweepConsole


def row(trial: str, status: str, step: int, **more: Any) -> dict[str, Any]:
    values = {"optimizer.lr": 1e-3 * (1 + int(trial))}
    return {"trial": trial, "values": values, "status": status, "score": 2.5, "step": step, "seconds": 1.0} | {
        "error": None,
        "folder": f"/{trial}",
        "reports": [],
        **more,
    }


@pytest.fixture
def sweep() -> Any:
    return validate_sweep(
        {
            "base": {
                "trainer": "sft",
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": {"kind": "bytes"},
                "data": {"train": {"path": "rows.json", "format": "instruction"}, "validation": {"split": 0.1}},
                "run": {"max_steps": 10},
            },
            "space": {"optimizer.lr": {"loguniform": [1e-5, 1e-2]}},
            "metric": "validation_loss",
            "trials": 2,
        }
    )


def shown(monkeypatch: pytest.MonkeyPatch, sweep: Any, kind: str, terminal_: bool) -> str:
    """Returns what the console prints while two trials run."""
    out = Console(file=io.StringIO(), force_terminal=terminal_, width=100, color_system=None, soft_wrap=True)
    monkeypatch.setattr(terminal, "console", out)
    monkeypatch.setattr(module, "console", out)
    monkeypatch.setenv("TERM", "xterm")
    if kind:
        monkeypatch.setenv(terminal.VARIABLE, kind)
    else:
        monkeypatch.delenv(terminal.VARIABLE, raising=False)
    with SweepConsole(sweep, 2) as display:
        state = row("0000", "running", 1)
        display.update(state)
        for step in (2, 3):
            display.update(state | {"step": step})
        display.update(row("0001", "failed", 1, error="out of memory"))
        display.update(row("0000", "done", 10))
    return str(out.file.getvalue())  # type: ignore[attr-defined]


def test_a_terminal_shows_the_table(monkeypatch: pytest.MonkeyPatch, sweep: Any) -> None:
    text = shown(monkeypatch, sweep, "", True)
    last = text[text.rindex("of 2 trials") :]
    for piece in ("optimizer.lr", "validation_loss", "0000", "done", "failed: out of memory"):
        assert piece in last, (piece, last)


def test_a_file_gets_a_line_per_ended_trial(monkeypatch: pytest.MonkeyPatch, sweep: Any) -> None:
    lines = shown(monkeypatch, sweep, "", False).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["[1/2] trial 0001", "[2/2] trial 0000"]


def test_json_has_a_line_per_change_of_state(monkeypatch: pytest.MonkeyPatch, sweep: Any) -> None:
    rows = [json.loads(line) for line in shown(monkeypatch, sweep, "json", True).splitlines()]
    assert [(r["event"], r["trial"], r["status"], r["step"]) for r in rows] == [
        ("trial", "0000", "running", 1),
        ("trial", "0001", "failed", 1),
        ("trial", "0000", "done", 10),
    ]
    assert (rows[1]["error"], rows[2]["values"]) == ("out of memory", {"optimizer.lr": 1e-3})
