"""Wrong values of `model.config` give a one-line error that names the key, wherever transformers fails on them."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import LLAMA, MakeConfig

from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.prepare import prepare
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.load import build_skeleton
from myllm_ray.preparation import check_model

SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 16},
    "gemma3_text": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16},
    "mixtral": {**LLAMA, "model_type": "mixtral", "num_local_experts": 4},
    "qwen3_5_text": {**LLAMA, "model_type": "qwen3_5_text"},
}
WRONG: list[tuple[str, str, Any]] = [
    ("llama", "num_attention_heads", 3),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_attention_heads", -1),
    ("llama", "num_attention_heads", "4"),
    ("llama", "num_key_value_heads", 3),
    ("llama", "num_key_value_heads", 0),
    ("llama", "head_dim", 3),
    ("llama", "hidden_size", 1.5),
    ("llama", "num_hidden_layers", "two"),
    ("llama", "vocab_size", "x"),
    ("llama", "vocab_size", None),
    ("llama", "hidden_act", "nope"),
    ("llama", "hidden_act", 3),
    ("llama", "rope_parameters", {"rope_type": "nope", "rope_theta": 1e4}),
    ("llama", "rope_parameters", {"rope_type": "yarn"}),
    ("llama", "rope_parameters", "x"),
    ("llama", "rope_theta", 0),
    ("llama", "rope_scaling", 5),
    ("llama", "attention_dropout", -1),
    ("llama", "attention_dropout", 3),
    ("llama", "attention_dropout", None),
    ("llama", "dtype", "float99"),
    ("llama", "id2label", 4),
    ("llama", "mlp_bias", "yes"),
    ("llama", "model_type", 5),
    ("gpt2", "n_head", 3),
    ("gpt2", "n_head", -1),
    ("gpt2", "n_positions", 0),
    ("gpt2", "n_inner", 0),
    ("gpt2", "activation_function", "x"),
    ("qwen3", "num_attention_heads", 3),
    ("qwen3", "head_dim", 3),
    ("qwen3", "layer_types", ["nope", "full_attention"]),
    ("qwen3", "layer_types", ["full_attention"]),
    ("gemma3_text", "num_key_value_heads", 3),
    ("gemma3_text", "sliding_window", None),
    ("gemma3_text", "query_pre_attn_scalar", -1),
    ("mixtral", "num_experts_per_tok", 9),
    ("mixtral", "num_local_experts", 0),
    ("mixtral", "num_local_experts", "many"),
]


@pytest.mark.parametrize("kind", SMALL)
def test_right_values_are_accepted(kind: str) -> None:
    assert build_skeleton(ModelSection(config=SMALL[kind]), byte_tokenizer(), 64) is not None


@pytest.mark.parametrize(("kind", "key", "value"), WRONG)
def test_wrong_values_are_one_line(kind: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        build_skeleton(ModelSection(config={**SMALL[kind], key: value}), byte_tokenizer(), 64)
    text = str(error.value)
    assert "\n" not in text
    assert "model.config" in text or "positions" in text
    assert len(text) < 500


def test_they_are_found_before_a_run_begins(make_config: MakeConfig) -> None:
    config = make_config("model.config.num_attention_heads=3")
    with pytest.raises(ConfigError, match=r"^model\.config: transformers can't build this llama: .*attention heads"):
        check_model(config, prepare(config))
