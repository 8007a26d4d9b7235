"""Heartbeats, requests, and detection of the rank that hangs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from myllm_ray.config import ConfigError
from myllm_ray.engine.liveness.hang_detector import HangDetector, stop
from myllm_ray.engine.liveness.heartbeat import (
    Heartbeat,
    clear,
    find_activity,
    heartbeat_folder,
    read_heartbeats,
    request,
)


def until(what: Any, seconds: float = 10.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return found


def test_a_pulse_reports_the_phase_and_reads_requests(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3, {"node": "n1"})
    try:
        heartbeat.enter("forward", 8)
        beat = until(lambda: (b := read_heartbeats(tmp_path).get(3)) and b["phase"] == "forward" and b)
        assert (beat["rank"], beat["step"], beat["node"]) == (3, 8, "n1")
        assert find_activity(tmp_path) is not None
        request(tmp_path, "stacks-x", "")
        text = until(lambda: (p := tmp_path / "stacks" / "x" / "rank-00003.txt").exists() and p.read_text())
        assert text.startswith("rank 3, step 8, phase forward for ")
        assert heartbeat.preempt is None
        request(tmp_path, "preempt", "room for 2 workers")
        assert until(lambda: heartbeat.preempt) == "room for 2 workers"
    finally:
        heartbeat.close()
    assert read_heartbeats(tmp_path) == {}
    assert find_activity(tmp_path) is None


def beat(run: Path, rank: int, **of: Any) -> None:
    heartbeat_folder(run).mkdir(exist_ok=True)
    whole = {
        "rank": rank,
        "beat": 1,
        "phase": "forward",
        "step": 5,
        "seconds": 0.1,
        "waits": False,
        "pid": 7,
        "host": "h",
        **of,
    }
    (heartbeat_folder(run) / f"rank-{rank:05d}.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(
    ("others", "culprit", "phase"),
    [
        # rank 1 sleeps in its data; the others wait in the all-reduce of the weights before their forward pass
        ([{"phase": "data", "waits": True}, {"phase": "data"}, {"phase": "data", "waits": True}], 1, "data"),
        # rank 2 sleeps in its forward pass; the other DDP ranks wait for its gradients inside autograd, where no
        # Python frame shows the wait
        ([{"phase": "backward"}, {"phase": "backward"}, {"phase": "forward"}], 2, "forward"),
        # rank 0 is one step behind
        ([{"step": 4, "phase": "optimizer"}, {"waits": True}, {"waits": True}], 0, "optimizer"),
        # rank 1 evaluates, the others wait to save
        (
            [{"phase": "checkpoint", "waits": True}, {"phase": "evaluation"}, {"phase": "checkpoint", "waits": True}],
            1,
            "evaluation",
        ),
    ],
)
def test_the_rank_that_the_others_wait_for_is_found(
    tmp_path: Path, others: list[dict[str, Any]], culprit: int, phase: str
) -> None:
    watch = HangDetector(tmp_path, hang_seconds=30)
    for rank, of in enumerate(others):
        beat(tmp_path, rank, **of)
    assert watch.look() is None
    for rank, of in enumerate(others):
        beat(tmp_path, rank, **{**of, "seconds": 31.0, "beat": 2})
    straggler = watch.look()
    assert straggler is not None
    assert (straggler.rank, straggler.phase, straggler.silent) == (culprit, phase, False)
    assert f"rank {culprit} has made no progress for 31 s, in phase {phase} of step" in str(straggler)
    assert list(heartbeat_folder(tmp_path).glob("stacks-*")), "stacks are asked for"


def test_a_rank_that_is_silent(tmp_path: Path) -> None:
    watch = HangDetector(tmp_path, hang_seconds=0.3)
    beat(tmp_path, 0, waits=True)
    beat(tmp_path, 1)
    assert watch.look() is None
    time.sleep(0.4)
    beat(tmp_path, 0, waits=True, beat=2)
    straggler = watch.look()
    assert straggler is not None
    assert (straggler.rank, straggler.silent) == (1, True)
    assert "rank 1 has sent no heartbeat" in str(straggler)


def test_no_straggler_while_all_ranks_progress(tmp_path: Path) -> None:
    watch = HangDetector(tmp_path, hang_seconds=0.2)
    for number in range(4):
        beat(tmp_path, 0, beat=number, step=number)
        assert watch.look() is None
        time.sleep(0.1)
    assert HangDetector(tmp_path, hang_seconds=None).look() is None


def test_clear_keeps_a_request_to_stop(tmp_path: Path) -> None:
    beat(tmp_path, 0)
    request(tmp_path, "stop", "SIGTERM")
    request(tmp_path, "preempt", "resize")
    clear(tmp_path)
    assert [p.name for p in heartbeat_folder(tmp_path).iterdir()] == ["stop"]


def test_stop_where_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        stop(tmp_path / "none", 1)
    with pytest.raises(ConfigError, match="no run is active in"):
        stop(tmp_path, 1)
    beat(tmp_path, 0)
    with pytest.raises(ConfigError, match="no run is active in"):
        stop(tmp_path, 1)
