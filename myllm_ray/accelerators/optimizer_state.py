"""The state of an optimizer in a checkpoint: its moments before the first step, and the numbers of its groups."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from myllm_ray.config.errors import CheckpointError

OptimizerLayout = Literal["whole", "shards", "slices", "slices_by_group"]
"""The form in which a backend passes parameters to the optimizer.

whole: complete tensors. shards: DTensors, sharded over ranks. slices: flat slices of several concatenated parameters.
slices_by_group: like slices, and `step` is called once per parameter group, with the other groups empty.
"""


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer create its moments, by a step with zero gradients and learning rate 0.

    Parameters, gradients, learning rates and the numbers of the parameter groups are the same after the call, and all
    moments are 0.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    saved = [(p.detach().clone(), p.grad) for p in parameters]
    for group in optimizer.param_groups:
        # A tensor stays a tensor: optimizers treat the two types differently.
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # Restores the values, because an optimizer may change a parameter even at learning rate 0.
    with torch.no_grad():
        for parameter, (value, gradient) in zip(parameters, saved, strict=True):
            parameter.copy_(value)
            parameter.grad = gradient
    # Some optimizers count steps in their groups, and the step above must not count. An optimizer that adds the counter
    # in its first step adds it again.
    for group, before in zip(optimizer.param_groups, groups, strict=True):
        for key in [k for k in group if k != "params" and k not in before]:
            del group[key]
        group.update(before)
    # Adam's step counter is a tensor too.
    for value in [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]:
        value.zero_()


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """Returns the numbers that an optimizer keeps in its parameter groups as state, one dict per group.

    Examples are the `step` of Lion and of AdEMAMix in pytorch-optimizer. Settings of the config are not state: they are
    arguments of the constructor, or booleans.
    """
    settings = {*inspect.signature(type(optimizer)).parameters, "params", "initial_lr"}
    return [
        {k: v for k, v in group.items() if k not in settings and type(v) in (int, float)}
        for group in optimizer.param_groups
    ]


def load_group_numbers(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, Any]]) -> None:
    """Sets the numbers that `group_numbers` returned.

    Raises:
        CheckpointError: the checkpoint has another number of parameter groups.
    """
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has the state of {len(saved)} parameter groups, this run has "
            f"{len(optimizer.param_groups)}: optimizer.groups or the trainable parameters have changed"
        )
    for group, numbers in zip(optimizer.param_groups, saved, strict=True):
        group.update(numbers)
