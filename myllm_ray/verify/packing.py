"""Whether packing changes what a config trains: its first batch, and the same documents each in a row of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.collate import build_micro, to_tensors
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.models.shrink import without_dropout
from myllm_ray.roles import kind_of_model, model_section, roles_of
from myllm_ray.verify.compare import distance
from myllm_ray.worker import absolute, build_trainer, prepare_data

SAME = 1e-4
"""Largest relative difference of loss and gradient norm: sums over rows of other widths."""


@dataclass(frozen=True)
class PackingCheck:
    """`text`: what shares a row, and why. The others are of the first batch before any step; None where nothing shares a row.

    The loss of routers is left out: experts are balanced over rows, whatever is in them (trainers/routing.py).
    """

    text: str
    packed: dict[str, float] | None = None
    alone: dict[str, float] | None = None
    """Loss and gradient norm."""
    has_router_loss: bool = False
    """The losses of runs have a term that these have not."""

    def distance(self, found: dict[str, Any] | None) -> float | None:
        """How far a first step's loss and gradient norm are from those of the documents by themselves, relatively."""
        if self.alone is None or found is None:
            return None
        return max(distance(float(found.get(name, "nan")), value) for name, value in self.alone.items())

    @property
    def leaks(self) -> bool:
        apart = self.distance(self.packed)
        return apart is not None and not apart <= SAME


def check_packing(config: TrainerConfig) -> PackingCheck:
    """Run the trainer of a small config on its first batch both ways, in this process, in fp32, without dropout."""
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
    packed, alone = (_first_step(config, prepared, [build_micro(spec.plan.store, [row], spec.pad_id) for row in given])
                     for given in (rows, segments))
    return PackingCheck(text, packed, alone, has_router_loss)


def _first_step(config: TrainerConfig, prepared: PreparedData, micros: list[dict[str, Any]]) -> dict[str, float]:
    section, _ = without_dropout(model_section(config))
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    model = build_model(section, tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    trainer = build_trainer(config, model, tokenizer, prepared.train.plan.store.sources, roles_of(config, tokenizer, prepared))
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
