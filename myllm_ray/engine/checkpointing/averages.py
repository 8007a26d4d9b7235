"""The moving averages of the weights in a checkpoint: tensors with the prefix `ema.`, for export and evaluation."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from myllm_ray.config.errors import CheckpointError
from myllm_ray.engine.checkpointing.manager import read_into, read_manifest

PREFIX = "ema."
"""Prefix of the averages in a checkpoint; the rest of a name is the name of the parameter in the model."""


def check_averages(folder: Path) -> None:
    """Checks that a checkpoint contains averages. Only the manifest is read.

    Raises:
        CheckpointError: it contains none.
    """
    if not any(name.startswith(PREFIX) for name in read_manifest(folder)["tensors"]):
        raise CheckpointError(
            f"{folder} contains no averaged weights: the run was not trained with ema; export the weights (--to hf)"
        )


def load_averages(folder: Path, model: nn.Module) -> None:
    """Copies the averages of a checkpoint into the trained parameters of a model of this process.

    Args:
        folder: the checkpoint.
        model: the model with its weights. Parameters that were not trained have no average and stay as they are.

    Raises:
        CheckpointError: a trained parameter has no average, or the files can't be read.
    """
    known = read_manifest(folder)["tensors"]
    tensors = {}
    for name, parameter in model.named_parameters():
        if PREFIX + name in known:
            tensors[PREFIX + name] = parameter.data
        elif parameter.requires_grad:
            raise CheckpointError(f"{folder} contains no average of {name}, which was trained")
    read_into(folder, tensors)
