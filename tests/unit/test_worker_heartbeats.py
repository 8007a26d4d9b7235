"""Heartbeats through an actor: its state runs without Ray, and the files of the driver are those that others read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

from myllm_ray.engine.liveness.heartbeat import (
    Heartbeat,
    clear,
    heartbeat_folder,
    read_heartbeat,
    read_heartbeats,
    read_requests,
    request,
    write_heartbeats,
)
from myllm_ray.orchestration.heartbeats import HeartbeatBoard, HeartbeatLink, WorkerHeartbeats


def beat(rank: int, step: int = 1) -> dict[str, Any]:
    return {"rank": rank, "step": step, "phase": "forward"}


def test_a_board_answers_with_the_requests_and_keeps_the_last_heartbeats() -> None:
    board = HeartbeatBoard()
    assert board.exchange(1, {"stop": "SIGTERM"}) == {}
    assert board.beat(1, beat(0)) == {"stop": "SIGTERM"}
    board.beat(1, beat(1))
    board.beat(1, beat(1, step=2))
    assert board.exchange(1, {}) == {0: beat(0), 1: beat(1, step=2)}
    assert board.beat(1, beat(0)) == {}, "a request that was withdrawn"
    board.ended(1, 1)
    assert board.exchange(1, {}) == {0: beat(0)}


def test_calls_of_a_group_that_has_ended_change_nothing() -> None:
    board = HeartbeatBoard()
    board.exchange(1, {})
    board.beat(1, beat(3))
    assert board.exchange(2, {"preempt": "resize"}) == {}
    assert board.beat(1, beat(3)) == {}, "a request to the new group is none to the old one"
    board.beat(2, beat(0))
    board.ended(1, 0)
    assert board.exchange(2, {}) == {0: beat(0)}


def test_a_thousand_ranks_have_two_files(tmp_path: Path) -> None:
    write_heartbeats(tmp_path, [beat(rank) for rank in range(1000)])
    assert sorted(p.name for p in heartbeat_folder(tmp_path).iterdir()) == ["rank-00000.json", "ranks.json"]
    assert read_heartbeats(tmp_path) == {rank: beat(rank) for rank in range(1000)}
    assert read_heartbeat(tmp_path) == beat(0)
    write_heartbeats(tmp_path, [beat(7)])  # rank 0 has ended
    assert read_heartbeats(tmp_path) == {7: beat(7)}
    request(tmp_path, "stop", "SIGTERM")
    clear(tmp_path)
    assert [p.name for p in heartbeat_folder(tmp_path).iterdir()] == ["stop"]


@pytest.mark.parametrize(("ranks", "seconds"), [(1, 0.5), (250, 0.5), (500, 1.0), (1000, 2.0), (4000, 2.0)])
def test_many_ranks_send_less_often(ranks: int, seconds: float) -> None:
    assert HeartbeatLink(None, 1, ranks).seconds == seconds


def test_requests_of_a_folder(tmp_path: Path) -> None:
    write_heartbeats(tmp_path, [beat(0)])
    for name, text in {"stop": "SIGTERM", "amend-1": "{}", "amended-1": "{}", "stacks-x": "", "abort": "sweep"}.items():
        request(tmp_path, name, text)
    assert read_requests(tmp_path) == {"stop": "SIGTERM", "amend-1": "{}", "stacks-x": ""}


class Recorded:
    """A channel in memory."""

    seconds = 0.01

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.asked: dict[str, str] = {}
        self.closed = False

    def send(self, beat: dict[str, Any]) -> None:
        self.sent.append(beat)

    def requests(self) -> dict[str, str]:
        return self.asked

    def close(self) -> None:
        self.closed = True


def test_a_heartbeat_uses_its_channel_and_writes_no_file(tmp_path: Path) -> None:
    channel = Recorded()
    heartbeat = Heartbeat(tmp_path, 3, {"node": "n1"}, channel=channel)
    try:
        heartbeat.enter("backward", 8)
        while not channel.sent or channel.sent[-1]["phase"] != "backward":
            pass
        channel.asked = {"preempt": "resize", "amend-1": "{}"}
        while heartbeat.preempt is None or heartbeat.amend is None:
            pass
    finally:
        heartbeat.close()
    assert (channel.sent[-1]["rank"], channel.sent[-1]["step"], channel.sent[-1]["node"]) == (3, 8, "n1")
    assert heartbeat.preempt == "resize"
    assert channel.closed
    assert not heartbeat_folder(tmp_path).exists()


class Dead:
    """A board whose calls fail, as those of an actor that can't be started again."""

    class exchange:
        @staticmethod
        def remote(*_: object) -> None:
            raise ray.exceptions.RayActorError


def test_without_its_actor_no_rank_looks_silent(tmp_path: Path) -> None:
    """Regression: the last heartbeats stayed, and a rank counted as silent after `hang_seconds`."""
    heartbeats = WorkerHeartbeats(Dead, tmp_path)
    heartbeats._beats = {0: beat(0), 1: beat(1)}
    heartbeats._work()
    assert heartbeats.read() == {}
    assert read_heartbeats(tmp_path) == {}
