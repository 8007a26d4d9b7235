"""Logits of a linear head: bias, scale and soft cap, with the derivatives that the fused heads use.

Shape legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitChange(NamedTuple):
    """What an architecture does with the output of its head: cap · tanh(scale · x / cap), or scale · x without a cap.

    Soft caps are those of Gemma 2 (Gemma Team, 2024, arXiv:2408.00118); Cohere and Granite have a scale.
    """

    scale: float = 1.0
    """Factor of the head's output."""
    cap: float | None = None
    """Bound of the logits; None: no bound."""

    def apply(self, outputs: Tensor) -> Tensor:
        """Returns the logits, (..., V), for outputs of the head."""
        if self.scale != 1.0:
            outputs = outputs * self.scale
        return outputs if self.cap is None else torch.tanh(outputs / self.cap) * self.cap


UNCHANGED = LogitChange()


def head_outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns hidden @ weight.T + bias, (T, V), in the dtype of the arguments."""
    return hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)


def soft_cap_(logits: Tensor, cap: float, slope: bool = True) -> Tensor | None:
    """Replaces logits by cap · tanh(logits / cap), in place.

    Args:
        logits: (T, V).
        cap: Bound of the result.
        slope: Whether to return the derivative.

    Returns:
        (T, V) derivative of the result with respect to the argument, 1 - tanh², or None.
    """
    tanh = logits.div_(cap).tanh_()
    derivative = tanh.square().neg_().add_(1) if slope else None
    tanh.mul_(cap)
    return derivative
