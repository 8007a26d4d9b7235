"""What a run writes down about itself: `metrics.jsonl`, `ledger.jsonl`, `samples.jsonl`. Once a step, however often it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from myllm_ray.common.files import JSONLines
from myllm_ray.common.types import Position, RunState
from myllm_ray.engine.callbacks import Callback


class JSONLCallback(Callback):
    """`metrics.jsonl`: one object a logged step."""

    main_only = True

    def __init__(self) -> None:
        self._file: JSONLines | None = None

    def on_train_start(self, state: RunState) -> None:
        if state.folder:
            # Step 0 is the evaluation before training; a fresh run writes it again.
            self._file = JSONLines(Path(state.folder) / "metrics.jsonl",
                                   keep=lambda row: row.get("step", 0) <= state.step and state.step > 0)

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        if self._file:
            self._file.write({"step": state.step, "epoch": state.epoch, **metrics})

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


class Ledger:
    """`ledger.jsonl`: for each step the epoch, the row it begins at, and a hash of its token ids, over all ranks."""

    def __init__(self, folder: str | None, step: int):
        self._file = JSONLines(Path(folder) / "ledger.jsonl", keep=lambda row: row.get("step", 0) <= step) if folder else None

    def write(self, step: int, position: Position, rows: int, fingerprint: int, left_out: str | None = None) -> None:
        """`left_out`: why the step changed no weight."""
        if self._file:
            self._file.write({"step": step, "epoch": position.epoch, "row": position.row, "rows": rows,
                              "tokens_hash": f"{fingerprint & (2**64 - 1):016x}", **({"left_out": left_out} if left_out else {})})

    def close(self) -> None:
        if self._file:
            self._file.close()


class SampleTable:
    """`samples.jsonl`: answers that the model gave, one object each, of the batch that ends with `step`.

    Args:
        every: steps between two batches that are written down; None: never.
    """

    def __init__(self, folder: str | None, step: int, every: int | None):
        self._path = Path(folder) / "samples.jsonl" if folder and every else None
        self._file: JSONLines | None = None
        self._step, self._every = step, every or 1

    def write(self, since: int, step: int, samples: list[dict[str, Any]]) -> None:
        """Samples of the batch of steps (since, step]: of the run's first, and of those that reach a multiple of `every`."""
        if self._path is None or not samples or (since and step // self._every == since // self._every):
            return
        if self._file is None:
            self._file = JSONLines(self._path, keep=lambda row: row.get("step", 0) <= self._step)
        for sample in samples:
            self._file.write({"step": step, **sample})

    def close(self) -> None:
        if self._file:
            self._file.close()
