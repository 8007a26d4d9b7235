"""Less memory, the same numbers: activation checkpointing; and torch.compile. Parameter names stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from myllm_ray.common.modules import repeated_blocks
from myllm_ray.config.errors import ConfigError
from myllm_ray.ops.dropout import checkpoint_contexts, find_dropout


def save_memory(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Apply `activation_checkpointing` and `compile` of the `accelerator` section to a model, in place.

    Activation checkpointing (Chen et al., 2016, arXiv:1604.06174): a block keeps its input only and computes the rest again
    in the backward pass, with the same random numbers. Both wrap `forward`, inside whatever a backend puts around the block.

    Raises:
        ConfigError: there are no repeated blocks to apply it to, or dropout is to be compiled.
    """
    every, compiled = section.get("activation_checkpointing") or "none", section.get("compile") or "none"
    if every == "none" and compiled == "none":
        return
    blocks = repeated_blocks(model)
    if not blocks and (every != "none" or compiled == "blocks"):
        key = "activation_checkpointing" if every != "none" else "compile"
        raise ConfigError(f"accelerator.{key}: {type(model).__name__} has no blocks that repeat (an nn.ModuleList)")
    check_compiled_dropout(model, section)
    if every != "none":
        # `context_fn` can't be compiled; what is compiled has no dropout.
        options: dict[str, Any] = {"context_fn": checkpoint_contexts} if compiled == "none" else {}
        for block in blocks[:: 1 if every == "full" else int(every)]:
            # As an attribute of the block, not as a wrapper around it: a wrapper would rename every parameter.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    for module in blocks if compiled == "blocks" else [model] if compiled == "model" else []:
        module.compile()


def check_compiled_dropout(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Refuse dropout in a compiled model: inductor draws the masks itself, for each micro-batch.

    Raises:
        ConfigError: says where the dropout is.
    """
    compiled = section.get("compile") or "none"
    place = find_dropout(model) if compiled != "none" else None
    if place is not None:
        raise ConfigError(f"accelerator.compile={compiled}: the model has dropout ({place}), and compiled dropout depends on how the batch is cut: "
                          "set the model's dropout to 0, or accelerator.compile=none")
