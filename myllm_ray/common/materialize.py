"""Models without memory: on the meta device, with a source that gives each tensor when somebody asks for it.

So that a model larger than a worker's memory can be built: a sharding backend asks for one tensor at a time, keeps its part and
forgets the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

Source = Callable[[str], Tensor]
"""Gives the initial value of a parameter or buffer by its fully-qualified name, on the CPU. The same in every process."""


def attach_source(model: nn.Module, source: Source) -> nn.Module:
    """Say where the values of a model on the meta device come from."""
    model.__dict__["_initial_values"] = source
    return model


def source_of(model: nn.Module) -> Source | None:
    """The source of a model on the meta device; None for a model that has its values."""
    return cast("Source | None", model.__dict__.get("_initial_values"))


def materialize(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """The model with all its values, on a device; one tensor at a time."""
    source = source_of(model)
    if source is None:
        return model.to(device)
    fill(model, source, device)
    model.__dict__.pop("_initial_values")
    return model


Filled = dict[int, tuple[Tensor, Tensor]]
"""Meta tensors by their id, each with the value that took its place. Holding both keeps an id from being used again."""


@torch.no_grad()
def fill(module: nn.Module, source: Source, device: torch.device | str, prefix: str = "", recurse: bool = True,
         done: Filled | None = None) -> None:
    """Replace a module's meta tensors by their values. A tensor that stands in two places is one tensor afterwards, too.

    Args:
        module: may be a part of the model, whose name in the model is `prefix`.
        recurse: also the modules inside.
        done: what was filled before; share it between the parts of one model.
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
