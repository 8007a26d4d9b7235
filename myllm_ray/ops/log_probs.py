"""Log-probabilities and entropies of a linear head without the full (tokens × vocabulary) matrix of logits.

Unlike in cross entropy, the weight that each token's gradient gets is known only when all its sequence is, so the backward
pass makes the logits of a chunk once more instead of keeping them.

Shape legend: T scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from myllm_ray.common.types import TokenScores
from myllm_ray.ops.cross_entropy import CHUNK


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False,
                     chunk: int = CHUNK) -> TokenScores:
    """log softmax(hidden @ weight.T / temperature)[target], and the entropy of that distribution in nats.

    Args:
        hidden: (T, H), the hidden states that predict the targets.
        weight: (V, H).
        targets: (T,) token ids.
        temperature: of the distribution that is scored.
        entropy: also compute entropies, with gradients; else zeros.
        chunk: tokens whose logits are held at a time.
    """
    log_probs, entropies = _LinearLogProbs.apply(hidden, weight, targets, temperature, entropy, chunk)
    return TokenScores(log_probs, entropies)


def log_probs_from_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False) -> TokenScores:
    """The same from logits (T, V), for heads that are more than a matrix. In fp32."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    return TokenScores(chosen, -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(chosen))


class _LinearLogProbs(torch.autograd.Function):
    # What looks roundabout below saves passes over (chunk × vocabulary) elements, which cost as much as the products: the
    # temperature divides hidden states instead of logits, and a token's weight scales its row of a product instead of its softmax.
    @staticmethod
    def forward(ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature: float, entropy: bool,
                chunk: int) -> tuple[Tensor, Tensor]:
        device = hidden_TH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        hidden, weight = (hidden_TH / temperature).to(dtype), weight_VH.to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        norms, log_probs, entropies = (torch.zeros(len(hidden), dtype=precise, device=hidden.device) for _ in range(3))
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = (hidden[part] @ weight.T).to(precise)
            at_target = logits.gather(1, targets_T[part, None]).squeeze(1)
            log_p = torch.log_softmax(logits, -1)
            log_probs[part] = log_p.gather(1, targets_T[part, None]).squeeze(1)
            norms[part] = at_target - log_probs[part]
            if entropy:
                # H = log Z - Σ p z; the sum as a product of a row with a column
                entropies[part] = norms[part] - torch.bmm(log_p.exp_()[:, None], logits[:, :, None]).flatten()
        ctx.save_for_backward(hidden, weight, targets_T, norms, entropies)
        ctx.settings = temperature, entropy, chunk, hidden_TH.dtype, weight_VH.dtype
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, targets, norms, entropies = ctx.saved_tensors
        temperature, entropy, chunk, hidden_dtype, weight_dtype = ctx.settings
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        precise, dtype = norms.dtype, hidden.dtype
        entropy = entropy and bool(grad_entropies.any())
        factor = grad_log_probs.to(precise)[:, None]
        grad_hidden = factor * weight[targets] if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if needs_weight else None
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, factor * hidden)
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            # d log p_y / d z = onehot(y) - p;   d H / d z = -p (log p + H)
            p = (hidden[part] @ weight.T).to(precise).sub_(norms[part, None])
            scale = factor[part]
            if entropy:
                p = p.exp() * (scale + grad_entropies[part, None] * (p + entropies[part, None]))
                scale = torch.ones_like(scale)
            else:
                p = p.exp_()
            p = p.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] -= scale * (p @ weight)
            if grad_weight is not None:
                scaled = (scale * hidden[part]).to(dtype)
                if dtype == precise:
                    grad_weight.addmm_(p.T, scaled, alpha=-1)
                else:
                    grad_weight -= (p.T @ scaled).to(precise)
        return (None if grad_hidden is None else (grad_hidden / temperature).to(hidden_dtype),
                None if grad_weight is None else grad_weight.to(weight_dtype), None, None, None, None)
