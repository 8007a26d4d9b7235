"""The panel in a real terminal: a run in tmux, read from its window."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import pytest
from conftest import LLAMA, ROOT

from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

sys.path.append(str(ROOT / "tools"))
from capture_panel import WIDTH, Tmux, panel_of

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")]


def test_a_run_in_a_terminal(tmp_path: Path) -> None:
    """The panel while tokenizing and training; prints of user code above it, all of them; the summary at the end."""
    for number in range(40):
        rows = [{"text": f"document {number} {i} " * 5} for i in range(10)]
        (tmp_path / f"rows-{number:02d}.json").write_text(json.dumps(rows))
    config = {
        "trainer": "pretrain",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": f"{tmp_path}/rows-*.json", "format": "e2e.test_terminal:slowly"},
            "sequence_length": 64,
            "validation": {"split": 0.1},
        },
        "batch": {"global_size": 8, "micro_size": 8},
        "run": {"name": "watched", "storage": str(tmp_path / "runs"), "max_steps": 30},
        "evaluation": {"every_steps": 10},
        "checkpoint": {"every_steps": 10},
        "callbacks": ["console", "jsonl", "e2e.test_terminal:Slowly"],
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    command = shlex.join([sys.executable, "-m", "myllm_ray.cli", "train", str(path)])
    window = Tmux(tmp_path / "s", f"cd {ROOT / 'tests'}; PYTHONPATH={ROOT} {command}; echo code $?; sleep 600")
    try:
        shown = panel_of(window.until(lambda text: re.search(r"tokenizing .*[1-9]\d\.\d% .* left", text), 240))
        assert re.search(r"now +tokenizing rows- +━+─+ +\d+\.\d%  \d:\d\d:\d\d left", shown)
        assert re.search(r"elapsed +0:0\d:\d\d", shown)
        shown = panel_of(window.until(lambda text: re.search(r"step +2\d / 30", text), 240))
        for pattern in (
            r"2\d / 30 .* \d\d\.\d%  0:0\d:\d\d left",
            r"now +(training|evaluating|saving)",
            r"loss +\d\.\d{3} +[▁▂▃▄▅▆▇█]{8,}",
            r"validation +\d\.\d{3} +at step [12]0,",
            r"tokens/s +[\d,]+",
            r"memory +\d",
            r"checkpoint +step [12]0, 0:0\d:\d\d ago",
            r"restarts +0",
        ):
            assert re.search(pattern, shown), (pattern, shown)
        assert {len(line) for line in shown.splitlines()} == {WIDTH}
        assert "\x1b[36m" in window.text("-e"), "the curve has a colour"
        window.until(lambda text: "code 0" in text, 240)
        whole = window.text("-S", "-")
    finally:
        window.end()
    lines = whole.splitlines()
    assert [line for line in lines if line.startswith("user code")] == [f"user code at step {i}" for i in range(1, 31)]
    assert "╭" not in whole, "the panel is gone"
    assert re.search(r"watched: done, 30 of 30 steps in 0:0\d:\d\d", whole)


def slowly(row: dict[str, str]) -> list[tuple[str, bool]]:
    """A format that takes a while, so that tokenizing can be watched."""
    time.sleep(0.02)
    return [(row["text"], True)]


class Slowly(Callback):
    """Prints, and takes a while per step."""

    main_only = True

    def on_step_end(self, state: RunState) -> None:
        time.sleep(0.3)
        print(f"user code at step {state.step}")
