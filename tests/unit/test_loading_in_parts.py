"""Weights of a folder in Hugging Face format, read in parts, compared with those that transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import LLAMA
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.common.materialize import Source, source_of
from myllm_ray.common.tensor_files import Box, box_of, part_of
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models import conversion, weights_folder
from myllm_ray.models.load import build_deferred, build_model

SIZES = {**LLAMA, "vocab_size": 260, "num_hidden_layers": 2, "tie_word_embeddings": False, "pad_token_id": None}
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_local_experts": 12,
    "num_experts": 12,
    "n_routed_experts": 12,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "tied": {**SIZES, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 260},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 260},
    **{name: {**SIZES, **EXPERTS, "model_type": name} for name in ("mixtral", "qwen3_moe", "jamba", "qwen3_next")},
    "deepseek_v3": {**SIZES, **EXPERTS, **LATENT, "model_type": "deepseek_v3"},
}


def saved(folder: Path, config: dict[str, Any], base: bool = False, **arguments: Any) -> Any:
    """Writes a model with random weights and returns the model that transformers loads."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    (model.base_model if base else model).save_pretrained(folder, **arguments)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def section(folder: Path, config: dict[str, Any], **given: Any) -> ModelSection:
    eager = config["model_type"] in ("mamba", "jamba")
    return ModelSection(name=str(folder), attention="eager" if eager else "sdpa", **given)


def source(folder: Path, config: dict[str, Any], **given: Any) -> Source:
    found = source_of(build_deferred(section(folder, config, **given), byte_tokenizer(), 32, 0))
    assert found is not None, "the model is built whole"
    return found


def thirds(tensor: torch.Tensor) -> Iterator[Box]:
    """Yields the uneven parts of three ranks, along each dimension."""
    for dim, size in enumerate(tensor.shape):
        for start in range(0, size, -(-size // 3)):
            offsets, lengths = [0] * tensor.dim(), list(tensor.shape)
            offsets[dim], lengths[dim] = start, min(-(-size // 3), size - start)
            yield Box(tuple(offsets), tuple(lengths))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("supported", [True, False])
def test_parts_are_those_of_the_loaded_model(
    name: str, supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Separate experts, several files, and operations of transformers that are not supported in parts."""
    expected = saved(tmp_path, MODELS[name], max_shard_size="40KB")
    if not supported:
        if "experts" not in "".join(dict(expected.named_parameters())):
            pytest.skip("no operation is needed")
        monkeypatch.setattr(conversion, "_OPERATIONS", {})
    found = source(tmp_path, MODELS[name])
    for key, parameter in expected.named_parameters():
        assert torch.equal(found(f"model.{key}"), parameter), key
        for box in thirds(parameter):
            assert torch.equal(found(f"model.{key}", box), part_of(parameter, box)), (key, box)


def test_names_of_a_base_model(tmp_path: Path) -> None:
    """The files of GPT-2 on the hub have no prefix `transformer.`."""
    expected = saved(tmp_path, MODELS["gpt2"], base=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert "h.0.attn.c_attn.weight" in opened.keys()  # noqa: SIM118 (not a mapping)
    found = source(tmp_path, MODELS["gpt2"])
    for key, parameter in expected.named_parameters():
        assert torch.equal(found(f"model.{key}"), parameter), key


def test_files_that_do_not_match_their_config(tmp_path: Path) -> None:
    saved(tmp_path, SIZES)
    config = AutoConfig.from_pretrained(tmp_path)
    config.intermediate_size = 80
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.name: the files in .* hold model\.layers\.0\.mlp\.\S* of shape \["):
        build_deferred(section(tmp_path, SIZES), byte_tokenizer(), 32, 0)


def test_quantized_weights_are_not_read_as_plain_ones(tmp_path: Path) -> None:
    """Regression test: a folder with fp8 weights was read without their scales."""
    saved(tmp_path, SIZES)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^model\.name: .* can't be loaded: "):
        build_model(section(tmp_path, SIZES), byte_tokenizer(), 32, 0)


class CountedFile:
    """An open file that counts the elements that are read."""

    def __init__(self, opened: Any, read: list[int]):
        self.opened, self.read = opened, read

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.opened.get_tensor(name)
        self.read.append(tensor.numel())
        return tensor

    def get_slice(self, name: str) -> Any:
        read, inner = self.read, self.opened.get_slice(name)

        class Slice:
            get_shape = staticmethod(inner.get_shape)

            def __getitem__(self, index: Any) -> torch.Tensor:
                tensor: torch.Tensor = inner[index]
                read.append(tensor.numel())
                return tensor

        return Slice()


RANKS = 64
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_a_rank_reads_its_share(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP on rank 0 of 64 fills its shards: with the values of the model, and by reading not more than them."""
    config = {**MODELS[name], **(WIDE if name != "gpt2" else {"n_embd": 128}), "vocab_size": 320}
    config.update({"moe_intermediate_size": 128} if name == "qwen3_moe" else {})
    expected = dict(saved(tmp_path, config).named_parameters())
    read: list[int] = []

    monkeypatch.setattr(weights_folder, "_open", lambda path: CountedFile(safe_open(path, "pt"), read))
    model = build_deferred(section(tmp_path, config), byte_tokenizer(), 32, 0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        accelerator = FSDPAccelerator({"accelerator": {"name": "fsdp", "device": "cpu"}})
        accelerator.wrap(model)
        held = 0
        for key, shard in model.named_parameters():
            assert isinstance(shard, DTensor)
            assert torch.equal(shard.to_local(), part_of(expected[key.removeprefix("model.")], box_of(shard))), key
            held += shard.to_local().numel()
    finally:
        dist.destroy_process_group()
    assert sum(read) == held <= 1.1 * sum(p.numel() for p in expected.values()) / RANKS
