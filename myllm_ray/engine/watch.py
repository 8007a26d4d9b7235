"""Who hangs: reads the ranks' signs of life (`pulse.py`) and names the rank and the phase that the others wait for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.checkpoint import CheckpointManager
from myllm_ray.engine.pulse import PHASES, going_on, pulse_folder, read_beats, request

_SILENT_SECONDS = 60.0
"""Silence after which a run that was asked to stop has ended without saying so."""


@dataclass(frozen=True)
class Lag:
    """A rank that has not gone on for too long."""

    rank: int
    step: int
    phase: str
    seconds: float
    silent: bool
    """It gives no sign of life: its process is stopped, or its machine is away."""
    stacks: str
    """Folder with the stacks of all ranks that could still write them."""
    beat: dict[str, Any]

    def __str__(self) -> str:
        how = "gives no sign of life" if self.silent else "has not gone on"
        return (f"rank {self.rank} {how} for {self.seconds:.0f} s, in phase {self.phase} of step {self.step} (pid "
                f"{self.beat.get('pid')} on {self.beat.get('host')}); stacks of all ranks: {self.stacks}")


class Watch:
    """Looks at a run from outside; `look` as often as you like.

    Args:
        run: the run's folder.
        hang_seconds: how long a rank may stay in one phase, or be silent; None: for ever.
    """

    def __init__(self, run: str | Path, hang_seconds: float | None):
        self._run, self._most = Path(run), hang_seconds
        self._heard: dict[int, tuple[Any, float]] = {}

    def look(self) -> Lag | None:
        """The rank that hangs, after its and the others' stacks were asked for; None while all go on."""
        if self._most is None:
            return None
        now, beats, silence = time.monotonic(), read_beats(self._run), {}
        for rank, beat in beats.items():
            sign = (beat.get("pid"), beat.get("beat"))
            if self._heard.get(rank, (None, 0.0))[0] != sign:
                self._heard[rank] = (sign, now)  # by our own clock: the ranks' clocks may differ
            silence[rank] = now - self._heard[rank][1]
        if not beats:
            return None
        culprit = max(beats, key=lambda r: silence[r])
        silent = silence[culprit] >= self._most
        if not silent:
            culprit = min(beats, key=lambda r: _progress(beats[r]))
        beat = beats[culprit]
        seconds = silence[culprit] if silent else float(beat.get("seconds", 0.0))
        if seconds < self._most or beat.get("phase") == "end":
            return None
        name = f"step-{int(beat['step']):08d}-rank-{culprit:05d}"
        request(self._run, f"stacks-{name}", "")
        return Lag(culprit, int(beat["step"]), str(beat["phase"]), seconds, silent, str(self._run / "stacks" / name), beat)


def _progress(beat: dict[str, Any]) -> tuple[int, bool, int, float]:
    """The rank that is least far is the one that the others wait for; of several, one that is in no collective."""
    phase = beat.get("phase")
    return (int(beat.get("step", 0)), bool(beat.get("waits")), PHASES.index(phase) if phase in PHASES else 0,
            -float(beat.get("seconds", 0.0)))


def stop(run: Path, seconds: float) -> str | None:
    """Ask a run to save and end, and wait for that; returns its newest checkpoint, or None if it has not ended in time.

    Raises:
        ConfigError: no run is going on there.
    """
    if not run.is_dir():
        raise ConfigError(f"{run} is not the folder of a run")
    if going_on(run) is None:
        raise ConfigError(f"no run is going on in {run}")
    request(run, "stop", "myllm-ray stop")
    until = time.monotonic() + seconds
    heard = time.monotonic()
    while time.monotonic() < until:
        if going_on(run) is not None:
            heard = time.monotonic()
        # Killed processes leave the folder behind; one that writes a checkpoint may be silent for a moment.
        if not pulse_folder(run).exists() or time.monotonic() - heard > _SILENT_SECONDS:
            newest = CheckpointManager(folder=run / "checkpoints").all()
            return str(newest[-1]) if newest else "none"
        time.sleep(0.2)
    return None
