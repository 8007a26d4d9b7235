"""Log-probabilities and entropies of a linear head, computed without the full (tokens × vocabulary) logits matrix.

Unlike in cross entropy, the weight of each token's gradient is known only after the whole sequence has been scored. The
backward pass therefore recomputes the logits of each chunk instead of storing them.

Shape legend: T scored tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from myllm_ray.common.types import TokenScores
from myllm_ray.ops.cross_entropy import CHUNK
from myllm_ray.ops.logits import UNCHANGED, LogitChange, head_outputs, soft_cap_


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
    bias: Tensor | None = None,
    change: LogitChange = UNCHANGED,
) -> TokenScores:
    """Returns log softmax(logits / temperature)[target] and the entropy of that distribution, in nats.

    The logits are `change` of hidden @ weight.T + bias.

    Args:
        hidden: (T, H) hidden states that predict the targets.
        weight: (V, H) weight of the head.
        targets: (T,) token ids.
        temperature: Temperature of the distribution.
        entropy: Whether to compute entropies, with gradients. If false, they are zeros.
        chunk: Number of tokens whose logits are in memory at a time.
        bias: (V,) bias of the head, or None.
        change: Scale and soft cap of the head's outputs.
    """
    log_probs, entropies = _LinearLogProbs.apply(
        hidden, weight, bias, targets, temperature, entropy, chunk, change.scale, change.cap
    )
    return TokenScores(log_probs, entropies)


def log_probs_from_logits(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
) -> TokenScores:
    """Returns the same scores as `linear_log_probs`, from logits (T, V), for heads that are not a single matrix.

    Computed in fp32 or higher precision.
    """
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
    chosen = log_p.gather(1, targets[:, None]).squeeze(1)
    return TokenScores(chosen, -(log_p.exp() * log_p).sum(-1) if entropy else torch.zeros_like(chosen))


class _LinearLogProbs(torch.autograd.Function):
    # Passes over (chunk × vocabulary) elements cost as much as the matrix products, so the code avoids them: scale and
    # temperature are factors of the hidden states instead of the logits, and the weight of a token scales its row of a
    # product instead of its softmax. With a soft cap the temperature applies after it: T · tanh' has no such form.
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        entropy: bool,
        chunk: int,
        scale: float,
        cap: float | None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden_TH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        # softmax(cap · tanh(scale · x / cap) / T) = softmax(c · tanh(x / divisor / c)) with c = cap / T and
        # divisor = T / scale.
        divisor = temperature / scale
        cap = None if cap is None else cap / temperature
        hidden, weight = (hidden_TH / divisor).to(dtype), weight_VH.to(dtype)
        bias = None if bias_V is None else (bias_V / divisor).to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        norms, log_probs, entropies = (torch.zeros(len(hidden), dtype=precise, device=hidden.device) for _ in range(3))
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = head_outputs(hidden[part], weight, bias).to(precise)
            if cap is not None:
                soft_cap_(logits, cap, slope=False)
            at_target = logits.gather(1, targets_T[part, None]).squeeze(1)
            log_p = torch.log_softmax(logits, -1)
            log_probs[part] = log_p.gather(1, targets_T[part, None]).squeeze(1)
            norms[part] = at_target - log_probs[part]
            if entropy:
                # H = log Z - Σ p z. The batched dot product avoids a (chunk × vocabulary) temporary for p z.
                entropies[part] = norms[part] - torch.bmm(log_p.exp_()[:, None], logits[:, :, None]).flatten()
        # The logits of the targets are log_probs + norms; their derivative by the soft cap follows from them.
        slopes = None if cap is None else 1 - ((log_probs + norms) / cap).square()
        ctx.save_for_backward(hidden, weight, bias, targets_T, norms, entropies, slopes)
        ctx.settings = divisor, entropy, chunk, cap
        ctx.dtypes = hidden_TH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        return log_probs, entropies

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, norms, entropies, slopes = ctx.saved_tensors
        divisor, entropy, chunk, cap = ctx.settings
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        precise, dtype = norms.dtype, hidden.dtype
        # Entropies that are only logged have zero gradients, and their terms are skipped.
        entropy = entropy and bool(grad_entropies.any())
        factor = grad_log_probs.to(precise)[:, None]
        # The one-hot terms need no logits: they are gathers from and scatters to the rows of the targets.
        at_target = factor if slopes is None else factor * slopes[:, None]
        grad_hidden = at_target * weight[targets] if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(len(weight), dtype=precise, device=weight.device) if needs_bias else None
        if grad_weight is not None:
            grad_weight.index_add_(0, targets, at_target * hidden)
        if grad_bias is not None:
            grad_bias.index_add_(0, targets, at_target[:, 0])
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            # d log p_y / d z = onehot(y) - p;   d H / d z = -p (log p + H)
            # `p` contains log p until the exponential below.
            p = head_outputs(hidden[part], weight, bias).to(precise)
            slope = None if cap is None else soft_cap_(p, cap)
            p = p.sub_(norms[part, None])
            scale = factor[part]
            if entropy:
                p = p.exp() * (scale + grad_entropies[part, None] * (p + entropies[part, None]))
                # The entropy term differs per element, so the token's weight is already part of `p`.
                scale = torch.ones_like(scale)
            else:
                p = p.exp_()
            if slope is not None:
                p.mul_(slope)
            if grad_bias is not None:
                grad_bias -= (p * scale).sum(0)
            p = p.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] -= scale * (p @ weight)
            if grad_weight is not None:
                scaled = (scale * hidden[part]).to(dtype)
                # The sum over chunks is accumulated in `precise`; in equal dtypes, addmm_ needs no temporary.
                if dtype == precise:
                    grad_weight.addmm_(p.T, scaled, alpha=-1)
                else:
                    grad_weight -= (p.T @ scaled).to(precise)
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden / divisor).to(hidden_dtype),
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else (grad_bias / divisor).to(bias_dtype),
            *(None,) * 6,
        )
