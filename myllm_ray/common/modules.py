"""What can be told of a model by looking at its modules."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SHARE = 0.1
"""A list belongs to the blocks if it holds at least this share of what the largest list holds."""


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that repeat: what is sharded, recomputed and compiled one by one.

    These are the members of every outermost `nn.ModuleList` (or `nn.Sequential` with two members of one class) that holds at
    least `SHARE` of what the largest one holds. Members may be of several classes (Jamba: attention and Mamba layers), and there
    may be several lists (a policy and its critic, an encoder and a decoder). Lists inside a block (the experts of a layer) are
    part of it. Bare layers (`nn.Linear`) are blocks only where nothing else repeats: a model may use their weights directly.
    """
    lists = [members for members in _outermost_lists(module) if members]
    lists = [members for members in lists if not all(_is_bare(m) for m in members)] or lists
    sizes = [parameter_count(members) for members in lists]
    return [block for members, size in zip(lists, sizes, strict=True) if size and size >= SHARE * max(sizes) for block in members]


def _outermost_lists(module: nn.Module) -> Iterator[list[nn.Module]]:
    if isinstance(module, nn.ModuleList):
        yield _members(module)
    elif isinstance(module, nn.Sequential) and len(parts := [m for m in module if not _is_bare(m)]) > len({type(m) for m in parts}):
        yield parts
    else:
        for child in module.children():
            yield from _outermost_lists(child)


def _members(container: nn.Module) -> list[nn.Module]:
    """Of a list; of lists inside it, too: a list can't be called, its members can."""
    found: list[nn.Module] = []
    for member in container.children():
        found += _members(member) if isinstance(member, (nn.ModuleList, nn.ModuleDict)) else [member]
    return found


def _is_bare(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def parameter_count(modules: Iterable[nn.Module]) -> int:
    """Elements of all parameters of some modules; one that several share counts once."""
    return sum(whole_shape(p).numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def outside_blocks(module: nn.Module, blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """How many parameters no block holds, and how many there are; neither counts embeddings and the output head."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    getters: list[Any] = [m for m in module.modules() if hasattr(m, "get_output_embeddings")]
    heads = [head for m in getters if (head := m.get_output_embeddings()) is not None]
    skipped = {id(p) for m in [*tables, *heads] for p in m.parameters()}
    shapes = {whole_shape(p) for m in tables for p in m.parameters()}
    sizes = {id(p): whole_shape(p).numel() for p in module.parameters() if id(p) not in skipped and whole_shape(p) not in shapes}
    inside = {id(p) for block in blocks for p in block.parameters()}
    return sum(size for key, size in sizes.items() if key not in inside), sum(sizes.values())


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


def logits_of(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, S, V) logits of any model: called with those inputs that its `forward` takes, without a cache."""
    given: dict[str, Any] = {**inputs, "use_cache": False}
    accepted = forward_names(getattr(module, "module", module))
    output = module(**{k: v for k, v in given.items() if accepted is None or k in accepted})
    logits: Tensor = getattr(output, "logits", output)
    return logits


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
