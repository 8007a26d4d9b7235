"""The trainer of a run with all its models on the meta device, without memory for their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import Dependencies, kind_of_model, model_section
from myllm_ray.model_checks import document_kernel
from myllm_ray.models.load import build_skeleton
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.preference import ReferenceTable
from myllm_ray.worker import build_trainer


class _Skeletons(Dependencies):
    """The dependencies of a trainer, with models on the meta device, and without what a run computes before it."""

    def _frozen(self, section: ModelSection, kind: str = "causal_lm") -> nn.Module:
        return _skeleton(self._config, section, self._tokenizer, kind)

    def _table(self, spec: StreamSpec, batches: int) -> ReferenceTable | None:
        if getattr(self._section, "reference", "copy") != "precomputed" or not self._needs_reference():
            return None
        return ReferenceTable(torch.zeros(len(spec.plan.store), 2))


def _skeleton(config: TrainerConfig, section: ModelSection, tokenizer: Any, kind: str) -> nn.Module:
    built = build_skeleton(section, tokenizer, config.data.sequence_length, kind)
    if built is None:
        raise ConfigError("estimate: a model.factory can't be built without its weights: measure it with bench")
    return built


def skeleton_trainer(config: TrainerConfig, prepared: PreparedData, device: torch.device) -> BaseTrainer:
    """Returns the trainer of a config, with all models on the meta device."""
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    model = _skeleton(config, model_section(config), tokenizer, kind_of_model(config))
    sources, dependencies = prepared.train.plan.store.sources, _Skeletons(config, tokenizer, prepared)
    trainer = build_trainer(config, model, tokenizer, sources, dependencies)
    # The passes run on the CPU. There is no kernel for CUDA, but one that keeps the same tensors.
    kernel = document_kernel(config, prepared.isolation, device)
    trainer.document_kernel = kernel if kernel is None or device.type == "cpu" else "per_document"
    return trainer
