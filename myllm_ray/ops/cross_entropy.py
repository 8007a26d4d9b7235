"""Cross entropy of a linear head, computed without the full (tokens × vocabulary) logits matrix.

Shape legend: T target tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from myllm_ray.common.types import IGNORE, TokenLosses
from myllm_ray.ops.logits import UNCHANGED, LogitChange, head_outputs, soft_cap_

CHUNK = 512
"""Number of tokens per chunk of logits. With a vocabulary of 50k in fp32: 512 × 50k × 4 bytes = 100 MB."""


def at_targets(values: Tensor, targets: Tensor, predictors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the values (T, N) at the positions that have a target, and their targets (T,).

    Args:
        values: (B, S, N).
        targets: (B, S) token ids, already shifted, or `IGNORE`; with `predictors`, (T,) token ids.
        predictors: (T,) indices of the positions in the flattened (B · S) values, all different. None: they are
            found with a boolean mask, which synchronizes with the device.
    """
    if predictors is None:
        kept = targets != IGNORE
        return values[kept], targets[kept]
    return values.flatten(0, 1).index_select(0, predictors), targets


def cross_entropy_from_logits(logits: Tensor, targets: Tensor, predictors: Tensor | None = None) -> TokenLosses:
    """Returns -log softmax(logits)[target] at the positions that have a target.

    Args:
        logits: (B, S, V), any float dtype. The loss is computed in fp32.
        targets: See `at_targets`.
        predictors: See `at_targets`.
    """
    selected, targets = at_targets(logits, targets, predictors)
    selected = selected.float()
    nll = torch.nn.functional.cross_entropy(selected, targets, reduction="none")
    return TokenLosses(nll.sum(), nll.detach(), selected.detach().argmax(-1) == targets)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int = CHUNK,
    predictors: Tensor | None = None,
    bias: Tensor | None = None,
    change: LogitChange = UNCHANGED,
) -> TokenLosses:
    """Returns -log softmax(logits)[target], summed over the positions that have a target.

    The logits are `change` of hidden @ weight.T + bias. The head is computed only at these positions. The gradients of
    `hidden`, `weight` and `bias` are computed in the forward pass, chunk by chunk, while the logits of the chunk are in
    memory; the backward pass only scales them (as in Liger Kernel, Hsu et al., 2024, arXiv:2410.10989).

    Args:
        hidden: (B, S, H) hidden states.
        weight: (V, H). Its gradient has the dtype of `weight` and is accumulated in fp32 or higher precision.
        targets: See `at_targets`.
        chunk: Number of tokens whose logits are in memory at a time.
        predictors: See `at_targets`.
        bias: (V,) bias of the head, or None.
        change: Scale and soft cap of the head's outputs.
    """
    hidden, targets = at_targets(hidden, targets, predictors)
    nll_sum, nll, correct = _LinearCrossEntropy.apply(hidden, weight, bias, targets, change, chunk)
    return TokenLosses(nll_sum, nll, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        change: LogitChange,
        chunk: int,
    ) -> tuple[Tensor, ...]:
        device = hidden_TH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_TH.dtype
        # Cast once, not in each chunk. The products below run in this dtype, the softmax in `precise`.
        hidden, weight = hidden_TH.to(dtype), weight_VH.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        precise = torch.promote_types(dtype, torch.float32)
        grad_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device) if needs_weight else None
        grad_bias = torch.zeros(len(weight), dtype=precise, device=weight.device) if needs_bias else None
        training = needs_hidden or needs_weight or needs_bias
        nll = torch.empty(len(hidden), dtype=precise, device=hidden.device)
        correct = torch.empty(len(hidden), dtype=torch.bool, device=hidden.device)
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = head_outputs(hidden[part], weight, bias).to(precise)
            if change.scale != 1.0:
                logits.mul_(change.scale)
            slope = None if change.cap is None else soft_cap_(logits, change.cap, slope=training)
            target = targets_T[part, None]
            norm = torch.logsumexp(logits, -1, keepdim=True)
            nll[part] = (norm - logits.gather(1, target)).squeeze(1)
            correct[part] = logits.argmax(-1) == target.squeeze(1)
            if not training:
                continue  # evaluation: no gradients are needed
            # d nll / d logits = softmax(logits) - onehot(target), in place of the logits to save memory.
            grad = logits.sub_(norm).exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=precise))
            if slope is not None:
                grad.mul_(slope)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += (grad.T @ hidden[part]).to(precise)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden_TH.dtype, weight_VH.dtype, None if bias_V is None else bias_V.dtype
        ctx.scale = change.scale
        # Only the sum has a gradient: per-token losses could be weighted, which the stored gradients do not allow.
        ctx.mark_non_differentiable(nll, correct)
        return nll.sum(), nll, correct

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        # The stored gradients lack the scale of the logits, which is the same for all of them.
        factor = grad_sum * ctx.scale
        # The weight gradient is scaled in place, as it is as large as the head.
        return (
            None if grad_hidden is None else (grad_hidden * factor).to(hidden_dtype),
            None if grad_weight is None else grad_weight.mul_(factor).to(weight_dtype),
            None if grad_bias is None else (grad_bias * factor).to(bias_dtype),
            None,
            None,
            None,
        )
