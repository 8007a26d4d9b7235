"""Verification of exported folders whose tensors have other names than the model's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config.errors import UserError
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import cast_weights, write_model
from myllm_ray.models.verification import compare_logits, has_own_names, verify_logits, verify_tensors

MIXTURE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 260,
}


def test_a_mixture_of_experts_is_stored_under_other_names(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MIXTURE), dtype=torch.float32)
    cast_weights(model, torch.bfloat16)
    write_model(model, byte_tokenizer(), tmp_path / "o")
    assert not has_own_names(model, tmp_path / "o")
    with pytest.raises(UserError, match="transformers stores this architecture under other names"):
        verify_tensors(model, tmp_path / "o")
    verify_logits(model, tmp_path / "o")
    path = tmp_path / "o" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.5}, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="computes other logits than the run's model"):
        verify_logits(model, tmp_path / "o")


def test_a_folder_that_cannot_be_loaded(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MIXTURE), dtype=torch.float32)
    write_model(model, byte_tokenizer(), tmp_path / "o")
    (tmp_path / "o" / "model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match=r"the exported folder can't be loaded: .*; nothing is kept"):
        verify_logits(model, tmp_path / "o")


def test_the_comparison_of_logits() -> None:
    expected = torch.tensor([[1.0, -100.0, float("nan")]])
    compare_logits(expected, expected + torch.tensor([[5e-4, 0.0, 0.0]]), "it")
    for found in (expected + torch.tensor([[2e-3, 0.0, 0.0]]), torch.tensor([[1.0, -100.0, 0.0]]), expected[:, :2]):
        with pytest.raises(UserError, match="nothing is kept"):
            compare_logits(expected, found, "it")
