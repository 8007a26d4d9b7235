"""Checkpoints whose tensors have other names or another layout than those of the model, such as separate experts.

transformers describes the changes by patterns of names and by operations. Here the description is applied to tensors
that are not in memory, so that a rank reads only what its shards need. transformers itself converts whole models.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from myllm_ray.models.parts import Stored, computed, concatenate, narrow, read_whole, stack, transpose

Collected = dict[str, list[Stored]]
"""The tensors of a checkpoint that become one or several of the model, by the pattern that their names match."""


@dataclass
class _Group:
    """Tensors of a checkpoint that one converter turns into one or several tensors of the model."""

    converter: WeightConverter
    target: str
    """The name that `rename_source_key` returned: the first of the names in the model."""
    tensors: Collected = field(default_factory=dict)


def model_tensors(stored: Mapping[str, Stored], model: PreTrainedModel) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint by their names in the model, with the layout of the model.

    Args:
        stored: The tensors of the checkpoint by their names.
        model: The model, possibly on the meta device.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known = model.state_dict()
    found: dict[str, Stored] = {}
    groups: dict[str, _Group] = {}
    # The order in which transformers stacks experts.
    for original in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(original, renamings, converters, model.base_model_prefix, known)
        if name not in known and original in known:
            name, pattern = rename_source_key(original, [], [], model.base_model_prefix, known)
        if name not in known:
            continue
        if pattern is None:
            found.setdefault(name, stored[original])
            continue
        group = groups.setdefault(name, _Group(by_pattern[pattern], name))
        group.tensors.setdefault(pattern, []).append(stored[original])
    for group in groups.values():
        found.update(_in_parts(group, model) or _as_whole(group, model))
    return found


def _in_parts(group: _Group, model: PreTrainedModel) -> dict[str, Stored] | None:
    """Returns the tensors that a converter makes, or None if one of its operations is not supported in parts."""
    tensors, converter = group.tensors, group.converter
    for operation in converter.operations:
        apply = _OPERATIONS.get(type(operation))
        changed = apply and apply(operation, tensors, converter, group.target, model)
        if changed is None:
            return None
        tensors = changed
    named = _full_names(group.target, {pattern: values[0] for pattern, values in tensors.items()})
    return named if all(len(values) == 1 for values in tensors.values()) else None


def _as_whole(group: _Group, model: PreTrainedModel) -> dict[str, Stored]:
    """Returns the tensors that a converter makes, each computed from all tensors of the checkpoint that it needs."""

    def convert(create: Callable[[Stored], Tensor]) -> dict[str, Tensor]:
        converter = copy.deepcopy(group.converter)
        for pattern, tensors in group.tensors.items():
            for tensor in tensors:
                converter.collected_tensors[pattern].append(functools.partial(create, tensor))  # type: ignore[arg-type]
        made = converter.convert(group.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    shapes = convert(lambda tensor: torch.empty(tensor.shape, device="meta"))

    def create(name: str) -> Tensor:
        return convert(read_whole)[name]

    return {name: computed(tuple(t.shape), functools.partial(create, name)) for name, t in shapes.items()}


def _full_names(target: str, made: dict[str, Stored]) -> dict[str, Stored]:
    """Returns tensors by their names in the model instead of patterns, as `WeightConverter.convert` does."""
    full = target.replace("*.", "0.")
    for pattern in made:
        if pattern in full:
            prefix, _, suffix = full.partition(pattern)
            return {f"{prefix}{key}{suffix}": tensor for key, tensor in made.items()}
    return made


# Each of the functions returns what the operation's `convert` returns, or None for a case that is left to it.


def _merge(op: Any, tensors: Collected, converter: Any, target: str, model: Any) -> Collected | None:
    names = list(tensors) if len(tensors) > 1 else converter.target_patterns[:1]
    return {name: [stack(values, op.dim)] for name, values in zip(names, tensors.values(), strict=True)}


def _concatenate(op: Any, tensors: Collected, converter: Any, target: str, model: Any) -> Collected | None:
    if op.num_shards_attribute is not None and len(converter.target_patterns) > 1:
        return None
    ordered = [tensor for pattern in converter.source_patterns for tensor in tensors.get(pattern, [])]
    return {converter.target_patterns[0]: [concatenate(ordered, op.dim)]}


def _chunk(op: Any, tensors: Collected, converter: Any, target: str, model: Any) -> Collected | None:
    ((tensor, *_),) = tensors.values()
    count, size = len(converter.target_patterns), tensor.shape[op.dim]
    if op.num_shards_attribute is not None or size % count:
        return None
    length = size // count
    return {
        name: [narrow(tensor, op.dim, number * length, length)] for number, name in enumerate(converter.target_patterns)
    }


def _split(op: Any, tensors: Collected, converter: Any, target: str, model: Any) -> Collected | None:
    ((tensor, *_),) = tensors.values()
    first, found, start = converter.target_patterns[0], {}, 0
    for name in converter.target_patterns:
        length = model.get_parameter(target.replace(first, name)).shape[op.dim]
        found[name] = [narrow(tensor, op.dim, start, length)]
        start += length
    return found if start == tensor.shape[op.dim] else None


def _transpose(op: Any, tensors: Collected, converter: Any, target: str, model: Any) -> Collected | None:
    if len(tensors) != 1 or len(converter.target_patterns) != 1:
        return None
    ((tensor, *_),) = tensors.values()
    same = op.check_dims and tensor.shape == tuple(model.get_parameter(target).shape)
    return {converter.target_patterns[0]: [tensor if same else transpose(tensor, op.dim0, op.dim1)]}


_OPERATIONS: dict[type, Callable[..., Collected | None]] = {
    MergeModulelist: _merge,
    Concatenate: _concatenate,
    Chunk: _chunk,
    Split: _split,
    Transpose: _transpose,
}
