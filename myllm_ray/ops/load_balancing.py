"""The load-balancing loss of mixture-of-experts routers, and the load of the experts.

For a sequence of T tokens and a router that selects K of E experts per token (Switch Transformer, Fedus et al., 2021,
arXiv:2101.03961, eq. 4 to 6, extended to K experts; sequence-wise as in DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20):

    L = E Σ_e f_e P_e,    f_e = 1/T Σ_t [e is among the K experts of token t],    P_e = 1/T Σ_t p_t,e

p_t,e are the router probabilities. f has no gradient. L equals K if the load is uniform. The scale is the same as in
`load_balancing_loss_func` of transformers, so the coefficient in a model's config keeps its meaning.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softmax, softplus


def router_probabilities(logits: Tensor, scoring: str) -> Tensor:
    """Returns the router probabilities (T, E), in fp32 or higher precision.

    Args:
        logits: (T, E) router logits.
        scoring: The score function of the router. "softmax"; "sigmoid" or "sqrtsoftplus", whose scores are divided by
            their sum (DeepSeek-V3, eq. 19); or "probabilities", if the router returns probabilities instead of logits.

    Raises:
        ValueError: `scoring` is unknown.
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
            raise ValueError(f"unknown expert scoring: {scoring}")
    return scores / scores.sum(-1, keepdim=True)


def load_balancing_loss(
    probabilities: Tensor, experts: Tensor, sequences: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the losses of all sequences of a micro-batch, and the load of the experts.

    The loss of a sequence depends only on its own tokens, so sums over micro-batches and ranks do not depend on how a
    batch is split.

    Args:
        probabilities: (T, E) router probabilities.
        experts: (T, K) indices of the selected experts.
        sequences: (T,) index of the sequence of each token, or -1 for padding.
        weights: (N,) weight of each sequence.

    Returns:
        Scalar Σ_n weights_n L_n with a gradient through `probabilities`, where a sequence without tokens adds 0; and
        (E,) the number of tokens routed to each expert.
    """
    count, size = len(weights), probabilities.shape[-1]
    # Padding is assigned to an extra group, which is dropped below. Boolean indexing would synchronize with the device.
    group = torch.where(sequences >= 0, sequences, count)
    chosen = torch.zeros_like(probabilities).scatter_(1, experts, 1.0)
    lengths = probabilities.new_zeros(count + 1).index_add(0, group, probabilities.new_ones(len(group)))
    empty = probabilities.new_zeros(count + 1, size)
    loads = empty.index_add(0, group, chosen)[:count]
    sums = empty.index_add(0, group, probabilities)[:count]
    # Each of f and P has a factor 1/T. The clamp avoids 0/0 for sequences without tokens.
    squared = lengths[:count].clamp(min=1).square()
    losses = size * (loads * sums).sum(-1) / squared
    return losses @ weights.to(losses.dtype), loads.sum(0)
