"""What can be told of a model by looking at its modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def adapted_modules(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules that PEFT has put an adapter into, by name."""
    return ((name, m) for name, m in module.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge"))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The model as it was without its adapters."""
    adapted = [m for _, m in adapted_modules(module)]
    for m in adapted:
        m._disable_adapters = True  # `enable_adapters(False)` would also stop them from training
    try:
        yield
    finally:
        for m in adapted:
            m._disable_adapters = False
