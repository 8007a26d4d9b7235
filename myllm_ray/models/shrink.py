"""Reduces a model config to a small model of the same architecture, for checks that must take only seconds.

The small model has every type of layer of the full one (full, sliding-window, linear, convolutional, sparse, ...).
Structural properties, such as which tokens a layer attends to, are therefore the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import config_of

_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "decoder_layers",
    "num_blocks",
    "num_decoder_layers",
)
_LEAST_LAYERS = 2
_WIDTH, _STATE_WIDTH = 64, 16
_CAPS: dict[int, tuple[str, ...]] = {
    _LEAST_LAYERS: ("encoder_layers", "num_encoder_layers", "num_layers_per_stack"),
    # Width of the residual stream, then widths inside a layer.
    _WIDTH: (
        "hidden_size",
        "n_embd",
        "d_model",
        "word_embed_proj_dim",
        "embedding_size",
        "embedding_dim",
        "dim_model",
        "lru_width",
        "emb_dim",
        "index_topk",
    ),
    96: (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "d_ff",
        "dim_ff",
        "dff",
        "ffn_hidden_size",
        "decoder_ffn_dim",
        "encoder_ffn_dim",
        "intermediate_size_mlp",
        "shared_intermediate_size",
    ),
    32: (
        "moe_intermediate_size",
        "expert_ffn_hidden_size",
        "shared_expert_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "moe_latent_size",
        "q_lora_rank",
        "kv_lora_rank",
        "o_lora_rank",
    ),
    # The heads of an indexer: with few of them many keys would have the score 0, and the selection would be arbitrary.
    16: (
        "index_n_heads",
        "head_dim",
        "dim_head",
        "global_head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "index_head_dim",
        "hidden_size_per_layer_input",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_head_dim",
        "mamba_d_state",
        "state_size",
        "ssm_state_size",
    ),
    8: ("qk_rope_head_dim", "rotary_dim", "time_step_rank", "mamba_dt_rank"),
    4: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "decoder_attention_heads",
        "encoder_attention_heads",
        "num_decoder_attention_heads",
        "num_encoder_attention_heads",
        "linear_num_value_heads",
        "linear_num_heads",
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
        "zero_expert_num",
    ),
    2: (
        "num_key_value_heads",
        "num_global_key_value_heads",
        "linear_num_key_heads",
        "mamba_n_groups",
        "n_groups",
        "mamba_ngroups",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "n_group",
        "num_expert_group",
    ),
    1: ("topk_group", "first_k_dense_replace", "num_dense_layers"),
}
"""Names of size parameters in transformers configs, grouped by their largest value in a small model."""
_SIZES = {name: most for most, names in _CAPS.items() for name in names}
_STATE_HEADS = {
    "num_heads": ("head_dim", "expand"),
    "mamba_num_heads": ("mamba_head_dim", "expand"),
    "mamba_n_heads": ("mamba_d_head", "mamba_expand"),
}
"""Key of the number of state-space heads: (key of their width, key of their total width divided by the hidden size)."""
_NESTED = ("text_config", "decoder")
_NOT_SETTINGS = (
    "model_type",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "quantization_config",
    "vocab_size",
    "per_layer_config",
)  # per_layer_config has sizes by layer index; the layer types are in separate lists


def small_model(section: ModelSection) -> ModelSection:
    """Returns the model section of a small model of the same architecture with random weights.

    The vocabulary size is left to the tokenizer, and lists with an entry per layer (attention types) are shortened. A
    section with a factory is returned unchanged.
    """
    if section.factory:
        return section
    whole = config_of(section)
    given = dict(section.config or {}) if section.name is None else _settings(whole)
    given.pop("vocab_size", None)
    given.update(small_sizes(whole))
    if getattr(whole, "tie_word_embeddings", False):
        given["tie_word_embeddings"] = True
    # The small model has fewer blocks, so indices and patterns may match nothing in it.
    lora = section.lora and section.lora.model_copy(
        update={
            "layers": None,
            "targets": "all-linear" if isinstance(section.lora.targets, str) else section.lora.targets,
            "exclude": [] if isinstance(section.lora.exclude, str) else section.lora.exclude,
        }
    )
    return section.model_copy(update={"name": None, "config": given, "lora": lora, "freeze": [], "quantize": None})


def _settings(whole: Any) -> dict[str, Any]:
    """Returns the settings in which the config of a folder or hub model differs from the defaults of its type.

    Token ids are excluded, because they belong to the model's own vocabulary.
    """
    own = {
        k: v
        for k, v in whole.to_diff_dict().items()
        if k not in _NOT_SETTINGS and not k.startswith("_") and "token_id" not in k and _is_plain(whole, k)
    }
    return {"model_type": whole.model_type, **own}


def small_sizes(whole: Any) -> dict[str, Any]:
    """Returns the settings that make a transformers config small, without `model_type` and the vocabulary size."""
    known = {k: v for k, v in whole.to_dict().items() if v is not None and _is_plain(whole, k)}
    small: dict[str, Any] = {k: min(v, _SIZES[k]) for k, v in known.items() if k in _SIZES and type(v) is int}
    small.update(_small_heads(known, small))
    small.update(_small_layers(known))
    # Lists are factors for each dimension of a head, whose width changes.
    if any(isinstance(v, list) for v in _leaves(known.get("rope_parameters"))):
        small["rope_parameters"] = _plain_rope(known["rope_parameters"])
    for name in _NESTED:
        if hasattr(getattr(whole, name, None), "to_dict"):
            inner = getattr(whole, name)
            small[name] = {**_settings(inner), **small_sizes(inner)}
    return small


def _is_plain(whole: Any, key: str) -> bool:
    """Returns whether a setting has a single value, rather than one per layer in `per_layer_config`."""
    try:
        return hasattr(whole, key)
    except Exception:  # AmbiguousGlobalPerLayerAttributeError of transformers is not an AttributeError
        return False


def _small_heads(known: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the head sizes that are determined by other sizes."""
    heads: dict[str, Any] = {}
    if "num_key_value_heads" in small and known["num_key_value_heads"] == known.get("num_attention_heads"):
        heads["num_key_value_heads"] = small["num_attention_heads"]
    if "qk_rope_head_dim" in small:  # latent attention: a head has a rotary part and a part without positions
        if known.get("head_dim") == known["qk_rope_head_dim"]:
            heads["head_dim"] = small["qk_rope_head_dim"]
        if "qk_head_dim" in known:
            heads["qk_head_dim"] = small["qk_rope_head_dim"] + small["qk_nope_head_dim"]
    for number, (width, factor) in _STATE_HEADS.items():
        # The number of heads times their width must equal the expanded hidden size.
        if number in known and factor in known:
            heads[width] = _STATE_WIDTH
            heads[number] = int(known[factor] * _WIDTH) // _STATE_WIDTH
            if "mamba_d_ssm" in known:
                heads["mamba_d_ssm"] = heads[number] * _STATE_WIDTH
    return heads


