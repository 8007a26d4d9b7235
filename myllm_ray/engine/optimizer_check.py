"""Checks by a few steps on a small matrix: can an optimizer be resumed exactly, and does it work on parts of a tensor?

An optimizer that uses the whole tensor (a norm, a row mean, a matrix product) computes something else on a part of it.
The loss curve would then depend on the number of workers. Whether an optimizer of another library does this is found by
running it: on the whole matrix, and as each of two ranks runs it on its part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from myllm_ray.accelerators.optimizer_state import (
    OptimizerLayout,
    create_moments,
    group_numbers,
    load_group_numbers,
)
from myllm_ray.config.errors import ConfigError

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_ROWS, _COLUMNS, _STEPS = 6, 4, 4
_TOLERANCE = 1e-5
"""Largest difference of a weight of size about 1 after `_STEPS` steps with a learning rate of 0.1."""


def check_optimizer(build: Build, name: str, layout: OptimizerLayout) -> None:
    """Checks that an optimizer keeps the loss curve in the layout of a backend, and after a resume.

    Args:
        build: returns a new optimizer with the options of the config and a learning rate of about 0.1.
        name: the value of `optimizer.name`, for error messages.
        layout: the layout of the parameters.

    Raises:
        ConfigError: the optimizer does not step, can't be resumed exactly, or needs whole tensors.
    """
    with _isolated():
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(_ROWS, _COLUMNS, generator=generator)
        gradients = [torch.randn(_ROWS, _COLUMNS, generator=generator) for _ in range(_STEPS)]
        try:
            whole = _stepped(build, start, gradients)
        except Exception as error:
            raise ConfigError(f"optimizer.name={name} fails in its first steps: {_short(error)}") from None
        if not _resumes(build, start, gradients, whole):
            raise ConfigError(
                f"optimizer.name={name}: a resumed run would differ from an uninterrupted one: part of its state is "
                "not in tensors that start at 0 or in numbers of its parameter groups, so a checkpoint does not "
                "contain it; use another optimizer"
            )
        if layout == "whole":
            return
        try:
            same = torch.allclose(_in_two_parts(build, start, gradients, layout), whole, rtol=0, atol=_TOLERANCE)
        except Exception as error:
            raise ConfigError(
                f"optimizer.name={name} does not support sharded tensors ({_short(error)}): use single, ddp, or "
                "deepspeed with accelerator.stage=0"
            ) from None
        if not same:
            raise ConfigError(f"optimizer.name={name} {_why_not(build, start, gradients, whole, layout)}")


def _why_not(build: Build, start: Tensor, gradients: Sequence[Tensor], whole: Tensor, layout: OptimizerLayout) -> str:
    elsewhere = "use single, ddp, or deepspeed with accelerator.stage=0"
    if layout == "slices_by_group" and torch.allclose(
        _in_two_parts(build, start, gradients, "slices"), whole, rtol=0, atol=_TOLERANCE
    ):
        return (
            "counts its steps in its parameter groups, but ZeRO-3 calls it once per group: use fsdp, or deepspeed with "
            "accelerator.stage 0 to 2"
        )
    what = "shards of tensors" if layout == "shards" else "flat slices of several tensors"
    return f"needs whole tensors, but this backend passes {what}, which results in another algorithm: {elsewhere}"


@contextmanager
def _isolated() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _stepped(build: Build, start: Tensor, gradients: Sequence[Tensor], by_group: bool = False) -> Tensor:
    """Returns a weight after one step per gradient.

    Args:
        by_group: whether `step` is also called for another group, during which this one has no parameters.
    """
    parameter = nn.Parameter(start.clone())
    optimizer = build([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        if by_group:
            optimizer.param_groups[0]["params"] = []
            optimizer.step()
            optimizer.param_groups[0]["params"] = [parameter]
    return parameter.detach()


def _resumes(build: Build, start: Tensor, gradients: Sequence[Tensor], whole: Tensor) -> bool:
    """Returns whether an optimizer that gets the state of a checkpoint before the last step computes the same weight.

    The first optimizer creates its state before its first step, as background checkpoints and a checkpoint of step 0
    require.
    """
    parameter = nn.Parameter(start.clone())
    first = build([parameter])
    if not first.state:
        create_moments(first)
    for gradient in gradients[:-1]:
        parameter.grad = gradient.clone()
        first.step()
    resumed = nn.Parameter(parameter.detach().clone())
    second = build([resumed])
    if not second.state:
        create_moments(second)
    for key, value in first.state[parameter].items():
        if isinstance(value, Tensor):
            second.state[resumed][key].copy_(value)
    load_group_numbers(second, group_numbers(first))
    resumed.grad = gradients[-1].clone()
    second.step()
    return torch.equal(resumed.detach(), whole)


def _in_two_parts(build: Build, start: Tensor, gradients: Sequence[Tensor], layout: OptimizerLayout) -> Tensor:
    """Returns the weight as two ranks compute it, each with an optimizer and a half of the matrix of its own."""
    parts = []
    for rank in range(2):
        if layout == "shards":
            # Describes the layout only, without process groups: an operation that communicates raises an error.
            mesh = DeviceMesh("cpu", torch.arange(2), _init_backend=False, _rank=rank)
            half = slice(rank * _ROWS // 2, (rank + 1) * _ROWS // 2)
            of = [DTensor.from_local(t[half].clone(), mesh, [Shard(0)], run_check=False) for t in (start, *gradients)]
            result = _stepped(build, of[0], of[1:])
            assert isinstance(result, DTensor)
            parts.append(result.to_local())
        else:
            size = start.numel() // 2
            flat = [t.flatten()[rank * size : (rank + 1) * size] for t in (start, *gradients)]
            parts.append(_stepped(build, flat[0], flat[1:], by_group=layout == "slices_by_group"))
    return torch.cat(parts).view_as(start)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
