"""Heartbeats of a run on Ray: from the workers through an actor to the driver, and requests on the way back.

The reply to a heartbeat contains the requests to the run (`engine/liveness/heartbeat.py`), so no worker lists a folder
for them. The driver is the only process that reads the files of requests. It writes the heartbeats for other processes,
to two files, independent of the number of ranks.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from myllm_ray.engine.liveness.heartbeat import read_requests, write_heartbeats

Beat = dict[str, Any]
"""A heartbeat; see `engine/liveness/heartbeat.py`."""
_SECONDS = 0.5
"""Time between two heartbeats of a rank, and between two exchanges with the driver, in seconds."""
_MOST_PER_SECOND = 500
"""Heartbeats of all ranks together, per second. With more ranks each sends fewer, but at least one in two seconds: a
run whose heartbeats do not change for two seconds counts as ended (`find_activity`)."""
_LOST_SECONDS = 10.0
"""Time without a reply after which a rank sends its next heartbeat, in seconds."""


class HeartbeatBoard:
    """The last heartbeat of each rank and the requests to the ranks, in a Ray actor."""

    def __init__(self) -> None:
        self._group = 0
        self._beats: dict[int, Beat] = {}
        self._requests: dict[str, str] = {}

    def beat(self, group: int, beat: Beat) -> dict[str, str]:
        """Called by a rank: stores its heartbeat and returns the requests.

        Args:
            group: the number of the rank's worker group. A group that has ended may still have calls on the way.
            beat: the heartbeat.
        """
        if group != self._group:
            return {}
        self._beats[int(beat["rank"])] = beat
        return self._requests

    def ended(self, group: int, rank: int) -> None:
        """Called by a rank that has ended."""
        if group == self._group:
            self._beats.pop(rank, None)

    def exchange(self, group: int, requests: dict[str, str]) -> dict[int, Beat]:
        """Called by the driver: stores the requests and returns the heartbeats by rank.

        Args:
            group: the number of the present worker group. With a new number the stored heartbeats are dropped.
            requests: all requests at present, by name.
        """
        if group != self._group:
            self._group, self._beats = group, {}
        self._requests = requests
        return self._beats


class HeartbeatLink:
    """What the workers of a group need to send their heartbeats. It is pickled.

    Args:
        board: handle of the actor, a `HeartbeatBoard`.
        group: the number of the group.
        ranks: the number of workers.
    """

    def __init__(self, board: Any, group: int, ranks: int):
        self._board, self._group = board, group
        self.seconds = min(2.0, max(_SECONDS, ranks / _MOST_PER_SECOND))

    def of_rank(self, rank: int) -> ActorChannel:
        """Returns the channel of a rank, in the process of the rank."""
        return ActorChannel(self._board, self._group, rank, self.seconds)


class ActorChannel:
    """Sends the heartbeats of a rank and receives the requests (`engine.liveness.heartbeat.HeartbeatChannel`).

    No call waits: the requests are those of the last reply. While a reply is missing nothing is sent, so a busy actor
    does not accumulate calls.
    """

    def __init__(self, board: Any, group: int, rank: int, seconds: float):
        self.seconds = seconds
        self._board, self._group, self._rank = board, group, rank
        self._pending: Any = None
        self._sent = 0.0
        self._requests: dict[str, str] = {}

    def send(self, beat: Beat) -> None:
        now = time.monotonic()
        self._receive()
        if self._pending is None or now - self._sent >= _LOST_SECONDS:
            with suppress(ray.exceptions.RayError):  # the actor is starting again
                self._pending, self._sent = self._board.beat.remote(self._group, beat), now

    def requests(self) -> dict[str, str]:
        self._receive()
        return self._requests

    def close(self) -> None:
        with suppress(ray.exceptions.RayError):
            self._board.ended.remote(self._group, self._rank)

    def _receive(self) -> None:
        """Takes the reply to the last heartbeat if it has arrived."""
        if self._pending is None or not ray.wait([self._pending], timeout=0)[0]:
            return
        with suppress(ray.exceptions.RayError):
            self._requests = ray.get(self._pending)
        self._pending = None


class WorkerHeartbeats:
    """The driver's side: the heartbeats of the present worker group, fetched by a thread.

    Args:
        board: handle of the actor, a `HeartbeatBoard`.
        folder: the run's folder.
    """

    def __init__(self, board: Any, folder: Path):
        self._board, self._folder = board, folder
        self._group = 0
        self._beats: dict[int, Beat] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="worker-heartbeats", daemon=True)

    def __enter__(self) -> WorkerHeartbeats:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def new_group(self, ranks: int) -> HeartbeatLink:
        """Begins a worker group. Heartbeats of the previous one are dropped, also those that are on the way."""
        with self._lock:
            self._group, self._beats = self._group + 1, {}
            return HeartbeatLink(self._board, self._group, ranks)

    def read(self) -> dict[int, Beat]:
        """Returns the last heartbeat of each rank of the present group."""
        with self._lock:
            return dict(self._beats)

    def _work(self) -> None:
        asked: tuple[int, Any] | None = None
        while not self._stop.wait(_SECONDS):
            try:
                if asked is None:
                    asked = self._group, self._board.exchange.remote(self._group, self._found_requests())
                beats: dict[int, Beat] = ray.get(asked[1], timeout=10)
            except ray.exceptions.GetTimeoutError:
                continue  # the actor is still starting, or the machine is busy: the same call is awaited again
            except ray.exceptions.ActorUnavailableError:
                asked = None  # the actor is starting again
                continue
            except ray.exceptions.RayError:
                # Ray is shutting down, or the actor can't be started again. Old heartbeats would look like ranks that
                # are silent; without heartbeats no rank counts as one that hangs.
                self._keep(self._group, {})
                return
            self._keep(asked[0], beats)
            asked = None

    def _found_requests(self) -> dict[str, str]:
        try:
            return read_requests(self._folder)
        except OSError:  # no folder of requests yet, or a storage that is unreachable for some seconds
            return {}

    def _keep(self, group: int, beats: dict[int, Beat]) -> None:
        # With the lock: once `new_group` has returned, no heartbeat of the previous group is written.
        with self._lock:
            if group == self._group and (beats or self._beats):
                self._beats = beats
                with suppress(OSError):
                    write_heartbeats(self._folder, beats.values())
