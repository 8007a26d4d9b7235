"""Base class and helpers of trainers on preferences.

A row of the data contains a prompt and two answers. The model computes it as one row with a shared prompt, or as two
rows.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from myllm_ray.common.micros import is_derived, with_derived
from myllm_ray.common.types import Batch, Micro, RouterLosses
from myllm_ray.ops.pairs import Answers, answers, one_answer_per_row, shared_prompt_mask, sum_by
from myllm_ray.ops.workload import Workload, pair_work
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.routing import routing_inputs
from myllm_ray.trainers.scoring import filled_rows, score_tokens

_PREPARED_FROM = ("input_ids", "segment_ids")
_ROWS = "model_rows/"
"""Prefix of the names of the model's inputs, if they are two rows per row of the data."""


class AnswerScores(NamedTuple):
    """Scores of the two answers of each row."""

    log_probs: Tensor
    """(rows, 2) log-probability of each answer in nats, summed over its tokens."""
    lengths: Tensor
    """(rows, 2) number of tokens of each answer."""
    router: RouterLosses | None = None
    """Loss and load of the routers, if they were requested and the model has routers."""


class ReferenceTable(NamedTuple):
    """Log-probabilities of answers under a reference, computed before the run (reference_table.py)."""

    values: Tensor
    """(n, 2) log-probabilities of the first and the second answer in nats, summed over their tokens.

    The first dimension is the document number if `first_rows` is None, else the row of the run.
    """
    first_rows: list[int] | None = None
    """Index in `values` of the first row of each epoch."""

    def of(self, batch: Batch, micro: Micro) -> Tensor:
        """Returns the entries (rows, 2) of a micro-batch of a batch; those of empty rows are arbitrary."""
        # Empty rows have the document number -1 and read the last entry. The loss ignores them.
        if self.first_rows is None:
            return self.values[micro["documents"][:, 0]]
        return self.values[self.first_rows[batch.position.epoch] + batch.position.row + micro["places"][:, 0]]


class PreferenceTrainer(BaseTrainer):
    """Base class of trainers on preferences.

    Args:
        model: The module to train.
        dataset: See `BaseTrainer`.
        shared_prompt: Whether the prompt and both answers are one row, with a mask so that neither answer attends to
            the other. If false, they are two rows with a copy of the prompt each.
        named: See `BaseTrainer`.
    """

    reads: ClassVar[tuple[str, ...]] = ("pairs",)
    trains_routers = True
    layout: ClassVar[str] = "padded"
    dependencies: ClassVar[tuple[str, ...]] = ("shared_prompt",)

    def __init__(self, model: nn.Module, dataset: Any = None, *, shared_prompt: bool = False, **named: Any):
        super().__init__(model, dataset, **named)
        self.shared_prompt = shared_prompt

    def prepare_micro(self, micro: Micro) -> Micro:
        """Returns a micro-batch with the tensors whose shapes depend on its tokens.

        The added tensors are the fields of `Answers`; `filled` (F,), the indices of the rows that are not empty; and
        without a shared prompt `model_rows/<name>`, the rows of `one_answer_per_row`.
        """
        if is_derived(micro, _PREPARED_FROM):
            return micro
        added: Micro = {"filled": filled_rows(micro).nonzero().squeeze(1)}
        inputs, per_row = micro, 2
        if not self.shared_prompt:
            inputs, per_row = one_answer_per_row(micro), 1
            added.update({_ROWS + name: tensor for name, tensor in inputs.items()})
        added.update(answers(inputs["input_ids"], inputs["segment_ids"], per_row)._asdict())
        return with_derived(micro, _PREPARED_FROM, added)

    def inputs(self, micro: Micro) -> tuple[Micro, int]:
        """Returns the inputs of the model, including `segment_ids`, and the number of answers per row of them."""
        if not self.shared_prompt:
            micro = self.prepare_micro(micro)
            return {name.removeprefix(_ROWS): t for name, t in micro.items() if name.startswith(_ROWS)}, 1
        # The causal mask of the model would let the second answer attend to the first one.
        inputs = {name: micro[name] for name in ("input_ids", "position_ids", "segment_ids")}
        return {**inputs, "attention_mask": shared_prompt_mask(micro["segment_ids"])}, 2

    def routing(self, micro: Micro, inputs: Micro, per_row: int, first_only: bool = False) -> dict[str, Tensor]:
        """Returns the arguments that make the model return the loss of its routers.

        A pair is one sequence, in which the prompt counts once.

        Args:
            micro: The micro-batch.
            inputs, per_row: The result of `self.inputs`.
            first_only: Whether the second answer of a row is not trained on (KTO).
        """
        segments = inputs["segment_ids"]
        numbers = torch.arange(len(segments), device=segments.device)[:, None]
        counted = segments >= 0
        # Rows 2r and 2r + 1 are one sequence. The second one contains another copy of the prompt, which must not count
        # again.
        if per_row == 1:
            second = numbers % 2 == 1
            counted &= ~second | ((segments > 0) & (not first_only))
            numbers = numbers // 2
        elif first_only:
            counted &= segments < 2
        return routing_inputs(self.model, torch.where(counted, numbers, -1), filled_rows(micro).float())

    def row_places(self, micro: Micro) -> Tensor | None:
        """Returns the indices of the rows of `inputs`: 2r and 2r + 1 for row r, or r if the prompt is shared."""
        places = super().row_places(micro)
        if places is None or self.shared_prompt:
            return places
        return torch.stack([2 * places, 2 * places + 1], 1).flatten()

    def workload(self, micro: Micro) -> Workload:
        return pair_work(micro, self.shared_prompt)

    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the number of pairs, without the empty rows that fill up the last batch of an epoch."""
        return filled_rows(micro).sum()


def answers_of(micro: Micro) -> Answers:
    """Returns the answer tokens of a micro-batch that `PreferenceTrainer.prepare_micro` returned."""
    return Answers(**{name: micro[name] for name in Answers._fields})


def answer_log_probs(
    model: nn.Module,
    inputs: Micro,
    per_row: int,
    rows: int,
    routing: dict[str, Tensor] | None = None,
    found: Answers | None = None,
) -> AnswerScores:
    """Returns the scores of the answers of a micro-batch under a model.

    Args:
        model: The model.
        inputs: Inputs of the model, including `segment_ids`.
        per_row: Number of answers per row of `inputs`.
        rows: Number of rows of the micro-batch, each with two answers.
        routing: Arguments from `routing_inputs` (trainers/routing.py).
        found: The answer tokens of `inputs`. None: they are searched, which synchronizes with the device.

    Returns:
        Sums over the tokens; those of empty rows are 0.
    """
    found = answers(inputs["input_ids"], inputs["segment_ids"], per_row) if found is None else found
    # Rows of one answer are not packed, and those of two come with a mask.
    scores = score_tokens(model, inputs, found.predictors, found.targets, routing=routing, packed=False)
    total = sum_by(scores.log_probs, found.answer, 2 * rows).view(rows, 2)
    lengths = sum_by(torch.ones_like(scores.log_probs), found.answer, 2 * rows).view(rows, 2)
    return AnswerScores(total, lengths, scores.router)
