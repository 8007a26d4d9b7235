"""The tensors that a training step allocates, recorded without memory for their values.

The trainer's own `train_step`, the backward pass and the clipping of gradients run on fake tensors, which have shapes
but no values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from myllm_ray.accelerators.memory import save_memory
from myllm_ray.accelerators.precision import DTYPES
from myllm_ray.common.materialize import fill
from myllm_ray.common.types import Micro
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import AcceleratorSection
from myllm_ray.ops.dropout import StepDropout
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.verify.heap import Event


@dataclass
class Recording:
    """The allocations of a step in order, each released at the end."""

    events: list[Event] = field(default_factory=list)
    live: int = 0
    peak: int = 0
    """The most bytes that exist at a time."""
    sizes: dict[int, int] = field(default_factory=dict)

    def allocate(self, size: int) -> int:
        """Records an allocation and returns the number of its block."""
        block = len(self.events)
        self.events.append(Event(block, size))
        self.sizes[block] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        return block

    def release(self, block: int) -> None:
        """Records the release of a block."""
        self.events.append(Event(block, 0))
        self.live -= self.sizes.pop(block)


class _Recorder(TorchDispatchMode):
    """Records the storages that operations create, and how long they exist.

    Args:
        recording: Where they are recorded.
        held: Tensors that exist before and are not recorded.
    """

    def __init__(self, recording: Recording, held: Iterable[Tensor]):
        super().__init__()
        self._recording = recording
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in held:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        inside = _inside(function, args, output)
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        for block in [self._recording.allocate(size) for size in inside]:
            self._recording.release(block)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known or not storage.nbytes():
            return
        self._known[storage] = True
        weakref.finalize(storage, self._recording.release, self._recording.allocate(storage.nbytes()))


def _inside(function: Any, args: Any, output: Any) -> list[int]:
    """Returns the bytes of the large tensors that the kernel of an operation on the CPU allocates for itself."""
    if function is torch.ops.aten.logsumexp.default:
        return [args[0].numel() * args[0].element_size()]  # exp(x - max)
    if torch.Tag.pointwise in function.tags and isinstance(output, Tensor) and output.is_floating_point():
        # Inputs of another dtype are converted as a whole.
        given = [a for a in args if isinstance(a, Tensor) and a.dim() and a.is_floating_point()]
        if len({a.dtype for a in given}) > 1:
            wide = max(a.element_size() for a in given)
            return [a.numel() * wide for a in given if a.element_size() < wide]
    return []


def record_step(
    trainer: BaseTrainer, micro: Micro, section: AcceleratorSection, seed: int, again: bool, clips: bool
) -> Recording:
    """Records the passes of a training step.

    Args:
        trainer: The trainer, with models on the meta device, which are changed.
        micro: The micro-batch, on the CPU, from the collator.
        section: The section `accelerator`.
        seed: `run.seed`.
        again: Whether a second micro-batch follows, while the gradients of the first one exist.
        clips: Whether gradients are clipped.

    Raises:
        ConfigError: The operations of the model depend on values.
    """
    # Without `compile`: compiled code is not made for fake tensors.
    save_memory(trainer.model, AcceleratorSection(activation_checkpointing=section.activation_checkpointing))
    prepared = trainer.prepare_micro(micro)
    documents = trainer.documents_of(prepared)
    # Not from the fake micro-batch: the host reads the lengths.
    trainer.documents_of = lambda micro: documents  # type: ignore[method-assign]
    recording = Recording()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.random.fork_rng(devices=[]):
        for model in (trainer.model, *trainer.frozen_models.values()):
            _fake(model)
        for model in trainer.frozen_models.values():
            model.requires_grad_(False).eval()
        if trainer.bytes_per_token is not None:
            trainer.bytes_per_token = mode.from_tensor(trainer.bytes_per_token)
        micros = [_faked(prepared, mode) for _ in range(1 + again)]
        held = [t for m in (trainer.model, *trainer.frozen_models.values()) for t in (*m.parameters(), *m.buffers())]
        try:
            with _Recorder(recording, [*held, *(t for m in micros for t in m.values())]):
                _step(trainer, micros, section, seed, clips)
        except DataDependentOutputException as error:
            raise ConfigError(
                f"estimate: an operation of the model depends on values ({error.func}), so its memory is not known in "
                "advance: measure it with myllm-ray bench"
            ) from None
    return recording


def _step(trainer: BaseTrainer, micros: list[Micro], section: AcceleratorSection, seed: int, clips: bool) -> None:
    dropout, half = StepDropout(trainer.model, seed), section.precision != "fp32"
    for micro in micros:
        rows = trainer.row_places(micro)
        with (
            torch.autocast("cpu", dtype=DTYPES[section.precision], enabled=half),
            dropout.microbatch(0, rows, micro.get("input_ids")),
        ):
            output = trainer.train_step(micro)
        (output.loss_sum / 2).backward()
        del output
    trained = [p for p in trainer.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if clips:
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
    del norm
    for parameter in trained:
        parameter.grad = None


def _fake(model: nn.Module) -> None:
    """Replaces the meta tensors of a model by fake ones on the CPU. Tied tensors stay tied."""
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    fill(model, lambda name: torch.empty(named[name].shape, dtype=named[name].dtype), "cpu")


def _faked(micro: Micro, mode: FakeTensorMode) -> Micro:
    """Returns a micro-batch of fake tensors. A tensor that has two names stays one."""
    fakes = {id(tensor): mode.from_tensor(tensor) for tensor in micro.values()}
    return {name: fakes[id(tensor)] for name, tensor in micro.items()}
