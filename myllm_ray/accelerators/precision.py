"""Precision: what the model computes in. Master weights, moments and the reduction of gradients stay in fp32."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.materialize import Source, attach_source, source_of
from myllm_ray.config.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def why_not(precision: str, device: torch.device) -> str | None:
    """Why a device can't train in a precision, or None."""
    if precision == "fp32":
        return None
    if device.type == "cuda":
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            return f"{torch.cuda.get_device_name(device)} has no bf16 (compute capability 8.0 and later has)"
        return None
    has = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    if precision == "fp16" and (has is None or not has()):
        return "this CPU has no fp16 arithmetic (AVX512-FP16 or AMX-FP16)"
    return None


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        ConfigError: says why, and what to use.
    """
    reason = why_not(precision, device)
    if reason:
        other = "bf16 or fp32" if precision == "fp16" else "fp16 or fp32"
        raise ConfigError(f"accelerator.precision={precision}: {reason}; use {other}")


def autocast_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Weights that autocast casts to `dtype` at every use, by name: held in it, they take half the memory and give the same numbers.

    These are the weights of linear layers and stacked experts. Embeddings, and heads tied to them, norms and biases are used in fp32.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    found: dict[str, torch.dtype] = {}
    for prefix, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's, of transformers
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            stacked = parameter.dim() == 3 and not type(module).__module__.startswith("torch.nn.")
            if id(parameter) not in tables and parameter.is_floating_point() and (stacked or (linear and parameter.dim() == 2)):
                found[name] = dtype
    return found


def hold_in(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Change the dtypes of parameters, in place; of a model on the meta device, of those that its source will give."""
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
    if (source := source_of(model)) is not None:
        attach_source(model, functools.partial(_cast, source, dtypes))


def _cast(source: Source, dtypes: Mapping[str, torch.dtype], name: str) -> Tensor:
    value = source(name)
    return value.to(dtypes.get(name, value.dtype))


def autocast_forward(model: nn.Module, context: Callable[[], AbstractContextManager[Any]]) -> None:
    """Put a context around a model's forward, in place: for backends that switch off a context around the call."""
    forward = model.forward

    @functools.wraps(forward)
    def autocasting(*args: Any, **kwargs: Any) -> Any:
        with context():
            return forward(*args, **kwargs)

    model.forward = autocasting


FIRST_SCALE = 2.0**16


class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al., 2018, arXiv:1710.03740, §3.2); does nothing where disabled.

    The scale halves when a gradient is not finite (that step is skipped) and doubles after 2000 good steps.

    Args:
        ranks: number of ranks over which gradients are averaged. `backward` multiplies the loss by it, so the scaler inside
            takes so much less, and a local gradient overflows at the same scale whatever the number of workers.
    """

    def __init__(self, device: torch.device, enabled: bool, ranks: int = 1):
        self.enabled, self.ranks = enabled, ranks
        self._scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE / ranks, enabled=enabled)

    @property
    def value(self) -> float:
        return float(self._scaler.get_scale()) * self.ranks

    def adopt(self, scaler: torch.amp.GradScaler) -> None:
        """Speak for a scaler that a backend made."""
        self._scaler = scaler
        self.load_state_dict({"scale": FIRST_SCALE, "good_steps": 0})

    def scale(self, loss: Tensor) -> Tensor:
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients as they are without the scale."""
        self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: bool, vetoed: bool = False) -> bool:
        """Step unless the gradient is not finite or there is a veto, and adapt the scale; returns whether it was skipped.

        Not by `GradScaler.step`: that leaves the skipping to a fused optimizer, and SGD's (torch 2.13, CPU) fills its momentum
        with the overflow of a skipped first step.
        """
        skipped = vetoed or (self.enabled and not finite)
        if not skipped:
            optimizer.step()
        self._scaler.update()
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """JSON; empty where disabled."""
        state = self._scaler.state_dict()
        return {"scale": self.value, "good_steps": state["_growth_tracker"]} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; one of another precision has nothing to go on from."""
        if self.enabled and state:
            self._scaler.load_state_dict({**self._scaler.state_dict(), "scale": state["scale"] / self.ranks,
                                          "_growth_tracker": state["good_steps"]})
