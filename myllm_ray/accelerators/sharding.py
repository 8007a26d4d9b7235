"""The units of a model that FSDP gathers one at a time, and the sizes of the shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from myllm_ray.common.modules import outside_blocks, repeated_blocks
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import AcceleratorSection

CLASSES = "transformer_layer_cls_to_wrap"
"""The option with the class names of the blocks, named like the key in `fsdp_config` of transformers."""
OUTSIDE = 0.25
"""Maximum fraction of the parameters outside all blocks. Embeddings and the output head are not counted."""


def blocks_of(model: nn.Module, classes: Iterable[str] | None = None) -> list[nn.Module]:
    """Returns the blocks that are sharded individually.

    Args:
        model: The model.
        classes: Class names; the blocks are the outermost modules of these classes. None: the repeated blocks.

    Raises:
        ConfigError: No module has one of the classes; or a large part of the model is outside the repeated blocks, so
            that every rank would gather this part at once.
    """
    if classes is None:
        blocks = repeated_blocks(model)
        _refuse_large_root(model, blocks)
        return blocks
    # The user selected the blocks, so a large part outside of them is accepted.
    blocks = list(_outermost(model, set(classes)))
    missing = sorted(set(classes) - {type(block).__name__ for block in blocks})
    if missing:
        raise ConfigError(f"accelerator.options.{CLASSES}: {type(model).__name__} has no module of class {missing[0]}")
    return blocks


def _refuse_large_root(model: nn.Module, blocks: list[nn.Module]) -> None:
    outside, total = outside_blocks(model, blocks)
    if outside > OUTSIDE * total:
        raise ConfigError(
            f"accelerator: {outside / total:.0%} of the parameters of {type(model).__name__} ({outside:,}, without "
            "embeddings and output head) are in no nn.ModuleList of blocks, so every rank would gather them at once: "
            f"list the classes of its blocks in accelerator.options.{CLASSES}, or set it to [] to accept this"
        )


def _outermost(module: nn.Module, classes: set[str]) -> Iterable[nn.Module]:
    if type(module).__name__ in classes:
        yield module
        return
    for child in module.children():
        yield from _outermost(child, classes)


def shard_units(model: nn.Module, blocks: list[nn.Module], shards: int, arguments: Mapping[str, Any]) -> None:
    """Applies `fully_shard` to every block and then to the model, whose remaining parameters form the root unit.

    Blocks that share a parameter (the attention of Zamba) form one unit, because FSDP2 supports a shared parameter only
    within a unit.

    Args:
        model: The model, modified in place.
        blocks: The result of `blocks_of`.
        shards: Number of ranks over which a parameter is sharded.
        arguments: Keyword arguments of `fully_shard`.
    """
    # Blocks come first: `fully_shard` of the model takes the parameters that no inner unit has.
    for unit in _units(blocks):
        fully_shard(unit[0] if len(unit) == 1 else unit, shard_placement_fn=placement(shards), **arguments)  # type: ignore[call-overload]
    fully_shard(model, shard_placement_fn=placement(shards), **arguments)


def _units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Returns the blocks in groups, so that blocks of different groups share no parameter."""
    units: list[tuple[set[int], list[nn.Module]]] = []
    for block in blocks:
        owned = {id(p) for p in block.parameters()}
        # The block may share parameters with several units, which are then merged into one.
        sharing = [unit for unit in units if unit[0] & owned]
        units = [unit for unit in units if not unit[0] & owned]
        units.append(
            (owned.union(*(ids for ids, _ in sharing)), [m for _, members in sharing for m in members] + [block])
        )
    return [members for _, members in units]


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters of FSDP2, so that the next forward pass gathers the present shards.

    After a forward pass without a backward pass, such as an evaluation, parameters may still be gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def placement(shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Returns the `shard_placement_fn` of `fully_shard`, which selects the dimension of a parameter to shard.

    This is the first dimension, except for stacked experts whose number is not divisible by `shards`. These are sharded
    along the largest other dimension that is divisible. Otherwise, with a parameter (experts, out, in) of 16 experts
    and 64 ranks, 16 ranks would hold one expert each, four times their share, and 48 ranks would hold nothing.

    Args:
        shards: Number of ranks over which a parameter is sharded.
    """

    def choose(parameter: nn.Parameter) -> Shard | None:
        shape = parameter.shape
        if len(shape) < 3 or shape[0] % shards == 0:
            return None
        # FSDP2 supports dimensions other than the first only if they are divisible by the number of ranks.
        even = [dim for dim in range(1, len(shape)) if shape[dim] % shards == 0]
        return Shard(max(even, key=lambda dim: shape[dim])) if even else None

    return choose


def largest_shard(shape: Iterable[int], shards: int) -> int:
    """Returns the number of elements in the largest shard of a parameter.

    Args:
        shape: Shape of the complete parameter.
        shards: Number of ranks over which it is sharded.
    """
    sizes = list(shape)
    if not sizes:
        return 1
    whole = math.prod(sizes)
    if len(sizes) >= 3 and any(size % shards == 0 for size in sizes):
        return whole // shards
    # `Shard(0)` divides the first dimension into chunks of the rounded-up size; the last chunks are smaller or empty.
    return math.ceil(sizes[0] / shards) * (whole // sizes[0] if sizes[0] else 0)


def local_bytes(parameter: Tensor) -> int:
    """Returns the bytes of a parameter that this rank holds: its shard of a DTensor, or its partition under ZeRO-3."""
    # ZeRO-3 stores the partition in the attribute `ds_tensor` of the parameter.
    partition: Tensor | None = getattr(parameter, "ds_tensor", None)
    if partition is not None:
        return partition.numel() * partition.element_size()
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.numel() * local.element_size()


@dataclass(frozen=True)
class Sharding:
    """Over how many workers a backend divides the parameters, the gradients and the state of the optimizer."""

    parameters: int
    gradients: int
    optimizer: int
    replicas: int = 1
    """Groups of workers that hold a whole model each (hybrid sharding)."""


def sharding_of(section: AcceleratorSection, workers: int) -> Sharding:
    """Returns the division of a built-in backend; other backends are taken to hold everything on each worker."""
    name, stage = section.name, section.stage
    if name == "fsdp":
        replicas = int(section.options.get("replicas", 1))
        shards = max(1, workers // replicas)
        return Sharding(shards, shards, shards, replicas)
    if name != "deepspeed":
        return Sharding(1, 1, 1)
    stage = 2 if stage is None else stage
    return Sharding(workers if stage == 3 else 1, workers if stage >= 2 else 1, workers if stage >= 1 else 1)
