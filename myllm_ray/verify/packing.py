"""Checks that packing does not change the training of a config.

The first batch is computed twice: as packed, and with each of its documents in a separate row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.collate import build_micro, to_tensors
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import Dependencies, kind_of_model, model_section
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.models.shrink import without_dropout
from myllm_ray.preparation import absolute, prepare_data
from myllm_ray.verify.compare import distance
from myllm_ray.worker import build_trainer

SAME = 1e-4
"""Largest accepted relative difference of loss and gradient norm, from sums over rows of different widths."""


@dataclass(frozen=True)
class PackingCheck:
    """The result of the check.

    `text` describes which documents share a row, and why. `packed` and `alone` belong to the first batch before any
    step, as packed and with separate rows. They are None if no documents share a row. The loss of routers is excluded,
    because experts are balanced over rows, whatever documents they contain (trainers/routing.py).
    """

    text: str
    packed: dict[str, float] | None = None
    alone: dict[str, float] | None = None
    """Loss and gradient norm."""
    has_router_loss: bool = False
    """Whether the loss of a run includes a router loss, which these losses exclude."""

    def distance(self, found: dict[str, Any] | None) -> float | None:
        """Returns the largest relative difference of a first step's loss and gradient norm from those of separate rows.

        Args:
            found: Values by name, with `loss` and `grad_norm`; a missing one counts as NaN.

        Returns:
            The difference, or None if `found` is None or no documents share a row.
        """
        if self.alone is None or found is None:
            return None
        return max(distance(float(found.get(name, "nan")), value) for name, value in self.alone.items())

    @property
    def leaks(self) -> bool:
        """Whether packing changes the loss or the gradient norm by more than `SAME`."""
        apart = self.distance(self.packed)
        return apart is not None and not apart <= SAME


def check_packing(config: TrainerConfig) -> PackingCheck:
    """Computes the first batch of a small config packed and with separate rows.

    Both are computed in this process, in fp32 and without dropout.
    """
    config = absolute(config)
    prepared = prepare_data(config)
    text = f"{prepared.packing}; {prepared.isolation}"
    spec = prepared.train
    if spec.plan.packing.kind not in ("best_fit", "continuous"):
        return PackingCheck(text)
    rows = spec.plan.rows(0, 0, spec.global_size)
    segments = [[segment] for row in rows for segment in row]
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    skeleton = build_skeleton(model_section(config), tokenizer, config.data.sequence_length, kind_of_model(config))
    has_router_loss = getattr(skeleton, "router_loss_weight", 0.0) > 0
    if has_router_loss:
        config.model = config.model.model_copy(update={"router_loss_weight": 0.0})
    packed, alone = (
        _first_step(config, prepared, [build_micro(spec.plan.store, [row], spec.pad_id) for row in given])
        for given in (rows, segments)
    )
    return PackingCheck(text, packed, alone, has_router_loss)


def _first_step(config: TrainerConfig, prepared: PreparedData, micros: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the loss and the gradient norm of a global batch, given as micro-batches."""
    section, _ = without_dropout(model_section(config))
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    model = build_model(section, tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    trainer = build_trainer(
        config, model, tokenizer, prepared.train.plan.store.sources, Dependencies(config, tokenizer, prepared)
    )
    tensors = [to_tensors(micro) for micro in micros]
    weight = float(sum(float(trainer.batch_weight(micro)) for micro in tensors))
    total = 0.0
    for micro in tensors:
        loss = trainer.train_step(micro).loss_sum / weight
        if loss.requires_grad:
            loss.backward()
        total += float(loss.detach())
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return {"loss": total, "grad_norm": float(torch.stack(norms).norm()) if norms else 0.0}
