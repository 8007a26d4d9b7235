"""QLoRA: frozen linear layers in 4-bit NormalFloat, dequantized when they are used (Dettmers et al., 2023,
arXiv:2305.14314). bitsandbytes quantizes and dequantizes.

The quantized values are a function of the base weight only, so every rank, backend and restart has the same ones. They
are buffers of integers that checkpoints do not contain: a resume quantizes the base again.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.extras import require
from myllm_ray.common.materialize import Source
from myllm_ray.common.tensor_files import Box, part_of
from myllm_ray.config.errors import ConfigError

log = logging.getLogger(__name__)
BLOCK, NESTED_BLOCK = 64, 256
"""Number of weights that share a scale, and number of scales that share a scale (double quantization)."""
_LEAST_SHARE = 0.5
_PARTS = ("packed", "scales", "nested")


class NF4Linear(nn.Linear):
    """A frozen linear layer with a weight in NF4 with double quantization: 4.127 bits per weight.

    All buffers are bytes, so a backend that converts a model to another dtype does not change them.

    Args:
        layer: The layer whose shape and bias are used, possibly on the meta device. Its weight is not used.
    """

    packed: Tensor
    scales: Tensor
    nested: Tensor

    def __init__(self, layer: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        count, device = self.in_features * self.out_features, layer.weight.device
        scales = -(-count // BLOCK)
        sizes = {"packed": -(-count // 2), "scales": scales, "nested": 4 * (-(-scales // NESTED_BLOCK) + 1)}
        for name in _PARTS:
            self.register_buffer(name, torch.empty(sizes[name], dtype=torch.uint8, device=device), persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized weight, (outputs, inputs), in fp32. Each access dequantizes it."""
        return self.dequantized(torch.float32)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight, (outputs, inputs)."""
        shape = torch.Size((self.out_features, self.in_features))
        if self.packed.is_meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return dequantize(self.packed, self.scales, self.nested, shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: Tensor = _Linear.apply(input.to(dtype), self)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(dtype)


class _Linear(torch.autograd.Function):
    """`input @ weight.T`, which dequantizes the weight again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, input.dtype
        return nn.functional.linear(input, layer.dequantized(input.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.dequantized(ctx.dtype), None


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """Returns the buffers of `NF4Linear` for a weight.

    Args:
        weight: (outputs, inputs), in fp32.
    """
    functional = _functional()
    packed, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    nested = torch.cat([state.state2.absmax.float(), state.offset.float().reshape(1)])
    return {"packed": packed.flatten(), "scales": state.absmax, "nested": nested.view(torch.uint8)}


def dequantize(packed: Tensor, scales: Tensor, nested: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns a weight from the buffers of `NF4Linear`.

    Args:
        packed: (ceil(n / 2),) uint8, two weights per byte.
        scales: (ceil(n / 64),) uint8, the quantized scales of the blocks.
        nested: The scales of the scales and their mean, fp32 as bytes.
        shape: The shape of the weight, of n elements.
        dtype: The dtype of the result.
    """
    functional = _functional()
    floats = nested.view(torch.float32)
    outer = functional.QuantState(
        absmax=floats[:-1], code=_dynamic_map(packed.device), blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    absmax = functional.dequantize_blockwise(scales, outer) + floats[-1]
    state = functional.QuantState(absmax=absmax, shape=shape, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
    weight: Tensor = functional.dequantize_4bit(packed.view(-1, 1), state)
    return weight


def add_quantization(model: nn.Module) -> None:
    """Replaces the frozen linear layers of a transformers model by `NF4Linear`, in place.

    The output head and layers that are trained in full keep their weights.

    Args:
        model: The model with adapters, with its weights or on the meta device.

    Raises:
        UserError: bitsandbytes is not installed.
        ConfigError: The model has no linear layers to quantize.
    """
    _functional()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    kept = {id(m) for of in (head, model.get_input_embeddings()) if of is not None for m in of.modules()}  # type: ignore[operator]
    inside = sum(
        p.numel()
        for module in model.modules()
        if id(module) not in kept
        for p in module.parameters(recurse=False)
        if not p.requires_grad
    )
    quantized = 0
    for name, module in list(model.named_modules()):
        outer, _, last = name.rpartition(".")
        if type(module) is not nn.Linear or id(module) in kept or module.weight.requires_grad:
            continue
        quantized += module.weight.numel()
        replacement = NF4Linear(module)
        if not module.weight.is_meta:
            for part, value in quantize(module.weight.data).items():
                setattr(replacement, part, value)
        setattr(model.get_submodule(outer), last, replacement)
    if not quantized:
        raise ConfigError(
            f"model.quantize: {type(model).__name__} has no frozen nn.Linear layers to quantize (GPT-2 has Conv1D "
            "layers): leave model.quantize out"
        )
    if quantized < _LEAST_SHARE * inside:
        log.warning(
            "model.quantize: only %.0f %% of the frozen parameters outside the embeddings are in linear layers, which "
            "are quantized; stacked experts and convolutions keep their precision",
            100 * quantized / inside,
        )


def quantized_source(base: Source, skeleton: nn.Module) -> Source:
    """Returns the source of a model in which `add_quantization` replaced layers.

    Args:
        base: The source of the model without quantization.
        skeleton: The model with `NF4Linear` layers.
    """
    layers = {name for name, module in skeleton.named_modules() if isinstance(module, NF4Linear)}
    last: dict[str, dict[str, Tensor]] = {}
    shapes: dict[str, torch.Size] = {}

    def source(name: str, box: Box | None = None) -> Tensor:
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in (*_PARTS, "weight"):
            return base(name, box)
        if layer not in last:  # the three buffers of a layer are requested one after the other
            last.clear()
            weight = base(f"{layer}.weight")
            last[layer], shapes[layer] = quantize(weight), weight.shape
        if part == "weight":  # of a model whose layers are dequantized
            return part_of(dequantize(**last[layer], shape=shapes[layer], dtype=torch.float32), box)
        return part_of(last[layer][part], box)

    return source


def remove_quantization(model: nn.Module) -> None:
    """Replaces the `NF4Linear` layers of a model by linear layers with the dequantized weights in fp32, in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, NF4Linear):
            continue
        with torch.device("meta"):
            layer = nn.Linear(module.in_features, module.out_features, bias=False)
        layer.weight = nn.Parameter(module.weight, requires_grad=False)
        layer.bias = module.bias
        outer, _, last = name.rpartition(".")
        setattr(model.get_submodule(outer), last, layer)


_maps: dict[torch.device, Tensor] = {}


def _dynamic_map(device: torch.device) -> Tensor:
    """Returns the 256 values that a quantized scale can have."""
    if device not in _maps:
        _maps[device] = _functional().create_dynamic_map().to(device)
    return _maps[device]


def _functional() -> Any:
    require("bitsandbytes", "myllm_ray[lora]", "model.quantize")
    import bitsandbytes.functional

    return bitsandbytes.functional
