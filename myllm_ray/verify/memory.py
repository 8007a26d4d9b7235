"""The memory of a worker, from the model, the optimizer and the widest micro-batch, before anything is trained.

Forward and backward pass run on fake tensors, which have shapes but no values. The storages that exist at a time are
added up. What the allocator keeps beyond that is not included.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from myllm_ray.accelerators.memory import save_memory
from myllm_ray.accelerators.optimizer_state import create_moments
from myllm_ray.accelerators.precision import DTYPES
from myllm_ray.accelerators.sharding import largest_shard
from myllm_ray.common.modules import repeated_blocks
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import AcceleratorSection
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.ops.cross_entropy import CHUNK


def parameter_bytes(model: nn.Module, shards: int, trained_only: bool = False) -> int:
    """Returns the bytes of the parameters in fp32 of the worker with the largest shards."""
    return sum(4 * largest_shard(p.shape, shards) for p in model.parameters() if p.requires_grad or not trained_only)


def buffer_bytes(model: nn.Module) -> int:
    """Returns the bytes of the buffers, which every worker holds."""
    return sum(b.numel() * b.element_size() for b in model.buffers())


def optimizer_bytes(model: nn.Module, config: TrainerConfig, shards: int) -> int:
    """Returns the bytes of the state of the optimizer, from a step on the meta device."""
    with torch.device("meta"):
        optimizer = OptimizerManager(model, config).build(model)
        create_moments(optimizer)
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    for parameter in model.parameters():
        parameter.grad = None
    return sum(t.element_size() * (largest_shard(t.shape, shards) if t.dim() else 1) for t in state)


def gathered_bytes(model: nn.Module, precision: str, shards: int) -> int:
    """Returns the bytes of the parameters that a sharding backend gathers: two blocks, or the embeddings."""
    if shards == 1:
        return 0
    blocks = repeated_blocks(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    largest = max((_elements(block.parameters()) for block in blocks), default=0)
    rest = _elements(p for p in model.parameters() if id(p) not in inside)
    return max(2 * largest, rest) * (4 if precision == "fp32" else 2)


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


class _Peak(TorchDispatchMode):
    """Follows the storages that operations create, and keeps the largest number of bytes that exist at a time."""

    def __init__(self, held: Iterable[Tensor]):
        super().__init__()
        self._sizes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._held = {t.untyped_storage()._cdata for t in held}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, output)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._sizes or storage._cdata in self._held:
            return
        size = storage.nbytes()
        self._sizes[storage] = size
        weakref.finalize(storage, self._free, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size


def training_bytes(
    model: nn.Module,
    checkpointing: Literal["none", "full"] | int,
    precision: str,
    rows: int,
    width: int,
    packs: bool,
    again: bool,
) -> int:
    """Returns the bytes that passes through the trunk of a causal language model need beside its parameters.

    They contain activations, gradients and what operations need for themselves.

    Args:
        model: a wrapped model on the meta device, which is changed.
        checkpointing: `accelerator.activation_checkpointing`.
        precision: fp32, bf16 or fp16.
        rows, width: the shape of a micro-batch.
        packs: whether rows contain several documents, which a mask separates.
        again: whether a second micro-batch follows, while the gradients of the first one exist.
    """
    save_memory(model, AcceleratorSection(activation_checkpointing=checkpointing))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake: Any = model.to_empty(device="cpu")  # fake tensors in place of those on the meta device
        ids = torch.zeros(rows, width, dtype=torch.long)
        mask = torch.ones(rows, 1, width, width, dtype=torch.bool) if packs else None
        trunk = getattr(fake, "model", fake).base_model
        with _Peak([*fake.parameters(), *fake.buffers()]) as peak:
            for _ in range(1 + again):
                with torch.autocast("cpu", dtype=DTYPES[precision], enabled=precision != "fp32"):
                    output = trunk(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                if output.requires_grad:
                    output.backward(torch.zeros_like(output))
                del output
    return int(peak.peak)


def head_bytes(hidden: int, vocabulary: int, predicted: int, precision: str, trained: bool) -> int:
    """Returns the bytes that the head keeps and needs for one micro-batch (`ops/cross_entropy.py`)."""
    half = 4 if precision == "fp32" else 2
    rows = min(CHUNK, predicted)
    logits = rows * vocabulary * (4 + 4 + half)
    return 2 * predicted * hidden * half + logits + (4 * vocabulary * hidden if trained else 0)
