"""The load-balancing loss of mixture-of-experts routers as a term of any trainer's loss (ops/load_balancing.py).

    loss = Σ_n L_n + c Σ_n w_n B_n,   both divided by Σ_n w_n over the global batch

L_n is the trainer's loss of sequence n, B_n the load-balancing loss of the routers on it, and c is
`model.router_loss_weight`. w_n is the part of the trainer's `batch_weight` that belongs to the sequence: its number of
target tokens, or 1 for a pair. The second term is therefore c times a weighted mean over the sequences of the global
batch, and does not depend on how the batch is split.

In evaluation the loss does not include this term, so it is comparable with the loss of other models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import IGNORE, Micro, RouterLosses, StepOutput

_LOADS = "_experts"
"""Name of the metric of the experts' loads. The underscore excludes it from the log; `expert_metrics` reads it."""


def has_routers(model: nn.Module) -> bool:
    """Returns whether the model has routers whose load is recorded."""
    # Wrappers such as DeepSpeed's engine hold the model in `module`.
    return bool(getattr(getattr(model, "module", model), "routers", None))


def routing_inputs(model: nn.Module, sequences: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Returns the arguments that make a model return the loss of its routers. Empty for a model without routers.

    Args:
        model: The model, possibly inside a wrapper with the attribute `module`.
        sequences: (B, S) index of each token's sequence, -1 for padding.
        weights: (N,) the part of the trainer's `batch_weight` of each sequence.
    """
    return {"sequences": sequences, "sequence_weights": weights} if has_routers(model) else {}


def rows_as_sequences(real: Tensor) -> Tensor:
    """Returns (B, S) the index of each token's sequence if each row is one sequence, -1 for padding.

    Args:
        real: (B, S) bool, false for padding.
    """
    return torch.where(real, torch.arange(len(real), device=real.device)[:, None], -1)


def with_router_loss(model: nn.Module, output: StepOutput, router: RouterLosses | None, weights: Tensor) -> StepOutput:
    """Returns a trainer's output with the loss of the routers.

    The loss is added to `loss_sum` if gradients are enabled. The loss and the load of the experts become metrics.

    Args:
        model: The model, possibly inside a wrapper with the attribute `module`.
        output: The trainer's output.
        router: What the model returned for `routing_inputs`; None: the output is returned unchanged.
        weights: (N,) the weights of the sequences, as in `routing_inputs`.
    """
    if router is None:
        return output
    inner: Any = getattr(model, "module", model)
    # Evaluation runs without gradients, where the loss must stay comparable with that of other models.
    loss = output.loss_sum + inner.router_loss_weight * router.loss_sum if torch.is_grad_enabled() else output.loss_sum
    return StepOutput(
        loss, {**output.metrics, "router_loss": (router.loss_sum.detach(), weights.sum()), _LOADS: (router.loads, 1.0)}
    )


def expert_metrics(model: nn.Module, metrics: dict[str, float]) -> dict[str, float]:
    """Returns metrics of the load of the experts, per layer and over all layers, from the averaged metrics.

    `load_max` and `load_min` are the largest and the smallest number of tokens of an expert of the layer, divided by
    the mean over the layer's experts. Both are 1 if the load is uniform. `unused` is the share of experts without
    tokens.

    Args:
        model: The model, possibly inside a wrapper with the attribute `module`.
        metrics: The averaged metrics. Empty results if they contain no loads.
    """
    # The reduction flattens the (layers, experts) tensor to names `<name>/<index>`. Sorting by the integer restores the
    # order; as strings, 10 would precede 2.
    counts = [
        metrics[name]
        for name in sorted((n for n in metrics if n.startswith(f"{_LOADS}/")), key=lambda n: int(n.rpartition("/")[2]))
    ]
    inner: Any = getattr(model, "module", model)
    if not counts:
        return {}
    found: dict[str, list[float]] = {"load_max": [], "load_min": [], "unused": []}
    # All layers have the same number of experts, because their loads are stacked in one tensor.
    size, named = len(counts) // len(inner.routers.layers), {}
    for number, layer in enumerate(inner.routers.layers):
        loads = counts[number * size : (number + 1) * size]
        mean = max(sum(loads) / size, 1e-9)
        values = {
            "load_max": max(loads) / mean,
            "load_min": min(loads) / mean,
            "unused": sum(load == 0 for load in loads) / size,
        }
        for name, value in values.items():
            found[name].append(value)
            named[f"experts/layer_{layer}/{name}"] = value
    whole = {
        "load_max": max(found["load_max"]),
        "load_min": min(found["load_min"]),
        "unused": sum(found["unused"]) / len(found["unused"]),
    }
    return {**{f"experts/{name}": value for name, value in whole.items()}, **named}


def real_tokens(micro: Micro) -> Tensor:
    """Returns (B, S) bool: false for padding.

    Manually constructed rows have no `source_ids`. Their tokens after the last label count as padding.
    """
    if "source_ids" in micro:
        return micro["source_ids"] >= 0
    # A reversed cumulative sum: positive at a position if a label exists there or later in the row.
    return (micro["labels"] != IGNORE).flip(1).cumsum(1).flip(1) > 0
