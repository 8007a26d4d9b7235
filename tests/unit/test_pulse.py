"""Signs of life, requests, and naming the rank that hangs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from myllm_ray.config import ConfigError
from myllm_ray.engine.pulse import Pulse, clear, going_on, pulse_folder, read_beats, request
from myllm_ray.engine.watch import Watch, stop


def until(what: Any, seconds: float = 10.0) -> Any:
    limit = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < limit
        time.sleep(0.02)
    return found


def test_a_pulse_tells_the_phase_and_hears_requests(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path, 3, {"node": "n1"})
    try:
        pulse.enter("forward", 8)
        beat = until(lambda: (b := read_beats(tmp_path).get(3)) and b["phase"] == "forward" and b)
        assert (beat["rank"], beat["step"], beat["node"]) == (3, 8, "n1")
        assert going_on(tmp_path) is not None
        request(tmp_path, "stacks-x", "")
        text = until(lambda: (p := tmp_path / "stacks" / "x" / "rank-00003.txt").exists() and p.read_text())
        assert text.startswith("rank 3, step 8, phase forward for ")
        assert pulse.leave is None
        request(tmp_path, "leave", "room for 2 workers")
        assert until(lambda: pulse.leave) == "room for 2 workers"
    finally:
        pulse.close()
    assert read_beats(tmp_path) == {}
    assert going_on(tmp_path) is None


def beat(run: Path, rank: int, **of: Any) -> None:
    pulse_folder(run).mkdir(exist_ok=True)
    whole = {"rank": rank, "beat": 1, "phase": "forward", "step": 5, "seconds": 0.1, "waits": False, "pid": 7, "host": "h", **of}
    (pulse_folder(run) / f"rank-{rank:05d}.json").write_text(json.dumps(whole))


@pytest.mark.parametrize(("others", "culprit", "phase"), [
    # rank 1 sleeps in its data; the others wait in the sum of the weights, at the door of their forward pass
    ([{"phase": "data", "waits": True}, {"phase": "data"}, {"phase": "data", "waits": True}], 1, "data"),
    # rank 2 sleeps in a forward pass; DDP's others wait for its gradients deep in autograd, where no Python frame tells
    ([{"phase": "backward"}, {"phase": "backward"}, {"phase": "forward"}], 2, "forward"),
    # rank 0 is a step behind
    ([{"step": 4, "phase": "optimizer"}, {"waits": True}, {"waits": True}], 0, "optimizer"),
    # rank 1 evaluates, the others wait to save
    ([{"phase": "checkpoint", "waits": True}, {"phase": "evaluation"}, {"phase": "checkpoint", "waits": True}], 1, "evaluation"),
])
def test_who_the_others_wait_for(tmp_path: Path, others: list[dict[str, Any]], culprit: int, phase: str) -> None:
    watch = Watch(tmp_path, hang_seconds=30)
    for rank, of in enumerate(others):
        beat(tmp_path, rank, **of)
    assert watch.look() is None
    for rank, of in enumerate(others):
        beat(tmp_path, rank, **{**of, "seconds": 31.0, "beat": 2})
    lag = watch.look()
    assert lag is not None
    assert (lag.rank, lag.phase, lag.silent) == (culprit, phase, False)
    assert f"rank {culprit} has not gone on for 31 s, in phase {phase} of step" in str(lag)
    assert list(pulse_folder(tmp_path).glob("stacks-*")), "stacks are asked for"


def test_a_rank_that_is_silent(tmp_path: Path) -> None:
    watch = Watch(tmp_path, hang_seconds=0.3)
    beat(tmp_path, 0, waits=True)
    beat(tmp_path, 1)
    assert watch.look() is None
    time.sleep(0.4)
    beat(tmp_path, 0, waits=True, beat=2)
    lag = watch.look()
    assert lag is not None
    assert (lag.rank, lag.silent) == (1, True)
    assert "rank 1 gives no sign of life" in str(lag)


def test_all_go_on(tmp_path: Path) -> None:
    watch = Watch(tmp_path, hang_seconds=0.2)
    for number in range(4):
        beat(tmp_path, 0, beat=number, step=number)
        assert watch.look() is None
        time.sleep(0.1)
    assert Watch(tmp_path, hang_seconds=None).look() is None


def test_clear_keeps_a_request_to_stop(tmp_path: Path) -> None:
    beat(tmp_path, 0)
    request(tmp_path, "stop", "SIGTERM")
    request(tmp_path, "leave", "resize")
    clear(tmp_path)
    assert [p.name for p in pulse_folder(tmp_path).iterdir()] == ["stop"]


def test_stop_where_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        stop(tmp_path / "none", 1)
    with pytest.raises(ConfigError, match="no run is going on in"):
        stop(tmp_path, 1)
    beat(tmp_path, 0)
    with pytest.raises(ConfigError, match="no run is going on in"):
        stop(tmp_path, 1)
