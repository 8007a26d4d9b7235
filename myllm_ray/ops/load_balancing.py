"""The loss that keeps the load of a router's experts balanced, and the load itself.

For a sequence of T tokens and a router that chooses K of E experts for each (Switch Transformer, Fedus et al., 2021,
arXiv:2101.03961, eq. 4 to 6, for K experts; the sequence-wise form is that of DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20):

    L = E Σ_e f_e P_e,    f_e = 1/T Σ_t [e is among the K experts of token t],    P_e = 1/T Σ_t p_t,e

p_t,e are the router's probabilities. f has no gradient. L is K where the load is even. transformers'
`load_balancing_loss_func` has the same scale, so a model's own coefficient keeps its meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softmax, softplus


def router_probabilities(logits: Tensor, scoring: str) -> Tensor:
    """(T, E) router logits -> (T, E) probabilities, fp32 at least.

    Args:
        scoring: how the router scores experts: softmax; sigmoid or sqrtsoftplus, whose scores are divided by their sum
            (DeepSeek-V3, eq. 19); probabilities, where the router gives these instead of logits.

    Raises:
        ValueError: another `scoring`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    match scoring:
        case "softmax":
            return softmax(logits, -1)
        case "sigmoid":
            scores = logits.sigmoid()
        case "sqrtsoftplus":
            scores = softplus(logits).sqrt()
        case "probabilities":
            return logits
        case _:
            raise ValueError(f"{scoring} is not a way to score experts")
    return scores / scores.sum(-1, keepdim=True)


def load_balancing_loss(probabilities: Tensor, experts: Tensor, sequences: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of all sequences of a micro-batch, added up by weight, and the load of the experts.

    A sequence's loss depends on its own tokens alone, so sums over micro-batches and ranks do not depend on how a batch is cut.

    Args:
        probabilities: (T, E) of the router.
        experts: (T, K) the experts chosen.
        sequences: (T,) the sequence that each token belongs to; -1: none (padding).
        weights: (N,) of the sequences.

    Returns:
        Scalar with a gradient through `probabilities`: Σ_n weights_n L_n. A sequence without tokens adds 0.
        (E,) tokens that each expert got.
    """
    count, size = len(weights), probabilities.shape[-1]
    # Tokens of no sequence go into one more, which is cut off at the end: no selection, so no synchronisation with the device.
    group = torch.where(sequences >= 0, sequences, count)
    chosen = torch.zeros_like(probabilities).scatter_(1, experts, 1.0)
    lengths = probabilities.new_zeros(count + 1).index_add(0, group, probabilities.new_ones(len(group)))
    empty = probabilities.new_zeros(count + 1, size)
    loads = empty.index_add(0, group, chosen)[:count]
    sums = empty.index_add(0, group, probabilities)[:count]
    squared = lengths[:count].clamp(min=1).square()
    losses = size * (loads * sums).sum(-1) / squared
    return losses @ weights.to(losses.dtype), loads.sum(0)
