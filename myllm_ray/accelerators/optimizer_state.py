"""The moments of an optimizer before its first step, so that a checkpoint can be loaded into them."""

from __future__ import annotations

import torch
from torch import Tensor


def create_moments(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer create its moments, by a step with zero gradients and learning rate 0.

    Parameters, gradients and learning rates are the same after the call, and all moments are 0.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
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
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    # Adam's step counter is a tensor too, and the step above must not count.
    for value in [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]:
        value.zero_()