def _small_layers(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the number of layers and the lists with an entry per layer, as short as every layer type allows."""
    names = [k for k in _LAYERS if type(known.get(k)) is int]
    many = {known[k] for k in names}
    listed = {k: v for k, v in known.items() if isinstance(v, list) and len(v) in many and not _are_indices(v)}
    indices = {k: v for k, v in known.items() if isinstance(v, list) and v and k not in listed and _are_indices(v)}
    pattern = {k: v for k, v in known.items() if "block_type" in k and isinstance(v, list) and k not in listed}
    shared = bool(known.get("num_kv_shared_layers"))
    # If layer types are given by layer indices, the first layers are kept unchanged; otherwise one layer of each type.
    kept = {k: _prefix(v) if indices else _kinds(v) * (1 + shared) for k, v in listed.items()}
    count = max(
        [
            _LEAST_LAYERS,
            *map(len, kept.values()),
            *map(len, pattern.values()),
            *(min(v) + 1 for v in indices.values()),
            *(known[k.replace("_period", "_offset")] + 1 for k in known if k.endswith("_layer_period")),
        ]
    )
    count = min(count, *many) if many else count
    small: dict[str, Any] = dict.fromkeys(names, count)
    for key, value in listed.items():
        cut = (value if indices else kept[key] + value)[:count]
        small[key] = [min(v, _SIZES[key]) for v in cut] if key in _SIZES else cut
    small.update({k: [i for i in v if i < count] for k, v in indices.items()})
    if shared:
        # Half of the layers reuse keys and values, so each type also occurs among the layers that compute them.
        small["num_kv_shared_layers"] = count // 2
    if "attention_types" in known:  # GPT-Neo: [[[layer types], repetitions]]
        small["attention_types"] = [[known["attention_types"][0][0], -(-count // len(known["attention_types"][0][0]))]]
    if "num_attention_heads_per_layer" in small:
        small["num_attention_heads_per_layer"] = [_SIZES["num_attention_heads"]] * count
    return small


def _are_indices(values: list[Any]) -> bool:
    """Returns whether a list contains layer indices, rather than a property of each layer."""
    return all(type(v) is int for v in values) and all(a < b for a, b in pairwise(values)) and values != [0, 1]


def _kinds(values: list[Any]) -> list[Any]:
    """Returns the distinct values in order of first occurrence."""
    return [kind for i, kind in enumerate(values) if kind not in values[:i]]


def _prefix(values: list[Any]) -> list[Any]:
    """Returns the shortest prefix that contains every distinct value."""
    return values[: max(values.index(kind) for kind in _kinds(values)) + 1]


def _leaves(value: Any) -> list[Any]:
    return [leaf for v in value.values() for leaf in _leaves(v)] if isinstance(value, Mapping) else [value]


def _plain_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    if any(isinstance(v, Mapping) for v in given.values()):  # one entry per layer type
        return {k: _plain_rope(v) if isinstance(v, Mapping) else v for k, v in given.items()}
    return {"rope_type": "default", **{k: v for k, v in given.items() if k in ("rope_theta", "partial_rotary_factor")}}


def without_dropout(section: ModelSection) -> tuple[ModelSection, bool]:
    """Returns the section with every dropout probability at 0, and whether any was above 0."""
    if section.factory:
        return section, False
    whole = config_of(section).to_dict()
    drops = {
        k: v for k, v in whole.items() if (k.endswith("pdrop") or "dropout" in k) and isinstance(v, float) and v > 0
    }
    changes: dict[str, Any] = {"config": {**(section.config or {}), **dict.fromkeys(drops, 0.0)}} if drops else {}
    if section.lora is not None and section.lora.dropout:
        changes["lora"] = section.lora.model_copy(update={"dropout": 0.0})
    return section.model_copy(update=changes), bool(changes)
