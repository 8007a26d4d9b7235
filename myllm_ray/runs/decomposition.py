"""The shares of rows, documents and layers in the loss and the gradient of one optimizer step.

With the weight W of the global batch, row i has the loss sum l_i and the gradient g_i = ∇ l_i / W. The loss of the
step is Σ l_i / W, and its gradient is G = Σ g_i. The share of a row in the loss is l_i / Σ l_j, and its share in the
gradient is <g_i, G> / |G|². The shares of all rows sum to 1. A negative share in the gradient means that the row points
away from the direction of the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from myllm_ray.common.types import IGNORE, Micro
from myllm_ray.config.errors import ConfigError
from myllm_ray.data.examples import TOKENS
from myllm_ray.data.packing import Row

if TYPE_CHECKING:
    from myllm_ray.engine.loop import TrainerEngine

_LAYER = re.compile(r"^(?:.*?\.)?((?:\w+)\.\d+)\.")
_SAME_SUM = 1e-4


@dataclass
class DocumentShare:
    """The loss of a document in a row: its number in the data, its source, its target tokens and their loss sum."""

    document: int
    source: str
    targets: int
    loss_sum: float

    @property
    def loss(self) -> float:
        """The mean loss of its target tokens."""
        return self.loss_sum / max(self.targets, 1)


@dataclass
class RowShare:
    """A row, or the answers to one prompt.

    Attributes:
        row: number in the epoch, as `myllm-ray data --step` shows it; for answers, their number in the step.
        weight: its part of the weight of the batch, such as its number of target tokens.
        loss_sum: its part of the loss sum.
        share: its share in the loss.
        grad_norm, grad_share: norm of its gradient and share in the gradient; NaN if they were not computed.
        sources: names of the sources of its documents.
        documents: empty if the trainer's loss is not a sum over tokens.
    """

    row: int
    weight: float
    loss_sum: float
    share: float
    grad_norm: float = math.nan
    grad_share: float = math.nan
    sources: tuple[str, ...] = ()
    documents: list[DocumentShare] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The loss of the row alone."""
        return self.loss_sum / self.weight if self.weight else 0.0


@dataclass
class Without:
    """The step without some rows. Everything else is as in the step, also advantages that were computed from them."""

    rows: list[int]
    loss: float
    grad_norm: float


@dataclass
class Decomposition:
    """The parts of one step.

    Attributes:
        loss: the loss of the step.
        weight: the weight of the global batch.
        rows: all rows, in the order of the batch.
        layers: (name, norm of the gradient), in the order of the model; empty without gradients.
        without: the step without the rows to drop, or None.
    """

    loss: float
    weight: float
    rows: list[RowShare]
    layers: list[tuple[str, float]] = field(default_factory=list)
    without: Without | None = None

    @property
    def ranked(self) -> list[RowShare]:
        """The rows by the sum of their two shares, largest first; rows with a non-finite value precede them."""

        def key(row: RowShare) -> float:
            if not math.isfinite(row.loss_sum) or (self.layers and not math.isfinite(row.grad_norm)):
                return math.inf
            return row.share + (row.grad_share if math.isfinite(row.grad_share) else 0.0)

        return sorted(self.rows, key=key, reverse=True)

    def sources(self) -> dict[str, tuple[int, float]]:
        """Returns, by source, the number of target tokens and the mean loss of its documents."""
        totals: dict[str, tuple[int, float]] = {}
        for document in (document for row in self.rows for document in row.documents):
            targets, loss_sum = totals.get(document.source, (0, 0.0))
            totals[document.source] = (targets + document.targets, loss_sum + document.loss_sum)
        return {name: (targets, loss_sum / max(targets, 1)) for name, (targets, loss_sum) in totals.items()}


