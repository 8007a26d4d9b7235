"""The architectures that can be written as GGUF: which of their settings llama.cpp computes, and how.

llama.cpp implements each architecture by hand and silently ignores settings that it does not know. A model is therefore
refused if a setting that changes its logits has a value that llama.cpp does not read. The tensor layouts are those of
llama.cpp's own conversion (github.com/ggml-org/llama.cpp, `conversion/`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from myllm_ray.config.errors import ConfigError

GEMMA_PATTERN, GEMMA_LOCAL_BASE, GEMMA_27B_LAYERS = 6, 10_000.0, 62
"""Constants of Gemma 3 in llama.cpp: every sixth layer is global, the rope base of the others, and the number of layers
from which it recognizes the 27B model, whose queries have another scale."""
Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        name: Its name in GGUF.
        check: Yields what llama.cpp can't compute of a transformers config, as parts of a sentence.
        write: Writes the hyperparameters of a config with the methods of `GGUFWriter`.
        change: Returns a weight in the layout of llama.cpp, given its transformers name and the config.
    """

    name: str
    check: Callable[[Any], Iterator[str]]
    write: Callable[[Any, Any], None]
    change: Callable[[str, Tensor, Any], Tensor]


def architecture_of(config: Any) -> Architecture:
    """Returns the architecture of a transformers config.

    Raises:
        ConfigError: llama.cpp can't compute this model exactly, or the export does not support the architecture.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"--to gguf does not support the architecture {kind}: it supports {', '.join(sorted(ARCHITECTURES))}; "
            "use --to hf"
        )
    found = ARCHITECTURES[kind]
    problem = next(found.check(config), None)
    if problem is not None:
        raise ConfigError(f"--to gguf: llama.cpp can't compute this {kind} model: {problem}; use --to hf")
    return found


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Returns tensors that are computed from the config: the factors of Llama 3's rope, by GGUF name."""
    rope = _rope(config)
    if config.model_type not in ("llama", "mistral") or rope.get("rope_type") != "llama3":
        return {}
    dim = head_size(config)
    frequencies = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    before = float(rope["original_max_position_embeddings"])
    factors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        smooth = (before / wavelength - low) / (high - low)
        if wavelength < before / high:
            factors.append(1.0)
        elif wavelength > before / low:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": torch.tensor(factors, dtype=torch.float32)}


def context_length(config: Any) -> int:
    """Returns the largest number of tokens for which llama.cpp computes the model as transformers does.

    llama.cpp ignores the sliding window of Llama-like models, which has no effect in contexts of at most its size.
    """
    window = getattr(config, "sliding_window", None)
    longest = int(config.max_position_embeddings)
    if window is None or config.model_type == "gemma3_text" or not getattr(config, "use_sliding_window", True):
        return longest
    return min(longest, int(window))


def head_size(config: Any) -> int:
    """Returns the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """Returns the rope settings; those of a kind of layer if the kinds have different ones."""
    found: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    return dict(found.get(layers) or {}) if "full_attention" in found else found


def _check_rope(rope: dict[str, Any], types: tuple[str, ...]) -> Iterator[str]:
    if rope.get("rope_type", "default") not in types:
        yield f"its rope has the type {rope['rope_type']}"
    if float(rope.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "its rope rotates a part of each head"


def _check_llama(config: Any) -> Iterator[str]:
    if config.hidden_act not in ("silu", "swish"):
        yield f"its activation is {config.hidden_act}, llama.cpp has silu"
    yield from _check_rope(
        _rope(config),
        ("default", "linear", "llama3") if config.model_type in ("llama", "mistral") else ("default", "linear"),
    )


def _check_gpt2(config: Any) -> Iterator[str]:
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        yield f"its activation is {config.activation_function}, llama.cpp has gelu_new"
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        yield "the scale of its attention is not 1 / sqrt(head size)"
    if config.add_cross_attention:
        yield "it has cross attention"


def _check_gemma3(config: Any) -> Iterator[str]:
    local, size = _rope(config, "sliding_attention"), head_size(config)
    pattern = ["full_attention" if i % GEMMA_PATTERN == 0 else "sliding_attention" for i in _layers(config)]
    if list(config.layer_types) != pattern:
        yield f"llama.cpp takes every {GEMMA_PATTERN}th layer, and no other, to have full attention"
    if config.hidden_activation != "gelu_pytorch_tanh":
        yield f"its activation is {config.hidden_activation}, llama.cpp has gelu_pytorch_tanh"
    if local.get("rope_type", "default") != "default" or float(local["rope_theta"]) != GEMMA_LOCAL_BASE:
        yield f"the rope of its sliding layers has not the base {GEMMA_LOCAL_BASE:g}"
    yield from _check_rope(_rope(config), ("default", "linear"))
    if config.num_hidden_layers == GEMMA_27B_LAYERS:
        size = config.hidden_size // config.num_attention_heads
    if float(config.query_pre_attn_scalar) != size:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, llama.cpp has {size}"
    if config.final_logit_softcapping is not None or config.attn_logit_softcapping is not None:
        yield "its logits are capped"
    if getattr(config, "use_bidirectional_attention", False):
        yield "its attention is bidirectional"
    if config.attention_bias:
        yield "its attention has biases"


def _layers(config: Any) -> range:
    return range(1, config.num_hidden_layers + 1)


def _write_llama(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _write_gemma3(writer: Any, config: Any) -> None:
    _write_llama(writer, config)
    writer.add_sliding_window(config.sliding_window)


def _write_gpt2(writer: Any, config: Any) -> None:
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)


def _as_is(name: str, weight: Tensor, config: Any) -> Tensor:
    return weight


def _interleaved(name: str, weight: Tensor, config: Any) -> Tensor:
    """Reorders the rows of q and k of a Llama: llama.cpp rotates neighbouring pairs, transformers the two halves."""
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if f".{part}." in name:
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape)
    return weight


def _linear(name: str, weight: Tensor, config: Any) -> Tensor:
    """Transposes the `Conv1D` weights of GPT-2, (inputs, outputs), to (outputs, inputs)."""
    return weight.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else weight


def _shifted(name: str, weight: Tensor, config: Any) -> Tensor:
    """Adds 1 to the weights of Gemma's norms, which multiply by 1 + weight."""
    return weight.float() + 1.0 if name.endswith("norm.weight") else weight


_LLAMA = Architecture("llama", _check_llama, _write_llama, _interleaved)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", _check_llama, _write_llama, _as_is),
    "qwen3": Architecture("qwen3", _check_llama, _write_llama, _as_is),
    "gemma3_text": Architecture("gemma3", _check_gemma3, _write_gemma3, _shifted),
    "gpt2": Architecture("gpt2", _check_gpt2, _write_gpt2, _linear),
}
"""The supported architectures by the `model_type` of transformers."""
