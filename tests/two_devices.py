"""A simulated accelerator device: tensors that report the device `gpu:0` and compute on the CPU.

Operations that let the host wait for the device are recorded within `recorded_syncs`.

Under `TwoDevices` an operation on tensors of both devices fails as on a machine with a GPU, and every other operation
returns its usual result. So a complete run can be checked for tensors that are created on the wrong device.

The device is registered for the whole process, so these tests run in a separate process. It is not called `cuda`,
because autograd in a CUDA build of torch queries the streams of that device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")
GPU = torch.device("gpu", 0)
aten = torch.ops.aten
_ANY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operations whose indices may be on the CPU when the tensor is on the GPU."""
_BETWEEN = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor, aten.is_same_size.default}
_READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
}
"""Operations whose result, or its shape, depends on values on the GPU, which the host has to wait for."""
_recorders: list[list[str]] = []


@contextmanager
def recorded_syncs() -> Iterator[list[str]]:
    """Records in a list where the host waits for the GPU inside the block."""
    found: list[str] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.remove(found)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Records nothing inside the block."""
    outer, _recorders[:] = _recorders[:], []
    try:
        yield
    finally:
        _recorders[:] = outer


def _record(name: str) -> None:
    if not _recorders:
        return
    frames = [f for f in traceback.extract_stack() if "two_devices" not in f.filename and "/torch/" not in f.filename]
    where = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(frames[-4:]))
    _recorders[-1].append(f"{name} at {where}")


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether an operation lets the host wait for the GPU."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if func in _ANY_INDEX:
        return any(isinstance(t, OnGPU) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1]))
    if func is aten.copy_.default:
        between = isinstance(args[0], OnGPU) != isinstance(args[1], OnGPU)
        return between and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    if func is aten._to_copy.default:
        device = torch.device(kwargs.get("device") or args[0].device).type
        return (device == "gpu") != isinstance(args[0], OnGPU) and not kwargs.get("non_blocking")
    return func in _READS and any(isinstance(t, OnGPU) for t in tensors)


class OnGPU(Tensor):
    """A tensor on the GPU; `inner` holds its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        made: OnGPU = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=GPU,
        )
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGPU({self.inner!r})"

    def tolist(self) -> Any:
        _record("tolist")
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(
            "can't convert gpu:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first"
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Runs where the mode is inactive: within another mode, or in an autograd thread.
        return _run(func, args, kwargs or {})


class TwoDevices(TorchDispatchMode):
    """Dispatch mode that runs and checks every operation on tensors of either device."""

    def __enter__(self) -> Any:
        # `torch.tensor(..., device="gpu")` then creates its tensor on the CPU and moves it through this mode.
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if _recorders and _waits(func, args, kwargs):
        _record(str(func))
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    on_gpu = any(isinstance(t, OnGPU) for t in tensors)
    if on_gpu and func not in _BETWEEN:
        looked_at = tensors[:1] if func in _ANY_INDEX else tensors
        wrong = [t for t in looked_at if not isinstance(t, OnGPU) and t.dim() > 0]
        if wrong:
            raise RuntimeError(f"{func}: tensors of {GPU} and of the CPU, of shapes {[tuple(t.shape) for t in wrong]}")
    device = kwargs.get("device")
    if device is not None:
        on_gpu, kwargs = (
            torch.device(device).type == "gpu",
            {**kwargs, "device": torch.device("cpu") if torch.device(device).type == "gpu" else device},
        )
    elif func in _BETWEEN:
        on_gpu = isinstance(args[0], OnGPU)
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    wrapped = {id(t.inner): t for t in tensors if isinstance(t, OnGPU)}
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    return tree_map(lambda t: wrapped.get(id(t), OnGPU(t) if on_gpu else t) if isinstance(t, Tensor) else t, result)


def _unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, OnGPU) else value