def decompose(engine: TrainerEngine, micros: list[Micro], drop: frozenset[int], gradients: bool) -> Decomposition:
    """Computes the parts of a step before the engine makes it. Leaves no gradient on the parameters.

    Args:
        engine: an engine in one process, before its optimizer step.
        micros: the micro-batches of the step, each of one row or of the answers to one prompt.
        drop: numbers of the rows to leave out in `without`.
        gradients: whether to compute gradients: one backward pass of the batch for the whole, and one for the rows.
    """
    trainer = engine.trainer
    micros = [trainer.prepare_micro(micro) for micro in micros]
    weights = [float(trainer.batch_weight(micro)) for micro in micros]
    weight = sum(weights)
    rows: list[RowShare] = []
    for index, micro in enumerate(micros):
        micro = engine.accelerator.move(micro)
        loss_sum = _backward(engine, micro, index, weight, gradients)
        number, documents, sources = _describe(engine, micro, index, loss_sum)
        rows.append(RowShare(number, weights[index], loss_sum, math.nan, sources=sources, documents=documents))
    wrong = next((number for number in sorted(drop) if number not in {row.row for row in rows}), None)
    if wrong is not None:
        raise ConfigError(f"--drop {wrong}: the step has rows {rows[0].row} to {rows[-1].row}")
    total = math.fsum(row.loss_sum for row in rows)
    for row in rows:
        row.share = row.loss_sum / total if total else 0.0
    parts = Decomposition(total / max(weight, 1e-9), weight, rows)
    whole = _take(engine)
    rest_weight = weight - sum(row.weight for row in rows if row.row in drop)
    if drop and not rest_weight:
        raise ConfigError("--drop: no row with a weight is left in the step")
    rest_loss = math.fsum(row.loss_sum for row in rows if row.row not in drop) / max(rest_weight, 1e-9)
    rest_norm = math.nan
    if gradients:
        parts.layers = list(_layers(whole))
        squared = sum(_dot(grad, grad) for grad in whole.values())
        dropped = {name: torch.zeros_like(grad) for name, grad in whole.items()} if drop else {}
        for index, micro in enumerate(micros):
            _backward(engine, engine.accelerator.move(micro), index, weight, True)
            own = _take(engine)
            rows[index].grad_norm = math.sqrt(sum(_dot(grad, grad) for grad in own.values()))
            along = sum(_dot(grad, whole[name]) for name, grad in own.items())
            rows[index].grad_share = along / squared if squared else 0.0
            if rows[index].row in drop:
                for name, grad in own.items():
                    dropped[name] += grad
        if drop:
            rest = sum(_dot(whole[n] - dropped[n], whole[n] - dropped[n]) for n in whole)
            rest_norm = math.sqrt(rest) * weight / max(rest_weight, 1e-9)
    if drop:
        parts.without = Without(sorted(drop), rest_loss, rest_norm)
    return parts


def _backward(engine: TrainerEngine, micro: Micro, index: int, weight: float, gradients: bool) -> float:
    """Adds the gradient of a micro-batch to the parameters' gradients and returns its loss sum."""
    with torch.set_grad_enabled(gradients):
        with engine.forward_pass(micro, index):
            output = engine.trainer.train_step(micro)
        if gradients:
            # Small gradients underflow in fp16 without the loss scale.
            (output.loss_sum * (_scale(engine) / max(weight, 1e-9))).backward()
    return float(output.loss_sum.detach())


def _scale(engine: TrainerEngine) -> float:
    scale = engine.accelerator.loss_scale
    return scale.value if scale.enabled else 1.0


def _take(engine: TrainerEngine) -> dict[str, Tensor]:
    """Returns the gradients by name and removes them from the parameters."""
    scale, taken = _scale(engine), {}
    for name, parameter in engine.trainer.model.named_parameters():
        if parameter.grad is not None:
            taken[name] = parameter.grad.detach() / scale
            parameter.grad = None
    return taken


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _layers(grads: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yields the gradient norm of each layer: of a numbered block, or else of a parameter's module."""
    squares: dict[str, float] = {}
    for name, grad in grads.items():
        numbered = _LAYER.match(name)
        layer = numbered[1] if numbered else name.rpartition(".")[0] or name
        squares[layer] = squares.get(layer, 0.0) + _dot(grad, grad)
    yield from ((layer, math.sqrt(square)) for layer, square in squares.items())


def _describe(
    engine: TrainerEngine, micro: Micro, index: int, loss_sum: float
) -> tuple[int, list[DocumentShare], tuple[str, ...]]:
    """Returns the number of a row in the epoch, its documents with their losses, and the names of their sources."""
    plan, position = engine.stream.spec.plan, engine.state.position  # type: ignore[union-attr]
    if "places" not in micro or len(micro["places"]) != 1:  # answers of a policy
        return index, [], ()
    number = position.row + int(micro["places"][0, 0])
    (row,) = plan.rows(position.epoch, number, number + 1)
    source_of = [plan.store.sources[int(plan.store.source_of(np.asarray([s.document]))[0])] for s in row]
    sources = tuple(dict.fromkeys(source_of))
    if plan.store.kind != TOKENS:
        return number, [], sources
    with torch.no_grad(), engine.forward_pass(micro, index):
        losses = engine.trainer.target_losses(micro)
    if losses is None or not math.isclose(float(losses.double().sum()), loss_sum, rel_tol=_SAME_SUM, abs_tol=_SAME_SUM):
        return number, [], sources  # the trainer's loss contains more than its tokens' losses
    return number, list(_documents(row, micro["labels"][0], losses, source_of)), sources


def _documents(row: Row, labels: Tensor, losses: Tensor, sources: list[str]) -> Iterator[DocumentShare]:
    """Yields the loss of each document of a row. `losses`: (T,) of the labelled positions but the first of the row."""
    kept = (labels != IGNORE).cpu()
    kept[0] = False  # no token predicts the first one of a row
    counts = kept.cumsum(0)
    start = before = 0
    for segment, source in zip(row, sources, strict=True):
        start += segment.length
        upto = int(counts[start - 1])
        yield DocumentShare(segment.document, source, upto - before, float(losses[before:upto].double().sum()))
        before = upto
