"""The precision of the computation.

Master weights and moments are fp32 in every precision, and so are sums of gradients by default.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.materialize import Source, attach_source, source_of
from myllm_ray.common.modules import adapted_modules
from myllm_ray.common.tensor_files import Box
from myllm_ray.config.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def why_not(precision: str, device: torch.device) -> str | None:
    """Returns the reason why a device can't train in a precision, or None if it can."""
    if precision == "fp32":
        return None
    if device.type == "cuda":
        # Without `including_emulation=False`, torch also reports GPUs that emulate bf16.
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return f"{torch.cuda.get_device_name(device)} does not support bf16 (compute capability 8.0 or later does)"
        return None
    if precision == "fp16" and not _cpu_has(precision):
        return "this CPU has no fp16 arithmetic (AVX512-FP16 or AMX-FP16)"
    return None


def _cpu_has(precision: str) -> bool:
    """Returns whether this CPU has the arithmetic of a precision."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return supported is not None and bool(supported())


def emulation_note(precision: str, device: torch.device) -> str | None:
    """Returns a warning that the device emulates a precision, or None if it does not.

    On a CPU without bf16 arithmetic the result is the same, but a matrix product in bf16 takes about a hundred times as
    long as in fp32 (150 times on a CPU with AVX2 alone).
    """
    if precision != "bf16" or device.type != "cpu" or _cpu_has(precision):
        return None
    return (
        "accelerator.precision=bf16: this CPU has no bf16 arithmetic (AVX512 or AMX) and emulates it, which is many "
        "times slower than fp32; accelerator.precision=fp32 is the faster choice here"
    )


def check_precision(precision: str, device: torch.device) -> None:
    """Rejects a precision that the device does not support.

    Raises:
        ConfigError: Names the reason and the supported alternatives.
    """
    reason = why_not(precision, device)
    if reason:
        other = "bf16 or fp32" if precision == "fp16" else "fp16 or fp32"
        raise ConfigError(f"accelerator.precision={precision}: {reason}; use {other}")


def set_tf32(on: bool) -> None:
    """Sets whether fp32 products on CUDA run in TF32: matrix products, and convolutions and recurrent layers of cuDNN.

    torch's defaults differ: TF32 is off for matrix products and on for convolutions.
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)  # type: ignore[attr-defined]
    for backend in backends:
        backend.fp32_precision = "tf32" if on else "ieee"


def check_tf32(device: torch.device) -> None:
    """Rejects `accelerator.tf32` on a device without TF32.

    Raises:
        ConfigError: Names the device.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    raise ConfigError(f"accelerator.tf32: {name} has no TF32 (GPUs of compute capability 8.0 or later do); remove it")


def autocast_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the weights that autocast casts to `dtype` at every use, as a mapping of names to `dtype`.

    These are the weights of linear layers and of stacked experts (three dimensions). Stored in `dtype`, they take half
    the memory and result in the same outputs. Embeddings, heads that are tied to them, norms and biases are used in
    fp32 and are not included.

    Args:
        model: The model, possibly on the meta device.
        dtype: The dtype of autocast.
    """
    # By identity, so that a head that is tied to an embedding is recognized.
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found: dict[str, torch.dtype] = {}
    for prefix, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers, GPT-2
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            # Weights of experts are plain parameters of a custom module. Weights of torch.nn with three dimensions
            # (Conv1d) are not matrices of a matmul.
            stacked = parameter.dim() == 3 and not type(module).__module__.startswith("torch.nn.")
            if (
                id(parameter) not in tables
                and parameter.is_floating_point()
                and (stacked or (linear and parameter.dim() == 2))
            ):
                found[name] = dtype
    return found


