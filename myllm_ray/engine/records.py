"""What a run writes down about itself: `metrics.jsonl` and `ledger.jsonl`. One line a step, however often it was trained."""

from __future__ import annotations

from pathlib import Path

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
