"""What trainers on preferences share: rows of a prompt and two answers, run through a model in one row or in two."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from myllm_ray.common.modules import logits_of
from myllm_ray.common.types import Batch, Micro, RouterLosses, TokenScores
from myllm_ray.ops.log_probs import log_probs_from_logits
from myllm_ray.ops.pairs import Answers, answers, one_answer_per_row, shared_prompt_mask, sum_by
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.routing import routing_inputs


def score_tokens(model: nn.Module, inputs: Micro, predictors: Tensor, targets: Tensor, temperature: float = 1.0,
                 entropy: bool = False, routing: dict[str, Tensor] | None = None) -> TokenScores:
    """Scores of the targets, from a model that computes them itself or from any model that gives logits (B, S, V).

    Args:
        inputs: `input_ids`, `position_ids` (B, S), and `attention_mask` where it is not causal.
        predictors, targets: (T,), see `CausalLM.forward`.
        routing: see `trainers/routing.py`.
    """
    inputs = {k: inputs[k] for k in ("input_ids", "position_ids", "attention_mask") if k in inputs}
    if getattr(getattr(model, "module", model), "computes_token_losses", False):
        scores: TokenScores = model(predictors=predictors, targets=targets, temperature=temperature, entropy=entropy, **inputs,
                                    **(routing or {}))
        return scores
    return log_probs_from_logits(logits_of(model, inputs).flatten(0, 1)[predictors], targets, temperature, entropy)


class AnswerScores(NamedTuple):
    """Log-probability (rows, 2) of each answer, summed over its tokens, and its number of tokens (rows, 2)."""

    log_probs: Tensor
    lengths: Tensor
    router: RouterLosses | None = None


class ReferenceTable(NamedTuple):
    """Log-probabilities of answers under a reference, summed over their tokens, computed before the run (reference_table.py)."""

    values: Tensor
    """(n, 2) of the first and the second answer: by number of the document, or by row of the run."""
    first_rows: list[int] | None = None
    """By row of the run: the entry of each epoch's first row."""

    def of(self, batch: Batch, micro: Micro) -> Tensor:
        """(rows, 2) of a micro-batch of a batch; anything in rows that only fill up."""
        if self.first_rows is None:
            return self.values[micro["documents"][:, 0]]
        return self.values[self.first_rows[batch.position.epoch] + batch.position.row + micro["places"][:, 0]]


class PreferenceTrainer(BaseTrainer):
    """Base of the trainers on preferences.

    Args:
        shared_prompt: prompt and both answers are one row, in which the answers do not see each other; else two rows.
    """

    reads: ClassVar[tuple[str, ...]] = ("pairs",)
    trains_routers = True
    layout: ClassVar[str] = "padded"

    def __init__(self, model: nn.Module, dataset: Any = None, *, shared_prompt: bool = False, **named: Any):
        super().__init__(model, dataset, **named)
        self.shared_prompt = shared_prompt

    def inputs(self, micro: Micro) -> tuple[Micro, int]:
        """What a model is called with, `segment_ids` with it, and the number of answers in a row of it."""
        if not self.shared_prompt:
            return one_answer_per_row(micro), 1
        inputs = {name: micro[name] for name in ("input_ids", "position_ids", "segment_ids")}
        return {**inputs, "attention_mask": shared_prompt_mask(micro["segment_ids"])}, 2

    def routing(self, micro: Micro, inputs: Micro, per_row: int, first_only: bool = False) -> dict[str, Tensor]:
        """What makes the model return its routers' loss: a pair is one sequence, its prompt counted once.

        Args:
            inputs, per_row: see `inputs`.
            first_only: the second answer of a row is not trained on (KTO).
        """
        segments = inputs["segment_ids"]
        numbers = torch.arange(len(segments), device=segments.device)[:, None]
        counted = segments >= 0
        if per_row == 1:  # the row of a second answer has the prompt once more
            second = numbers % 2 == 1
            counted &= ~second | ((segments > 0) & (not first_only))
            numbers = numbers // 2
        elif first_only:
            counted &= segments < 2
        return routing_inputs(self.model, torch.where(counted, numbers, -1), filled(micro).float())

    def row_places(self, micro: Micro) -> Tensor | None:
        """Of the rows of `inputs`: the answers of row r are the rows 2r and 2r + 1 where the prompt is not shared."""
        places = super().row_places(micro)
        if places is None or self.shared_prompt:
            return places
        return torch.stack([2 * places, 2 * places + 1], 1).flatten()

    def batch_weight(self, micro: Micro) -> Tensor:
        """Pairs. Rows that only fill up the last batch of an epoch have no prompt."""
        return filled(micro).sum()


def filled(micro: Micro) -> Tensor:
    """(rows,) bool: whether a row holds anything."""
    return (micro["segment_ids"] >= 0).any(1)


def answer_log_probs(model: nn.Module, inputs: Micro, per_row: int, rows: int, routing: dict[str, Tensor] | None = None) -> AnswerScores:
    """What a model says of the answers of rows; `routing`: see `trainers/routing.py`."""
    found: Answers = answers(inputs["input_ids"], inputs["segment_ids"], per_row)
    scores = score_tokens(model, inputs, found.predictors, found.targets, routing=routing)
    total = sum_by(scores.log_probs, found.answer, 2 * rows).view(rows, 2)
    lengths = sum_by(torch.ones_like(scores.log_probs), found.answer, 2 * rows).view(rows, 2)
    return AnswerScores(total, lengths, scores.router)
