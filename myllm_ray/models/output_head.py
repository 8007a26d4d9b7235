"""What a causal LM does between its last hidden states and its logits, found by calling its `forward`.

Architectures scale the logits (Cohere, Granite), cap them (Gemma 2), cut them (padded vocabularies), scale the hidden
states before the head, or run further layers. The names of the config keys differ, and one name can mean a factor in
one architecture and a divisor in another, so `forward` itself is called with a known output of the layers and of the
head. Neither the layers nor the head compute anything, so the model may be on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from myllm_ray.ops.logits import LogitChange

_HUGE = 1e12
"""A logit at which every soft cap is reached."""
_OUTPUTS = (1.0, _HUGE, 2 * _HUGE, -40.0, -3.0, 0.0, 0.25, 7.0, 90.0)
"""Outputs of the head, one per position. The first three determine the change, the others verify it."""
_TOLERANCE = 1e-5
"""Relative; some architectures compute the logits in fp32."""


def find_change(model: Any) -> LogitChange | None:
    """Returns the change of the head's outputs by a causal LM of transformers.

    Args:
        model: The model, possibly on the meta device.

    Returns:
        The change, with which the logits are `change` of `head(base_model(...).last_hidden_state)`; None if they are
        not, or if the head is not a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return None
    try:
        before, logits, outputs = _logits_of_known_outputs(model, head)
    except Exception:  # the code of an architecture may raise anything when its layers return only hidden states
        return None
    if logits.shape != outputs.shape or logits.is_meta:
        return None
    change = _change_of(logits[0, :3, 0].tolist())
    if not _same(change, logits, outputs):
        return None
    if before == 1.0:
        return change
    # The factor of the hidden states applies to the head's output too, except to its bias.
    return None if head.bias is not None else change._replace(scale=change.scale * before)


def _logits_of_known_outputs(model: Any, head: nn.Linear) -> tuple[float, Tensor, Tensor]:
    """Returns the factor of the hidden states before the head, the logits, and the outputs of the head."""
    with torch.device("cpu"), torch.no_grad():
        width = 1 + torch.arange(head.in_features, dtype=torch.float64)
        hidden = width.expand(1, len(_OUTPUTS), -1).clone()
        outputs = torch.tensor(_OUTPUTS, dtype=torch.float64)[None, :, None].expand(-1, -1, head.out_features).clone()
        seen: list[Tensor] = []

        def layers(*_: Any, **__: Any) -> _Output:
            return _Output(last_hidden_state=hidden.clone())

        def head_forward(given: Tensor) -> Tensor:
            seen.append(given)
            return outputs.clone()

        with ExitStack() as stack:
            for module in _wrappers(model.base_model):
                stack.enter_context(_replaced(module, layers))
            stack.enter_context(_replaced(head, head_forward))
            found = model(input_ids=torch.ones(1, len(_OUTPUTS), dtype=torch.long), use_cache=False)
        (given,) = seen
        factor = float(given[0, 0, 0])
        if given.shape != hidden.shape or not torch.allclose(given.double(), factor * hidden, rtol=_TOLERANCE):
            raise ValueError("the input of the head is not a multiple of the hidden states")
        logits: Tensor = found.logits
        return factor, logits.double(), outputs


def _wrappers(module: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and the only child of each module that has no other content.

    The language models of BART and its relatives call the decoder inside their base model directly.
    """
    yield module
    children = list(module.children())
    if (
        len(children) == 1
        and not isinstance(children[0], nn.ModuleList)
        and next(module.parameters(recurse=False), None) is None
    ):
        yield from _wrappers(children[0])


class _Output(BaseModelOutputWithPast):
    """Output of the layers in which everything except the hidden states is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Replaces `forward` of a module inside the block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _change_of(logits: list[float]) -> LogitChange:
    """Returns the change of the head's outputs from the logits of the first three `_OUTPUTS`."""
    one, huge, larger = logits
    if huge != larger or not 0 < huge < math.inf:
        return LogitChange(one)
    # one = cap · tanh(scale / cap)
    scale = math.atanh(one / huge) * huge if abs(one) < huge else math.inf
    return LogitChange(1.0 if abs(scale - 1) < _TOLERANCE else scale, huge)


def _same(change: LogitChange, logits: Tensor, outputs: Tensor) -> bool:
    if not math.isfinite(change.scale) or change.scale == 0:
        return False
    return torch.allclose(change.apply(outputs), logits, rtol=_TOLERANCE, atol=_TOLERANCE)
