"""Records the attempts of a run that no supervisor observes: without Ray, or in a TorchTrainer of the user."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from myllm_ray.common import distributed
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import UserError
from myllm_ray.engine.environment import write_attempt
from myllm_ray.engine.reporting.events import EventLog


class RecordedAttempt:
    """Context manager around one attempt. At its end it writes `attempts.jsonl` and emits the event `attempt`.

    Args:
        folder: the run's folder.
        events: the event log of this process.
    """

    def __init__(self, folder: Path, events: EventLog):
        self._folder, self._events = folder, events
        self._end, self._step = "done", None

    def __enter__(self) -> RecordedAttempt:
        return self

    def ended(self, summary: dict[str, Any]) -> None:
        """Sets the result of the attempt, the summary of `worker.run_worker`."""
        exit = summary["exit"]
        self._end, self._step = "done" if exit is None else f"{exit.kind}: {exit.reason}", summary["step"]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            said = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._end, self._step = mask_text(f"failed: {said}{' '.join(str(error).split())[:300]}"), None
        row = write_attempt(self._folder, self._end, distributed.world_size(), self._step)
        self._events.emit("attempt", row["to_step"], **row)
