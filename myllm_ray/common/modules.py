"""What can be told of a model by looking at its modules."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that repeat: the members of the largest ModuleList, if they are all of one class."""
    lists: list[nn.ModuleList] = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1]
    if not lists:
        return []

    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    return list(lists[sizes.index(max(sizes))])


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter as a whole. ZeRO-3 leaves an empty tensor in its place and puts the shape beside it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def forward_names(module: nn.Module) -> set[str] | None:
    """Names of the arguments of `forward`; None where it takes any keyword."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
