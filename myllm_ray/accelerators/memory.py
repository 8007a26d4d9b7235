"""Less memory, the same numbers: activation checkpointing; and torch.compile. Parameter names stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from myllm_ray.common.modules import repeated_blocks
from myllm_ray.config.errors import ConfigError


def save_memory(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Apply `activation_checkpointing` and `compile` of the `accelerator` section to a model, in place.

    Activation checkpointing (Chen et al., 2016, arXiv:1604.06174): a block keeps its input only and computes the rest again
    in the backward pass, with the same random numbers. Both wrap `forward`, inside whatever a backend puts around the block.

    Raises:
        ConfigError: there are no repeated blocks to apply it to.
    """
    every, compiled = section.get("activation_checkpointing") or "none", section.get("compile") or "none"
    if every == "none" and compiled == "none":
        return
    blocks = repeated_blocks(model)
    if not blocks and (every != "none" or compiled == "blocks"):
        key = "activation_checkpointing" if every != "none" else "compile"
        raise ConfigError(f"accelerator.{key}: {type(model).__name__} has no blocks that repeat (an nn.ModuleList)")
    if every != "none":
        for block in blocks[:: 1 if every == "full" else int(every)]:
            # As an attribute of the block, not as a wrapper around it: a wrapper would rename every parameter.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for module in blocks if compiled == "blocks" else [model] if compiled == "model" else []:
        module.compile()
