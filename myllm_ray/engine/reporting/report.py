"""The file `report.html` of a run: its curves, restarts, samples, data, config and environment on one page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

log = logging.getLogger(__name__)


class ReportCallback(Callback):
    """Writes `report.html` when the run ends, also after an error.

    The process that started the run writes the page, after the last record of the run. Without such a process, as in a
    TorchTrainer of the user, rank 0 does. A page that can't be written is one warning; the run is not affected.
    """

    main_only = True
    on_driver = True

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        self._attempted = False

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._folder = Path(event["folder"])
        elif event["event"] == "attempt":
            self._attempted = True  # otherwise the run was refused, and the folder may be that of another run
        elif event["event"] == "end" and self._folder is not None and self._attempted:
            write_report(self._folder)

    def on_train_end(self, state: RunState) -> None:
        self._write(state, "done" if state.exit is None else f"{state.exit.kind}: {state.exit.reason}")

    def on_exception(self, state: RunState, error: BaseException) -> None:
        self._write(state, f"failed: {type(error).__name__}: {error}")

    def _write(self, state: RunState, end: str) -> None:
        if state.folder and self._folder is None:
            write_report(Path(state.folder), end)


def write_report(folder: Path, end: str | None = None) -> Path | None:
    """Writes `report.html` into a run's folder.

    Args:
        folder: the run's folder.
        end: how the last attempt ended, if it is not recorded yet.

    Returns:
        The path of the page, or None if it failed, which is logged.
    """
    try:
        from myllm_ray.engine.reporting.run_page import write_run_page

        return write_run_page(folder, end=end)
    except Exception as error:  # a report must not change how a run ends
        log.warning("%s/report.html was not written: %s: %s", folder, type(error).__name__, error)
        return None
