"""How a model is cut into the units that FSDP gathers one at a time, and how much of it a rank then holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from myllm_ray.common.modules import outside_blocks, repeated_blocks
from myllm_ray.config.errors import ConfigError

CLASSES = "transformer_layer_cls_to_wrap"
"""The option that names the classes of the blocks; the key of the FSDP section in transformers' TrainingArguments."""
OUTSIDE = 0.25
"""Largest share of the parameters, embeddings and output head aside, that may belong to no block."""


def blocks_of(model: nn.Module, classes: Iterable[str] | None = None) -> list[nn.Module]:
    """The blocks to shard one by one: those that repeat, or the outermost modules of the named classes.

    Raises:
        ConfigError: a class has no module, or a large part of the model belongs to no block, so that every rank would gather
            it at once.
    """
    if classes is None:
        blocks = repeated_blocks(model)
        _refuse_large_root(model, blocks)
        return blocks
    blocks = list(_outermost(model, set(classes)))
    missing = sorted(set(classes) - {type(block).__name__ for block in blocks})
    if missing:
        raise ConfigError(f"accelerator.options.{CLASSES}: {type(model).__name__} has no module of class {missing[0]}")
    return blocks


def _refuse_large_root(model: nn.Module, blocks: list[nn.Module]) -> None:
    outside, total = outside_blocks(model, blocks)
    if outside > OUTSIDE * total:
        raise ConfigError(f"accelerator: {outside / total:.0%} of the parameters of {type(model).__name__} ({outside:,}, embeddings and "
                          "output head aside) belong to no nn.ModuleList of blocks, so every rank would gather them at once: name the "
                          f"classes of its blocks in accelerator.options.{CLASSES}, or give [] there to train it so")


def _outermost(module: nn.Module, classes: set[str]) -> Iterable[nn.Module]:
    if type(module).__name__ in classes:
        yield module
        return
    for child in module.children():
        yield from _outermost(child, classes)


def shard_units(model: nn.Module, blocks: list[nn.Module], shards: int, arguments: Mapping[str, Any]) -> None:
    """`fully_shard` every block, then what is left as the root unit.

    Blocks that share a parameter (Zamba's attention) form one unit: FSDP2 shards a shared parameter within a unit only.

    Args:
        shards: ranks over which a parameter is divided.
        arguments: of `fully_shard`.
    """
    for unit in _units(blocks):
        fully_shard(unit[0] if len(unit) == 1 else unit, shard_placement_fn=placement(shards), **arguments)  # type: ignore[call-overload]
    fully_shard(model, shard_placement_fn=placement(shards), **arguments)


def _units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    units: list[tuple[set[int], list[nn.Module]]] = []
    for block in blocks:
        owned = {id(p) for p in block.parameters()}
        sharing = [unit for unit in units if unit[0] & owned]
        units = [unit for unit in units if not unit[0] & owned]
        units.append((owned.union(*(ids for ids, _ in sharing)), [m for _, members in sharing for m in members] + [block]))
    return [members for _, members in units]


def placement(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Which dimension of a parameter is divided: the first, but of stacked experts one that divides evenly.

    Of a tensor (experts, out, in) with 16 experts, 48 of 64 ranks would hold nothing, and 16 four times their share.
    """
    def choose(parameter: nn.Parameter) -> Shard | None:
        shape = parameter.shape
        if len(shape) < 3 or shape[0] % shards == 0:
            return None
        even = [dim for dim in range(1, len(shape)) if shape[dim] % shards == 0]
        return Shard(max(even, key=lambda dim: shape[dim])) if even else None

    return choose


def largest_shard(shape: Iterable[int], shards: int) -> int:
    """Elements that the fullest rank holds of a parameter of this shape."""
    sizes = list(shape)
    if not sizes:
        return 1
    whole = math.prod(sizes)
    if len(sizes) >= 3 and any(size % shards == 0 for size in sizes):
        return whole // shards
    return math.ceil(sizes[0] / shards) * (whole // sizes[0] if sizes[0] else 0)


def local_bytes(parameter: Tensor) -> int:
    """Bytes of a parameter that this rank holds: of a DTensor its shard, of a parameter under ZeRO-3 its partition."""
    partition: Tensor | None = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        return partition.numel() * partition.element_size()
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()
