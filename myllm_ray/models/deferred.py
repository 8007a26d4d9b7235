"""The weights of a run's checkpoint, read tensor by tensor or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from myllm_ray.common.materialize import Source
from myllm_ray.common.tensor_files import Box, TensorFiles, index_of, part_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.lora_section import LoraSection
from myllm_ray.models.lora import merged

_PREFIX = "model.model."
"""Prefix of the transformers names in a run's checkpoint: the accelerator's prefix and the wrapper's attribute."""


class CheckpointTensors:
    """Reads the weights of a transformers model from a run's checkpoint, one tensor at a time, by transformers name.

    Each rank of the run wrote its shards of a tensor (`common/tensor_files.py`). LoRA adapters are merged into the
    weights that they adapt. If `base` is not None, the checkpoint holds only the trained weights; the caller then sets
    `initial` and `initial_names`, the initial weights of the run.

    Args:
        checkpoint: The folder of the checkpoint.
        key: The config key that names the checkpoint, for error messages.

    Raises:
        ConfigError: The checkpoint does not contain a transformers model, or it contains adapters that the run's config
            does not describe.
    """

    initial: Source
    """The initial weights of the run, with adapters that are not merged, for tensors that are not in the checkpoint."""

    def __init__(self, checkpoint: Path, key: str = "model.name"):
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        self.checkpoint, self.key = checkpoint, key
        self.shapes = {
            name.removeprefix(_PREFIX): shape for name, shape in manifest["tensors"].items() if name.startswith(_PREFIX)
        }
        self.base: dict[str, Any] | None = manifest.get("base")
        self.initial_names: set[str] = set()
        self.config: dict[str, Any] = manifest.get("config", {})
        lora = self.config.get("model", {}).get("lora")
        self.lora = None if lora is None else LoraSection.model_validate(lora)
        if not self.shapes:
            raise ConfigError(
                f"{key}: {checkpoint} does not contain a transformers model: only a custom factory can build it"
            )
        if self.lora is None and any(".lora_A." in name for name in self.shapes):
            raise ConfigError(f"{key}: {checkpoint} has adapters that its config does not describe; merge them first")
        self._files = TensorFiles(checkpoint, index_of(checkpoint, manifest))

    @property
    def names(self) -> set[str]:
        """The transformers names of the tensors, with adapters merged."""
        return {name.replace(".base_layer.", ".") for name in self._held if ".lora_" not in name}

    @property
    def _held(self) -> set[str]:
        """The names of all tensors, with adapters that are not merged."""
        return {*self.shapes, *self.initial_names}

    def read(self, name: str, transposed: bool = False, box: Box | None = None) -> Tensor:
        """Returns a tensor; floating-point tensors are converted to fp32.

        Args:
            name: The transformers name of the tensor.
            transposed: Whether the layer stores its weight as (inputs, outputs), as the `Conv1D` of GPT-2 does.
            box: The part of the tensor to return; None: all. A weight with an adapter is computed whole.
        """
        stem, _, leaf = name.rpartition(".")
        if f"{stem}.base_layer.{leaf}" not in self._held:
            return self._value(name, box)
        if leaf != "weight":
            return self._value(f"{stem}.base_layer.{leaf}", box)
        assert self.lora is not None
        weight = self._value(f"{stem}.base_layer.{leaf}")
        return part_of(merged(weight, self._value, stem, self.lora, transposed), box)

    def _value(self, name: str, box: Box | None = None) -> Tensor:
        if name not in self.shapes:
            return self.initial(name, box)
        value = self._files.read(_PREFIX + name, self.shapes[name], box)
        return value.float() if value.is_floating_point() else value


def checkpoint_source(tensors: CheckpointTensors, skeleton: nn.Module, otherwise: Source) -> Source:
    """Returns a source that reads a run's checkpoint tensor by tensor.

    Args:
        tensors: The weights of the checkpoint.
        skeleton: The model on the meta device.
        otherwise: The source of buffers that are not saved, and of the head of a reward model that starts from a
            language model.

    Raises:
        ConfigError: The checkpoint lacks a parameter of the model.
    """
    wanted = [name for name, _ in skeleton.named_parameters() if not name.startswith("score.")]
    missing = [name for name in wanted if name not in tensors.names]
    if missing or ("score.weight" in tensors.names and not hasattr(skeleton, "score")):
        what = (
            "a reward model, which has no head for tokens"
            if "score.weight" in tensors.names
            else f"another model: it has no {missing[0]}"
        )
        raise ConfigError(f"{tensors.key}: {tensors.checkpoint} holds {what}")
    transposed = {name for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}

    def source(name: str, box: Box | None = None) -> Tensor:
        if name not in tensors.names:
            return otherwise(name, box)
        return tensors.read(name, name.rpartition(".")[0] in transposed, box)

    return source
