"""The loss that balances the experts of a mixture-of-experts model, as a part of any trainer's loss (ops/load_balancing.py).

    loss = Σ_n L_n + c Σ_n w_n B_n,   both divided by Σ_n w_n over the global batch

L_n is what the trainer minimises on sequence n, B_n the balancing loss of the routers on it, c is `model.router_loss_weight`, and w_n
what the sequence adds to the trainer's `batch_weight`: its target tokens, 1 for a pair. So c B is a weighted mean over the sequences
of the global batch, whatever its cut.

In evaluation the loss stays what the trainer minimises besides, so that it compares with that of other models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import IGNORE, Micro, RouterLosses, StepOutput

_LOADS = "_experts"


def has_routers(model: nn.Module) -> bool:
    """Whether the model has routers whose load is recorded."""
    return bool(getattr(getattr(model, "module", model), "routers", None))


def routing_inputs(model: nn.Module, sequences: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Arguments that make a model return the loss of its routers; none for a model without routers.

    Args:
        sequences: (B, S) number of the sequence that each token belongs to, -1 for padding.
        weights: (N,) what each sequence adds to the trainer's `batch_weight`.
    """
    return {"sequences": sequences, "sequence_weights": weights} if has_routers(model) else {}


def rows_as_sequences(real: Tensor) -> Tensor:
    """Each row is a sequence: (B, S) bool, whether a token is no padding -> (B, S) numbers of sequences, -1 for padding."""
    return torch.where(real, torch.arange(len(real), device=real.device)[:, None], -1)


def with_router_loss(model: nn.Module, output: StepOutput, router: RouterLosses | None, weights: Tensor) -> StepOutput:
    """A trainer's output with the loss of the routers: added to the loss where gradients are wanted, and as metrics.

    Args:
        router: what the model returned for `routing_inputs`; None: nothing changes.
    """
    if router is None:
        return output
    inner: Any = getattr(model, "module", model)
    loss = output.loss_sum + inner.router_loss_weight * router.loss_sum if torch.is_grad_enabled() else output.loss_sum
    return StepOutput(loss, {**output.metrics, "router_loss": (router.loss_sum.detach(), weights.sum()), _LOADS: (router.loads, 1.0)})


def expert_metrics(model: nn.Module, metrics: dict[str, float]) -> dict[str, float]:
    """The load of the experts, from the averaged metrics: for each layer and for all.

    `load_max` and `load_min` are the largest and the smallest number of tokens that an expert of the layer got, as multiples of the
    mean over the layer's experts: 1 where the load is even. `unused` is the share of experts without a token.
    """
    counts = [metrics[name] for name in sorted((n for n in metrics if n.startswith(f"{_LOADS}/")), key=lambda n: int(n.rpartition("/")[2]))]
    inner: Any = getattr(model, "module", model)
    if not counts:
        return {}
    found: dict[str, list[float]] = {"load_max": [], "load_min": [], "unused": []}
    size, named = len(counts) // len(inner.routers.layers), {}
    for number, layer in enumerate(inner.routers.layers):
        loads = counts[number * size : (number + 1) * size]
        mean = max(sum(loads) / size, 1e-9)
        values = {"load_max": max(loads) / mean, "load_min": min(loads) / mean, "unused": sum(load == 0 for load in loads) / size}
        for name, value in values.items():
            found[name].append(value)
            named[f"experts/layer_{layer}/{name}"] = value
    whole = {"load_max": max(found["load_max"]), "load_min": min(found["load_min"]), "unused": sum(found["unused"]) / len(found["unused"])}
    return {**{f"experts/{name}": value for name, value in whole.items()}, **named}


def real_tokens(micro: Micro) -> Tensor:
    """(B, S) bool: the tokens of rows that are no padding. Rows made by hand do not say it: there, those up to the last label."""
    if "source_ids" in micro:
        return micro["source_ids"] >= 0
    return (micro["labels"] != IGNORE).flip(1).cumsum(1).flip(1) > 0
