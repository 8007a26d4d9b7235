"""Muon for the matrices of the blocks, AdamW for all other parameters, in one optimizer.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) orthogonalizes the momentum of a matrix by
Newton-Schulz iterations. The step is that of `torch.optim.Muon`, with two differences that keep the loss curve the same
for any number of workers: the iterations run in fp32 by default, because bf16 amplifies the rounding of a sum over
ranks by four orders of magnitude; and sharded matrices (FSDP2) are gathered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from myllm_ray.common.modules import repeated_blocks, whole_shape
from myllm_ray.config.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration of Jordan et al. They maximize the slope at 0."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def hidden_matrices(model: nn.Module, pattern: str | None = None) -> set[int]:
    """Returns the ids of the parameters that Muon trains: matrices inside the repeated blocks, except embeddings.

    Embeddings, output heads, norms, biases and stacked experts (three dimensions) are not among them.

    Args:
        model: The model.
        pattern: A regular expression; the matrices are then those whose name it matches, inside blocks or not.

    Raises:
        ConfigError: There is no such matrix.
    """
    matrices = {n: p for n, p in model.named_parameters() if p.requires_grad and len(whole_shape(p)) == 2}
    if pattern is not None:
        try:
            found = {id(p) for name, p in matrices.items() if re.search(pattern, name)}
        except re.error as error:
            raise ConfigError(f"optimizer.options.matrices: {pattern!r} is not a regular expression: {error}") from None
        if not found:
            raise ConfigError(f"optimizer.options.matrices: {pattern!r} matches no trainable matrix")
        return found
    inside = {id(p) for block in repeated_blocks(model) for p in block.parameters()}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found = {id(p) for p in matrices.values()} & inside - tables
    if not found:
        raise ConfigError(
            f"optimizer.name=muon: {type(model).__name__} has no trainable matrix in a repeated block: name the "
            "matrices for Muon in optimizer.options.matrices (a regular expression), or use adamw"
        )
    return found


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `use_muon`, and `torch.optim.AdamW` for the others.

    Args:
        params: Parameter groups, each with the boolean `use_muon`.
        lr: The learning rate of the groups without their own.
        weight_decay: Decoupled weight decay of the groups without their own.
        momentum: Factor of Muon's momentum.
        nesterov: Whether the momentum is Nesterov's.
        ns_coefficients: The coefficients of a Newton-Schulz iteration.
        ns_steps: Number of Newton-Schulz iterations.
        ns_eps: Smallest norm by which a matrix is divided before the first iteration.
        ns_dtype: fp32 or bf16: the dtype of the iterations.
        adjust_lr_fn: Factor of Muon's learning rate for a matrix (A, B). match_rms_adamw: 0.2 √max(A, B), with which
            the learning rate and weight decay of AdamW apply (Liu et al., 2025, arXiv:2502.16982). original:
            √max(1, A / B), with which the usual learning rate is about 0.02.
        betas, eps: Options of AdamW.
        fused: Whether AdamW uses its fused kernel; None: torch decides.

    Raises:
        ValueError: An option is out of range, or a parameter for Muon is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 3e-4,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] = COEFFICIENTS,
        ns_steps: int = 5,
        ns_eps: float = 1e-7,
        ns_dtype: str = "fp32",
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        if not (isinstance(ns_steps, int) and 1 <= ns_steps < 100) or len(ns_coefficients) != 3:
            raise ValueError("ns_steps must be an integer from 1 to 99, and ns_coefficients three numbers")
        if ns_dtype not in _DTYPES or adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ValueError("ns_dtype is fp32 or bf16, adjust_lr_fn is match_rms_adamw or original")
        muon = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "ns_steps": ns_steps,
            "ns_eps": ns_eps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
        }
        groups = list(params)
        for group in groups:
            if group["use_muon"]:
                for key, value in {"lr": lr, "weight_decay": weight_decay, **muon}.items():
                    group.setdefault(key, value)
        others = [group for group in groups if not group["use_muon"]]
        # AdamW checks its options, and adds its defaults to the groups, which are the same dicts in both optimizers.
        self._adamw = torch.optim.AdamW(
            others or [{"params": [torch.zeros(1)]}],
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=fused,
        )
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        for p in (p for group in groups if group["use_muon"] for p in group["params"]):
            if len(whole_shape(p)) != 2:
                raise ValueError(f"Muon trains matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes one optimizer step. With sharded matrices this is a collective.

        Args:
            closure: Not supported; None.
        """
        if closure is not None:
            raise ValueError("Muon does not support a closure")
        for group in self.param_groups:
            if group["use_muon"]:
                self._step_matrices(group)
        # Set at each step, because `load_state_dict` replaces the groups and the state.
        self._adamw.param_groups = [group for group in self.param_groups if not group["use_muon"]]
        self._adamw.state = self.state
        self._adamw.step()

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        updates = []
        for p in parameters:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            gradient, buffer = _local(p.grad), _local(state["momentum_buffer"])
            buffer.lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)

        def of(whole: Tensor) -> Tensor:
            return orthogonalized(
                whole, group["ns_coefficients"], group["ns_steps"], group["ns_eps"], _DTYPES[group["ns_dtype"]]
            )

        rate, decay = float(group["lr"]), group["weight_decay"]
        for p, update in zip(parameters, _of_whole(parameters, updates, of), strict=True):
            rows, columns = whole_shape(p)
            factor = (
                0.2 * math.sqrt(max(rows, columns))
                if group["adjust_lr_fn"] == "match_rms_adamw"
                else math.sqrt(max(1, rows / columns))
            )
            local = _local(p)
            local.mul_(1 - rate * decay)
            local.add_(update.to(local.dtype), alpha=-rate * factor)