def frozen_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Returns the weights of `autocast_dtypes` that are not trained, as a mapping of names to `dtype`.

    Stored in `dtype`, they result in the same forward and backward pass, bit for bit. Layers with DoRA are not
    included, because the norms of their weights are computed in fp32.

    Args:
        model: The model, possibly on the meta device.
        dtype: The dtype of autocast.
    """
    cast = autocast_dtypes(model, dtype)
    dora = tuple(f"{name}." for name, m in adapted_modules(model) if len(getattr(m, "lora_magnitude_vector", ())))
    return {
        name: dtype
        for name, parameter in model.named_parameters()
        if name in cast and not parameter.requires_grad and not name.startswith(dora)
    }


def hold_weights(model: nn.Module, precision: str, frozen_only: bool = False) -> None:
    """Stores weights in the dtype to which autocast casts them, in place. Does nothing in fp32.

    Args:
        model: The model, possibly on the meta device.
        precision: `accelerator.precision`.
        frozen_only: Whether weights that are trained keep their dtype.
    """
    if precision != "fp32":
        hold_in(model, (frozen_dtypes if frozen_only else autocast_dtypes)(model, DTYPES[precision]))


def hold_in(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Changes the dtypes of parameters in place.

    Args:
        model: The model. On the meta device, its source is replaced too, so that it returns values of these dtypes.
        dtypes: Maps parameter names to their new dtypes. Other parameters keep theirs.
    """
    for name, parameter in model.named_parameters():
        if name in dtypes:
            # The parameter stays the same object, so tied parameters stay tied.
            parameter.data = parameter.data.to(dtypes[name])
    if (source := source_of(model)) is not None:
        attach_source(model, functools.partial(_cast, source, dtypes))


def _cast(source: Source, dtypes: Mapping[str, torch.dtype], name: str, box: Box | None = None) -> Tensor:
    value = source(name, box)
    return value.to(dtypes.get(name, value.dtype))


def autocast_forward(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Replaces a model's forward, in place, by one that runs inside a context.

    For backends that disable an autocast context around the call of the model.

    Args:
        model: The model.
        context: Creates the context, once per call.
    """
    forward = model.forward

    # `wraps` keeps the signature of `forward`, from which callers read the names of the arguments.
    @functools.wraps(forward)
    def autocasting(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    model.forward = autocasting


FIRST_SCALE = 2.0**16
"""Initial loss scale of a run, and the default of `torch.amp.GradScaler`."""


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., 2018, arXiv:1710.03740, §3.2).

    The scale halves after a step with a non-finite gradient, which is skipped, and doubles after 2000 finite steps.

    Args:
        device: The device of the loss.
        enabled: Whether to scale. If False, the scale is 1.
        ranks: Number of ranks over which the backend averages gradients. `backward` multiplies the loss by this number,
            so the internal scale is divided by it. A local gradient then overflows at the same scale for any number of
            workers.
    """

    def __init__(self, device: torch.device, enabled: bool, ranks: int = 1):
        self.enabled, self.ranks = enabled, ranks
        self._scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE / ranks, enabled=enabled)

    @property
    def value(self) -> float:
        """The loss scale, independent of the number of ranks."""
        return float(self._scaler.get_scale()) * self.ranks

    def adopt(self, scaler: torch.amp.GradScaler) -> None:
        """Uses a scaler that a backend created, and resets its scale to `FIRST_SCALE`."""
        self._scaler = scaler
        self.load_state_dict({"scale": FIRST_SCALE, "good_steps": 0})

    def scale(self, loss: Tensor) -> Tensor:
        """Returns the loss multiplied by the internal scale."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients of an optimizer by the internal scale, in place."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool, reject: bool = False) -> bool:
        """Steps the optimizer, unless the gradient overflowed or the step is rejected, and updates the scale.

        Args:
            optimizer: The optimizer.
            finite: Whether the gradient norm is finite. Ignored if scaling is disabled.
            reject: Whether to skip the step in any case.

        Returns:
            Whether the step was skipped.
        """
        # Not with `GradScaler.step`: it makes a fused optimizer skip the step itself, and fused SGD (torch 2.13, CPU)
        # writes the overflow of a skipped first step into its momentum.
        skipped = reject or (self.enabled and not finite)
        if not skipped:
            optimizer.step()
        # `update` uses the overflow check of `unscale_`: a rejected step with a finite gradient counts as a good one.
        self._scaler.update()
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Returns the scale and the number of steps since it last changed, as JSON; {} if disabled."""
        state = self._scaler.state_dict()
        return {"scale": self.value, "good_steps": state["_growth_tracker"]} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint.

        Args:
            state: The result of `state_dict`. It is empty for a checkpoint of another precision, and then ignored.
        """
        # Checkpoints contain the scale without the factor `ranks`, so the number of workers may differ.
        if self.enabled and state:
            self._scaler.load_state_dict(
                {
                    **self._scaler.state_dict(),
                    "scale": state["scale"] / self.ranks,
                    "_growth_tracker": state["good_steps"],
                }
            )
