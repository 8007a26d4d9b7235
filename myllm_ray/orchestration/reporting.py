"""Ray Train's own `Result` for a `TorchTrainer(sft_loop)` of the user's own: metrics and checkpoints through `ray.train.report`.

Runs that `train(config)` starts do not use it: a report is a barrier of up to the controller's poll interval, and the run's folder
already holds everything.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pyarrow.fs
import ray.train
from ray.train import Checkpoint

from myllm_ray.common.files import link_or_copy
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback


class RayTrainReport(Callback):
    """Reports at evaluations and checkpoints, on every rank: Ray waits until all have called it.

    `Result.metrics` is what was logged before the newest checkpoint; `Result.checkpoint` that checkpoint with the tokenizer beside
    the weights, so `open_run(result.checkpoint.path)` loads it.

    Args:
        in_background: checkpoints are written in the background. Ranks learn at different steps that one is whole, so the last is
            reported when all have ended.
    """

    def __init__(self, in_background: bool):
        self._in_background = in_background
        self._metrics: dict[str, float] = {}
        self._checkpoint: str | None = None

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        self._metrics |= metrics

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        self._metrics |= metrics
        self._report(state, None)

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        self._checkpoint = folder
        if not self._in_background:
            self._report(state, folder)

    def on_train_end(self, state: RunState) -> None:
        self._report(state, self._checkpoint if self._in_background else None)

    def _report(self, state: RunState, folder: str | None) -> None:
        metrics = {**self._metrics, "step": state.step, "epoch": state.epoch}
        if folder is None:
            ray.train.report(metrics)
            return
        # All ranks see the run's folder, where every rank has written its share: one of them reports it.
        ray.train.report(metrics, checkpoint=Checkpoint(folder) if state.is_main else None,
                         checkpoint_dir_name=Path(folder).name, checkpoint_upload_fn=into_storage)


def into_storage(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """A checkpoint of ours in Ray's storage: by hard links where that is on the same disk, else as a copy."""
    storage = ray.train.get_context().get_storage()
    source, target = Path(checkpoint.path), storage.build_checkpoint_path_from_name(name)
    tokenizer = source.parent.parent / "tokenizer"
    if isinstance(storage.storage_filesystem, pyarrow.fs.LocalFileSystem):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=link_or_copy)
        shutil.copytree(tokenizer, os.path.join(target, "tokenizer"))
        return Checkpoint(target, storage.storage_filesystem)
    stored: Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
    pyarrow.fs.copy_files(str(tokenizer), f"{target}/tokenizer", destination_filesystem=storage.storage_filesystem)
    return stored
