"""Models on the meta device, with a source that creates each tensor on request.

This makes it possible to build a model that is larger than a worker's memory: a sharding backend requests its part of
each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from myllm_ray.common.progress import Task
from myllm_ray.common.tensor_files import Box, part_of


class Source(Protocol):
    """Creates the initial values of a model on the CPU. They are the same in every process."""

    def __call__(self, name: str, box: Box | None = None) -> Tensor:
        """Returns a value.

        Args:
            name: The fully qualified name of a parameter or buffer.
            box: The part of the value to return; None: all.
        """


def held(values: Mapping[str, Tensor]) -> Source:
    """Returns the source of values that exist already."""

    def source(name: str, box: Box | None = None) -> Tensor:
        return part_of(values[name], box)

    return source


def attach_source(model: nn.Module, source: Source) -> nn.Module:
    """Attaches the source of initial values to a model on the meta device and returns the model."""
    model.__dict__["_initial_values"] = source
    return model


def source_of(model: nn.Module) -> Source | None:
    """Returns the source of a model on the meta device, or None for a model that already has its values."""
    return cast("Source | None", model.__dict__.get("_initial_values"))


def materialize(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Moves a model to a device, after creating its values one tensor at a time if it is on the meta device."""
    source = source_of(model)
    if source is None:
        return model.to(device)
    with loading(model, source) as counted:
        fill(model, counted, device)
    return model


@contextmanager
def loading(model: nn.Module, source: Source) -> Iterator[Source]:
    """Yields the source of a model's values and reports the progress of the block that fills the model from it.

    After the block, no source is attached to the model, because a source may keep files and tensors.
    """
    with Task("loading weights", sum(1 for _ in (*model.parameters(), *model.buffers()))) as task:

        def create(name: str, box: Box | None = None) -> Tensor:
            task.advance()
            return source(name, box)

        yield create
    model.__dict__.pop("_initial_values", None)


Filled = dict[int, tuple[Tensor, Tensor]]
"""Maps the id of a meta tensor to that tensor and its value. The reference to the tensor prevents reuse of its id."""


@torch.no_grad()
def fill(
    module: nn.Module,
    source: Callable[[str], Tensor],
    device: torch.device | str,
    prefix: str = "",
    recurse: bool = True,
    done: Filled | None = None,
) -> None:
    """Replaces the meta tensors of a module by their values. Tied tensors stay tied.

    Args:
        module: The model or one of its submodules.
        source: Creates the complete value of a parameter or buffer from its name.
        device: The device of the values.
        prefix: The name of `module` in the model.
        recurse: Whether to fill the submodules too.
        done: The tensors that were filled before. Pass the same mapping for all parts of one model, so that tensors
            that are tied across parts stay tied.
    """
    done = {} if done is None else done
    for name, inner in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
        for owned in (inner._parameters, inner._buffers):
            for key, tensor in owned.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in done:
                    value = source(f"{name}.{key}" if name else key).to(device)
                    if isinstance(tensor, nn.Parameter):
                        value = nn.Parameter(value, tensor.requires_grad)
                    done[id(tensor)] = tensor, value
                owned[key] = done[id(tensor)][1]  # type: ignore[assignment]
