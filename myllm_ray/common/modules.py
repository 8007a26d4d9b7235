"""Properties of a model that follow from its modules: repeated blocks, parameter counts, inputs, adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.1
"""Smallest share of the largest list's parameters that a list needs for its members to count as blocks."""


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the repeated blocks of a model, which are sharded, checkpointed and compiled individually.

    The blocks are the members of every outermost `nn.ModuleList` (or `nn.Sequential` with two members of one class)
    that has at least `SHARE` of the parameters of the largest one. Members may belong to several classes (Jamba:
    attention and Mamba layers), and a model may have several lists (a policy and its critic, an encoder and a decoder).
    A list inside a block (the experts of a layer) is part of that block. Single layers of torch (`nn.Linear`) are
    blocks only if nothing else repeats, because a model may use their weights directly, without calling the layer.
    """
    lists = [members for members in _outermost_lists(module) if members]
    lists = [members for members in lists if not all(_is_bare(m) for m in members)] or lists
    sizes = [parameter_count(members) for members in lists]
    return [
        block
        for members, size in zip(lists, sizes, strict=True)
        if size and size >= SHARE * max(sizes)
        for block in members
    ]


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    if isinstance(module, nn.ModuleList):
        yield _members(module)
    elif isinstance(module, nn.Sequential) and len(parts := [m for m in module if not _is_bare(m)]) > len(
        {type(m) for m in parts}
    ):
        yield parts
    else:
        for child in module.children():
            yield from _outermost_lists(child)


def _members(container: nn.Module) -> list[nn.Module]:
    """Returns the members of a list. Nested lists are flattened, because a list itself cannot be called."""
    found: list[nn.Module] = []
    for member in container.children():
        found += _members(member) if isinstance(member, (nn.ModuleList, nn.ModuleDict)) else [member]
    return found


def _is_bare(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Returns the number of elements in the parameters of some modules. A shared parameter counts once."""
    return sum(whole_shape(p).numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def outside_blocks(module: nn.Module, blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """Returns the number of parameter elements outside the blocks, and the total number.

    Neither number includes embeddings and the output head.

    Args:
        module: The model.
        blocks: Its repeated blocks.
    """
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    getters: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
    heads = [head for m in getters if (head := m.get_output_embeddings()) is not None]
    skipped = {id(p) for m in [*tables, *heads] for p in m.parameters()}
    # A head that the model does not declare has the shape of an embedding table.
    shapes = {whole_shape(p) for m in tables for p in m.parameters()}
    sizes = {
        id(p): whole_shape(p).numel()
        for p in module.parameters()
        if id(p) not in skipped and whole_shape(p) not in shapes
    }
    inside = {id(p) for block in blocks for p in block.parameters()}
    return sum(size for key, size in sizes.items() if key not in inside), sum(sizes.values())


def whole_shape(parameter: Tensor) -> torch.Size:
    """Returns the full shape of a parameter.

    ZeRO-3 replaces a partitioned parameter by an empty tensor and stores the full shape in `ds_shape`.
    """
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def forward_names(module: nn.Module) -> set[str] | None:
    """Returns the argument names of `forward`, or None if it accepts arbitrary keyword arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}


def logits_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the (B, S, V) logits of any model, computed without a cache.

    Args:
        module: The model, possibly wrapped (DDP).
        inputs: Candidate arguments; those that `forward` does not accept are dropped.
    """
    given: dict[str, Any] = {**inputs, "use_cache": False}
    accepted = forward_names(getattr(module, "module", module))
    output = module(**{k: v for k, v in given.items() if accepted is None or k in accepted})
    logits: Tensor = getattr(output, "logits", output)
    return logits


def adapted_modules(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the names and modules that have a PEFT adapter."""
    return ((name, m) for name, m in module.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge"))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Disables the PEFT adapters of a model inside the block."""
    adapted = [m for _, m in adapted_modules(module)]
    for m in adapted:
        m._disable_adapters = True  # `enable_adapters(False)` would also clear `requires_grad` of the adapters
    try:
        yield
    finally:
        for m in adapted:
            m._disable_adapters = False
