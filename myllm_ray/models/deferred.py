"""Deferred weights: a model on the meta device, and a source that creates each tensor on request.

Random weights are a function of (seed, tensor name) only. They do not depend on the backend, the number of workers or
the other tensors of the model. The initialization of transformers is recorded on the meta device, where it needs no
memory, and replayed tensor by tensor. The method follows the deferred initialization of torchdistX.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from myllm_ray.common.materialize import Source
from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.tensor_files import TensorFiles, index_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.lora_section import LoraSection
from myllm_ray.models.lora import merged


class _Recorder(TorchDispatchMode):
    """Records every operation on meta tensors, grouped by the storages that it reads or writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[int, list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        touched = [a for a in tree_leaves((args, kwargs or {}, out)) if isinstance(a, Tensor) and a.is_meta]
        for storage in dict.fromkeys(_storage(t) for t in touched):
            self.calls.setdefault(storage, []).append((func, args, kwargs or {}, out))
        return out


def _storage(tensor: Tensor) -> int:
    # Views of one tensor have the same storage, so an operation on a view is recorded for the tensor.
    return int(tensor.untyped_storage()._cdata)


def record_initialization(model: nn.Module, initialize: Any, seed: int) -> Source:
    """Records the initialization of a model on the meta device and returns the source of its tensors.

    Args:
        model: The model, on the meta device.
        initialize: A function without arguments that initializes the model.
        seed: The seed of the random weights.

    Raises:
        NotImplementedError: A tensor is not initialized, or its initialization depends on the values of other tensors.
    """
    tensors = {name: t for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}
    with _Recorder() as recorder, torch.no_grad():
        initialize()
    by_name = {name: (t, recorder.calls.get(_storage(t), [])) for name, t in tensors.items()}
    for name, (meta, calls) in by_name.items():
        inputs = [
            a
            for _, args, kwargs, _ in calls
            for a in tree_leaves((args, kwargs))
            if isinstance(a, Tensor) and a.is_meta
        ]
        if not any(func._schema.is_mutable for func, *_ in calls) or any(_storage(a) != _storage(meta) for a in inputs):
            raise NotImplementedError(f"{name} can't be initialized independently of other tensors")

    def source(name: str) -> Tensor:
        # A seed for each name: the values do not depend on the order in which the tensors are requested.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(derive_seed("weight", seed, name))
            return _replay(*by_name[name])

    return source


def _replay(meta: Tensor, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> Tensor:
    real: dict[int, Tensor] = {id(meta): torch.empty_like(meta, device="cpu")}

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            # An object that no recorded call returned is `.data` of the tensor: another object with the same storage.
            return real.get(id(value), real[id(meta)])
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "meta" else value

    for func, args, kwargs, out in calls:
        result = func(*tree_map(swap, args), **tree_map(swap, kwargs))
        for before, after in zip(tree_leaves(out), tree_leaves(result), strict=True):
            if isinstance(before, Tensor):
                real.setdefault(id(before), after)
    return real[id(meta)]


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

    def read(self, name: str, transposed: bool = False) -> Tensor:
        """Returns one full tensor; floating-point tensors are converted to fp32.

        Args:
            name: The transformers name of the tensor.
            transposed: Whether the layer stores its weight as (inputs, outputs), as the `Conv1D` of GPT-2 does.
        """
        stem, _, leaf = name.rpartition(".")
        if f"{stem}.base_layer.{leaf}" not in self._held:
            return self._value(name)
        weight = self._value(f"{stem}.base_layer.{leaf}")
        if leaf != "weight":
            return weight
        assert self.lora is not None
        return merged(weight, self._value, stem, self.lora, transposed)

    def _value(self, name: str) -> Tensor:
        return self._whole(name) if name in self.shapes else self.initial(name)

    def _whole(self, name: str) -> Tensor:
        whole = self._files.read(_PREFIX + name, self.shapes[name])
        return whole.float() if whole.is_floating_point() else whole


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

    def source(name: str) -> Tensor:
        return tensors.read(name, name.rpartition(".")[0] in transposed) if name in tensors.names else otherwise(name)

    return source
