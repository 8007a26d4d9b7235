"""Reports metrics and checkpoints to Ray Train's `Result`, for a user-defined `TorchTrainer(sft_loop)`.

Runs that `train(config)` starts do not use it: `ray.train.report` is a barrier that takes up to the controller's poll
interval, and the run's folder already contains everything.
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
    """Calls `ray.train.report` on every rank at evaluations and checkpoints.

    `Result.metrics` contains what was logged before the newest checkpoint. `Result.checkpoint` is that checkpoint, with
    the tokenizer next to the weights, so `open_run(result.checkpoint.path)` loads it.

    Args:
        in_background: whether checkpoints are written in the background. In that case only the last one is reported, at
            the end of training.
    """

    # `ray.train.report` waits until every rank has called it. With writes in the background, ranks see at different
    # steps that a checkpoint is complete, so reports at that event would not match across ranks.

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
        # Every rank has written its shard to the run's shared folder, so the main rank reports it for all.
        ray.train.report(
            metrics,
            checkpoint=Checkpoint(folder) if state.is_main else None,
            checkpoint_dir_name=Path(folder).name,
            checkpoint_upload_fn=into_storage,
        )


def into_storage(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Puts a checkpoint of the run into Ray's storage, as Ray's `checkpoint_upload_fn`.

    On the same disk the files become hard links, else copies.

    Args:
        checkpoint: the checkpoint in the run's folder.
        name: its name in Ray's storage.

    Returns:
        The checkpoint in Ray's storage, with the tokenizer.
    """
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
