"""Detects hangs: reads the ranks' heartbeats (`heartbeat.py`) and finds the rank and phase that the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.liveness.heartbeat import PHASES, find_activity, heartbeat_folder, read_heartbeats, request

_SILENT_SECONDS = 60.0
"""Seconds without a heartbeat after which a run that was requested to stop counts as ended."""


@dataclass(frozen=True)
class Straggler:
    """A rank that has made no progress for too long."""

    rank: int
    step: int
    phase: str
    seconds: float
    silent: bool
    """Whether the rank sends no heartbeats: its process is stopped, or its machine is unreachable."""
    stacks: str
    """Folder for the stacks of all ranks that can still write them."""
    beat: dict[str, Any]
    """The last heartbeat of the rank."""

    def __str__(self) -> str:
        how = "has sent no heartbeat" if self.silent else "has made no progress"
        return (
            f"rank {self.rank} {how} for {self.seconds:.0f} s, in phase {self.phase} of step {self.step} (pid "
            f"{self.beat.get('pid')} on {self.beat.get('host')}); stacks of all ranks: {self.stacks}"
        )


class HangDetector:
    """Observes a run from another process or thread. `look` is called repeatedly.

    Args:
        run: the run's folder.
        hang_seconds: how long a rank may stay in one phase, or send no heartbeat; None: without limit.
        heartbeats: returns the last heartbeat of each rank; default: reads them from the run's folder.
    """

    def __init__(
        self,
        run: str | Path,
        hang_seconds: float | None,
        heartbeats: Callable[[], dict[int, dict[str, Any]]] | None = None,
    ):
        self._run, self._most = Path(run), hang_seconds
        self._heartbeats = heartbeats or (lambda: read_heartbeats(run))
        self._last_seen: dict[int, tuple[Any, float]] = {}

    def look(self) -> Straggler | None:
        """Returns the rank that hangs, or None. If a rank hangs, requests the stacks of all ranks."""
        if self._most is None:
            return None
        now, beats, silence = time.monotonic(), self._heartbeats(), {}
        for rank, beat in beats.items():
            sign = (beat.get("pid"), beat.get("beat"))
            if self._last_seen.get(rank, (None, 0.0))[0] != sign:
                self._last_seen[rank] = (sign, now)  # by the clock of this process: the ranks' clocks may differ
            silence[rank] = now - self._last_seen[rank][1]
        if not beats:
            return None
        # A silent rank is the cause even if others are in an earlier step: its heartbeat is out of date.
        culprit = max(beats, key=lambda r: silence[r])
        silent = silence[culprit] >= self._most
        if not silent:
            culprit = min(beats, key=lambda r: _progress(beats[r]))
        beat = beats[culprit]
        seconds = silence[culprit] if silent else float(beat.get("seconds", 0.0))
        # In phase `end` a rank may wait for the last checkpoint to be written.
        if seconds < self._most or beat.get("phase") == "end":
            return None
        name = f"step-{int(beat['step']):08d}-rank-{culprit:05d}"
        request(self._run, f"stacks-{name}", "")
        return Straggler(
            culprit, int(beat["step"]), str(beat["phase"]), seconds, silent, str(self._run / "stacks" / name), beat
        )


def _progress(beat: dict[str, Any]) -> tuple[int, bool, int, float]:
    """Returns a sort key; the rank with the lowest key is the one that the others wait for.

    This is the rank in the earliest step. Of several, it is one that is in no collective, then the one in the earliest
    phase, then the one that has been in its phase for the longest time.
    """
    phase = beat.get("phase")
    return (
        int(beat.get("step", 0)),
        bool(beat.get("waits")),
        PHASES.index(phase) if phase in PHASES else 0,
        -float(beat.get("seconds", 0.0)),
    )


def stop(run: Path, seconds: float) -> str | None:
    """Requests a run to save and end, and waits until it has ended.

    Args:
        run: the run's folder.
        seconds: the longest time to wait.

    Returns:
        The path of the run's newest checkpoint, "none" if it has no checkpoint, or None if it has not ended in time.

    Raises:
        ConfigError: the folder does not exist, or no run is active in it.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not the folder of a run")
    if find_activity(run) is None:
        raise ConfigError(f"no run is active in {run}")
    request(run, "stop", "myllm-ray stop")
    until = time.monotonic() + seconds
    heard = time.monotonic()
    while time.monotonic() < until:
        if find_activity(run) is not None:
            heard = time.monotonic()
        # A run removes its heartbeat folder when it ends, but killed processes do not, so silence also counts as the
        # end. A run that writes a checkpoint may be silent for some seconds.
        if not heartbeat_folder(run).exists() or time.monotonic() - heard > _SILENT_SECONDS:
            newest = CheckpointManager(folder=run / "checkpoints").all()
            return str(newest[-1]) if newest else "none"
        time.sleep(0.2)
    return None
