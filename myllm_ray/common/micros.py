"""Micro-batches between the host and a device: copies, and tensors that were derived from others on the host."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from myllm_ray.common.types import Micro

if TYPE_CHECKING:
    from torch import Tensor

_SOURCE = "prepared_from/"
ON_HOST = frozenset({"document_lengths"})
"""Names of tensors that stay on the host, which reads their values in every forward pass."""
_NONE: Mapping[int, Tensor] = MappingProxyType({})


def with_derived(micro: Micro, sources: tuple[str, ...], derived: Micro) -> Micro:
    """Returns a micro-batch with tensors that were derived from some of its others.

    It also contains the sources a second time. `is_derived` compares these with the current ones, so a trainer that
    replaces `labels` later does not use the targets of the old ones.

    Args:
        micro: The micro-batch; not modified.
        sources: Names of the tensors that `derived` was computed from.
        derived: The tensors to add.
    """
    return {**micro, **derived, **{_SOURCE + name: micro[name] for name in sources}}


def is_derived(micro: Micro, sources: tuple[str, ...]) -> bool:
    """Returns whether a micro-batch contains tensors that were derived from these tensors of it."""
    # Identity, not equality: comparing values would synchronize with the device.
    return all(micro.get(_SOURCE + name, micro) is micro[name] for name in sources)


def to_device(micro: Micro, device: Any, non_blocking: bool = False, copies: Mapping[int, Tensor] = _NONE) -> Micro:
    """Returns a micro-batch on a device, except the tensors `ON_HOST`. A tensor that has two names is copied once.

    Args:
        micro: The micro-batch.
        device: The device.
        non_blocking: Whether the copies are asynchronous; they are if the tensors are in pinned memory.
        copies: Copies that exist already, by the `id` of the tensor.
    """
    moved = dict(copies)
    for name, tensor in micro.items():
        if name not in ON_HOST and id(tensor) not in moved:
            moved[id(tensor)] = tensor.to(device, non_blocking=non_blocking)
    return {name: tensor if name in ON_HOST else moved[id(tensor)] for name, tensor in micro.items()}
