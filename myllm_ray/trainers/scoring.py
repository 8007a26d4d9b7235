"""Log-probabilities of selected tokens, for trainers on preferences and on rollouts."""

from __future__ import annotations

from torch import Tensor, nn

from myllm_ray.common.modules import logits_of
from myllm_ray.common.types import Micro, TokenScores
from myllm_ray.ops.documents import Documents
from myllm_ray.ops.log_probs import log_probs_from_logits


def score_tokens(
    model: nn.Module,
    inputs: Micro,
    predictors: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    routing: dict[str, Tensor] | None = None,
    packed: bool | None = None,
    documents: Documents | None = None,
) -> TokenScores:
    """Returns the scores of the targets under a model.

    The model either computes the scores itself (`computes_token_losses`) or returns logits (B, S, V).

    Args:
        model: The model, possibly inside a wrapper with the attribute `module`.
        inputs: `input_ids` and `position_ids` (B, S), and `attention_mask` if attention is not causal. Other entries
            are ignored.
        predictors: (T,) index in the flattened (B · S) input of the token that predicts each target.
        targets: (T,) token ids.
        temperature: Temperature of the distribution.
        entropy: Whether to compute entropies. If false, they are zeros.
        routing: Arguments from `routing_inputs` (trainers/routing.py). A model that returns logits ignores them.
        packed: Whether a row has more than one document, for a model with `takes_places`; None: unknown.
        documents: The documents of the rows, for a model that takes them. A model that returns logits ignores them.
    """
    inputs = {k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask") if k in inputs}
    # A model that computes the scores itself can avoid the full (B, S, V) logits.
    inner = getattr(model, "module", model)
    if getattr(inner, "computes_token_losses", False):
        known = {"packed": packed} if getattr(inner, "takes_places", False) else {}
        scores: TokenScores = model(
            predictors=predictors,
            targets=targets,
            temperature=temperature,
            entropy=entropy,
            **inputs,
            **(routing or {}),
            **known,
            **({} if documents is None else {"documents": documents}),
        )
        return scores
    # Only the logits at the predictors are normalized, not those of prompts and padding.
    return log_probs_from_logits(logits_of(model, inputs).flatten(0, 1)[predictors], targets, temperature, entropy)


def filled_rows(micro: Micro) -> Tensor:
    """Returns a bool mask (rows,), false for the empty rows that fill up the last batch of an epoch."""
    # An empty row consists of padding only, whose segment is -1.
    return (micro["segment_ids"] >= 0).any(1)