def orthogonalized(
    matrix: Tensor,
    coefficients: Sequence[float] = COEFFICIENTS,
    steps: int = 5,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns U S' Vᵀ for a matrix U S Vᵀ, with singular values S' of about 0.7 to 1.2, by Newton-Schulz iterations.

    Args:
        matrix: (A, B).
        coefficients: a, b, c of an iteration X → aX + b(XXᵀ)X + c(XXᵀ)²X.
        steps: Number of iterations.
        eps: Smallest norm by which the matrix is divided first.
        dtype: The dtype of the iterations and of the result.
    """
    a, b, c = coefficients
    x = matrix.to(dtype)
    tall = x.size(0) > x.size(1)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _of_whole(parameters: list[Tensor], updates: list[Tensor], function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Applies a function to whole matrices, of which each rank has a part, and returns the parts of the results.

    Each rank computes the function for its share of the matrices. Per matrix and rank this costs one all-to-all of the
    rank's shard in each direction, and no rank holds more than one whole matrix at a time.

    Args:
        parameters: The parameters, which have the layout.
        updates: The local parts of the matrices.
        function: Maps a matrix (A, B) to one of the same shape.
    """
    results: list[Tensor] = [*updates]
    sharded: list[int] = []
    for i, (p, update) in enumerate(zip(parameters, updates, strict=True)):
        if not isinstance(p, DTensor):
            results[i] = function(update)
        elif [placement for placement in p.placements if placement.is_shard()] and _by_rows(p):
            sharded.append(i)
        else:  # another layout than FSDP2's: every rank computes it
            whole = DTensor.from_local(update, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            full = function(whole.full_tensor())
            results[i] = distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None).to_local()
    # Large matrices first, so that the matrices of one exchange have similar sizes. The order is that of all ranks.
    sharded.sort(key=lambda i: (-parameters[i].numel(), i))
    while sharded:
        first = parameters[sharded[0]]
        assert isinstance(first, DTensor)
        ranks = first.device_mesh.size(_shard_dimension(first))
        _exchange(parameters, updates, results, sharded[:ranks], function)
        sharded = sharded[ranks:]
    return results


def _by_rows(p: DTensor) -> bool:
    dimensions = [placement.dim for placement in p.placements if placement.is_shard()]  # type: ignore[attr-defined]
    return dimensions == [0]


def _shard_dimension(p: DTensor) -> int:
    """Returns the dimension of the device mesh over which the parameter is sharded."""
    return next(i for i, placement in enumerate(p.placements) if placement.is_shard())


def _exchange(
    parameters: list[Tensor],
    updates: list[Tensor],
    results: list[Tensor],
    chosen: list[int],
    function: Callable[[Tensor], Tensor],
) -> None:
    """Gives the j-th chosen matrix to the j-th rank, which applies the function, and writes the parts to `results`."""
    first = parameters[chosen[0]]
    assert isinstance(first, DTensor)
    dimension = _shard_dimension(first)
    group, rank = first.device_mesh.get_group(dimension), first.device_mesh.get_local_rank(dimension)
    ranks, device = first.device_mesh.size(dimension), first.device_mesh.device_type
    sent = [updates[i].numel() for i in chosen] + [0] * (ranks - len(chosen))
    flat = torch.cat([updates[i].reshape(-1) for i in chosen]).to(device)
    mine = parameters[chosen[rank]] if rank < len(chosen) else None
    received = [0] * ranks if mine is None else [rows * mine.shape[1] for rows in _rows(mine.shape[0], ranks)]
    whole = flat.new_empty(sum(received))
    dist.all_to_all_single(whole, flat, received, sent, group=group)
    if mine is not None:
        whole = function(whole.view(mine.shape)).to(flat.dtype).reshape(-1)
    back = torch.empty_like(flat)
    dist.all_to_all_single(back, whole.contiguous(), sent, received, group=group)
    for i, part in zip(chosen, back.split(sent[: len(chosen)]), strict=True):
        results[i] = part.view_as(updates[i]).to(updates[i].device)


def _rows(rows: int, ranks: int) -> list[int]:
    """Returns the number of rows of each rank, as `Shard(0)` divides them."""
    size = math.ceil(rows / ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]


def split_groups(
    groups: list[dict[str, Any]], matrices: set[int], adamw_lr: float | None = None
) -> list[dict[str, Any]]:
    """Returns the groups, each divided into its part for Muon and its part for AdamW.

    Args:
        groups: The groups of `engine.optimizer.parameter_groups`.
        matrices: The result of `hidden_matrices`.
        adamw_lr: The learning rate of AdamW in groups without their own; None: that of Muon.
    """
    split: list[dict[str, Any]] = []
    for group in groups:
        own = {k: v for k, v in group.items() if k != "params"}
        hidden = [p for p in group["params"] if id(p) in matrices]
        others = [p for p in group["params"] if id(p) not in matrices]
        if hidden:
            split.append({**own, "params": hidden, "use_muon": True})
        if others:
            base = {} if adamw_lr is None else {"lr": adamw_lr}
            split.append({**base, **own, "params": others, "use_muon": False})
    return split
