"""The records of a run: `metrics.jsonl`, `ledger.jsonl` and `samples.jsonl`.

A step that is trained again after a resume replaces its earlier records.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from myllm_ray.common.files import JSONLines, write_atomic
from myllm_ray.common.types import Position, RunState
from myllm_ray.engine.callbacks import Callback

_SUMMARY_SECONDS = 30.0


class MetricRanges:
    """The first, last, lowest and highest value of each metric, each as [value, step]."""

    def __init__(self) -> None:
        self.step = 0
        self.found: dict[str, dict[str, list[float]]] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a line of `metrics.jsonl`."""
        self.step = int(row.get("step", 0))
        for name, value in row.items():
            if name in ("step", "epoch", "time") or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            new = [float(value), self.step]
            seen = self.found.setdefault(name, {"first": new, "min": new, "max": new})
            seen["last"] = new
            if value < seen["min"][0]:
                seen["min"] = new
            if value > seen["max"][0]:
                seen["max"] = new


class JSONLCallback(Callback):
    """Writes `metrics.jsonl`, with one object per logged step, and `summary.json`.

    The summary has the first, last, lowest and highest value of each metric. A list of many runs reads it instead of
    the long file. It is written every half minute and at the end; after a kill, the lines since then are in
    `metrics.jsonl` only.
    """

    main_only = True

    def __init__(self) -> None:
        self._file: JSONLines | None = None

    def on_train_start(self, state: RunState) -> None:
        if state.folder:
            path = Path(state.folder) / "metrics.jsonl"
            self._ranges, self._summary = MetricRanges(), path.with_name("summary.json")

            def keep(row: dict[str, Any]) -> bool:
                # Step 0 is the evaluation before training; a run that starts at step 0 writes it again.
                kept = row.get("step", 0) <= state.step and state.step > 0
                if kept:
                    self._ranges.add(row)  # here, so that a long file is read once
                return bool(kept)

            self._file = JSONLines(path, keep)
            self._written = time.monotonic()

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        if self._file:
            row = {"step": state.step, "epoch": state.epoch, **metrics}
            self._file.write(row)
            self._ranges.add(row)
            if time.monotonic() - self._written > _SUMMARY_SECONDS:
                self._write_summary()

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
            self._write_summary()

    def _write_summary(self) -> None:
        self._written = time.monotonic()
        summary = {"step": self._ranges.step, "metrics": self._ranges.found}
        with suppress(OSError):  # a full disk must not end a run because of a summary
            write_atomic(self._summary, json.dumps(summary), durable=False)


class Ledger:
    """Writes `ledger.jsonl`: for each step the epoch, its first row, and a hash of the token ids of all ranks.

    Args:
        folder: the run's folder; None: nothing is written.
        step: the step that the run resumes from; records of later steps are removed.
    """

    def __init__(self, folder: str | None, step: int):
        self._file = (
            JSONLines(Path(folder) / "ledger.jsonl", keep=lambda row: row.get("step", 0) <= step) if folder else None
        )

    def write(self, step: int, position: Position, rows: int, fingerprint: int, left_out: str | None = None) -> None:
        """Writes the record of a step.

        Args:
            step: the step, counted from 1.
            position: the position in the data at which the global batch begins.
            rows: number of rows of the global batch.
            fingerprint: sum of the ranks' `Batch.fingerprint`.
            left_out: why the step changed no weight, or None.
        """
        if self._file:
            # The mask reduces the sum modulo 2**64, also if the all-reduce of int64 has wrapped to a negative value.
            self._file.write(
                {
                    "step": step,
                    "epoch": position.epoch,
                    "row": position.row,
                    "rows": rows,
                    "tokens_hash": f"{fingerprint & (2**64 - 1):016x}",
                    **({"left_out": left_out} if left_out else {}),
                }
            )

    def close(self) -> None:
        if self._file:
            self._file.close()


class SampleTable:
    """Writes `samples.jsonl`: answers of the model, one object per answer, with the last step of their batch.

    Args:
        folder: the run's folder; None: nothing is written.
        step: the step that the run resumes from; records of later steps are removed.
        every: steps between two batches that are written; None: nothing is written.
    """

    def __init__(self, folder: str | None, step: int, every: int | None):
        self._path = Path(folder) / "samples.jsonl" if folder and every else None
        self._file: JSONLines | None = None
        self._step, self._every = step, every or 1

    def write(self, since: int, step: int, samples: list[dict[str, Any]]) -> None:
        """Writes the samples of a batch if it is the first of the run or reaches a multiple of `every`.

        Args:
            since: the last step before the batch; its steps are since + 1 to `step`.
            step: the last step of the batch.
            samples: JSON-like objects.
        """
        if self._path is None or not samples or (since and step // self._every == since // self._every):
            return
        if self._file is None:
            self._file = JSONLines(self._path, keep=lambda row: row.get("step", 0) <= self._step)
        for sample in samples:
            self._file.write({"step": step, **sample})

    def close(self) -> None:
        if self._file:
            self._file.close()
