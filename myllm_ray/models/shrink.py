"""The same architecture, small: for checks that must take seconds."""

from __future__ import annotations

from typing import Any

from myllm_ray.config.schema import ModelSection
from myllm_ray.models.load import config_of

_SIZES = {
    "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "hidden_size": 64, "n_embd": 64, "d_model": 64,
    "intermediate_size": 96, "n_inner": 96, "ffn_dim": 96, "d_ff": 96, "moe_intermediate_size": 32, "word_embed_proj_dim": 64,
    "num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
}
"""What the sizes of a transformer are called in the configs of transformers, and how small they become at most."""


def small_model(section: ModelSection) -> ModelSection:
    """A model section of the same kind with few layers of little width and random weights; a factory's model as it is.

    The vocabulary is left to the tokenizer, and what depends on the number of layers (kinds of attention) is cut to it.
    """
    if section.factory:
        return section
    whole = config_of(section)
    given = dict(section.config or {"model_type": whole.model_type})
    given.pop("vocab_size", None)
    for key, most in _SIZES.items():
        value = getattr(whole, key, None)
        if isinstance(value, int):
            given[key] = min(value, most)
    layers = next((given[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if k in given), None)
    for key, value in whole.to_dict().items():
        if isinstance(value, list) and layers and key.startswith("layer"):
            given[key] = _varied(value, layers)
    if whole.tie_word_embeddings:
        given["tie_word_embeddings"] = True
    return section.model_copy(update={"name": None, "config": given})


def _varied(kinds: list[Any], layers: int) -> list[Any]:
    """So many entries with as many different kinds among them as fit."""
    first_of_each = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return (first_of_each + kinds)[:layers]


def without_dropout(section: ModelSection) -> tuple[ModelSection, bool]:
    """The section with every dropout at 0, and whether there was any."""
    if section.factory:
        return section, False
    whole = config_of(section).to_dict()
    drops = {k: v for k, v in whole.items() if (k.endswith("pdrop") or "dropout" in k) and isinstance(v, float) and v > 0}
    changes: dict[str, Any] = {"config": {**(section.config or {}), **dict.fromkeys(drops, 0.0)}} if drops else {}
    if section.lora is not None and section.lora.dropout:
        changes["lora"] = section.lora.model_copy(update={"dropout": 0.0})
    return section.model_copy(update=changes), bool(changes)
