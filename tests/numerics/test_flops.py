"""The counted operations of a step, compared with those that torch executes and with masks written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import LLAMA
from torch.utils.flop_counter import FlopCounterMode

from myllm_ray.config.lora_section import LoraSection
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.flops import model_flops
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.ops.workload import Workload, attended, pairs_of

SIZES = {k: v for k, v in LLAMA.items() if k not in ("model_type", "tie_word_embeddings")}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "qwen3": {**SIZES, "head_dim": 32},
    "gemma3_text": {**SIZES, "head_dim": 32, "sliding_window": 8},
    "mistral": {**SIZES, "sliding_window": 8},
    "phi3": SIZES,
    "olmo2": SIZES,
    "qwen3_moe": {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **SIZES,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "n_group": 1,
        "topk_group": 1,
    },
}
ROWS, WIDTH = 2, 96


def section(model_type: str, **more: Any) -> ModelSection:
    config = {"model_type": model_type, **ARCHITECTURES[model_type]}
    return ModelSection(config=config, attention="eager", **more)


def executed(given: ModelSection, targets: int) -> int:
    """Returns the operations that torch counts in one forward and backward pass."""
    model = build_model(given, byte_tokenizer(), WIDTH, seed=0)
    model.model.config._experts_implementation = "eager"  # torch counts no operations of its grouped product
    ids = torch.randint(3, 200, (ROWS, WIDTH))
    labels = torch.full_like(ids, -100)
    labels[:, -targets:] = ids[:, -targets:]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels).nll_sum.backward()
    return int(counter.get_total_flops())


def counted(given: ModelSection, targets: int) -> float:
    """Returns the counted operations with the attention of every token to every token, which eager attention does."""
    model = build_skeleton(given, byte_tokenizer(), WIDTH)
    assert model is not None
    found = model_flops(model)
    predicted = ROWS * (WIDTH if found.head_everywhere else targets)
    dense = sum(found.per_pair.values()) * ROWS * WIDTH**2
    return found.per_token * ROWS * WIDTH + found.per_prediction * predicted + dense


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_counted_operations_are_those_that_torch_executes(model_type: str) -> None:
    given = section(model_type)
    assert counted(given, 40) == pytest.approx(executed(given, 40), rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        {"lora": LoraSection(rank=4)},
        {"lora": LoraSection(rank=4, targets=["q_proj", "v_proj"])},
        {"freeze": [r"embed_tokens|layers\.0\.|lm_head"]},
        {"freeze": ["embed_tokens|lm_head"]},
        {"freeze": ["self_attn"]},
    ],
    ids=lambda more: str(more)[:40],
)
def test_frozen_layers_count_what_is_computed_for_them(more: dict[str, Any]) -> None:
    given = section("llama", **more)
    # In the first trained block, torch skips the gradient of keys that nothing trained depends on.
    assert counted(given, 40) == pytest.approx(executed(given, 40), rel=0.035)
    assert counted(given, 40) < 0.99 * counted(section("llama"), 40)


def written_out(lengths: list[int], window: int | None, chunk: int | None) -> int:
    """Returns the attended pairs of documents in one row, from their mask."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(n) for n in lengths])
    mask = (document[:, None] == document) & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    if chunk is not None:
        mask &= place[:, None] // chunk == place // chunk
    return int(mask.sum())


@pytest.mark.parametrize("mask", [(None, None), (1, None), (5, None), (64, None), (None, 4), (None, 64)])
def test_attention_is_counted_by_document(mask: tuple[int | None, int | None]) -> None:
    lengths = [1, 7, 20, 3, 33]
    assert attended(np.asarray(lengths), *mask) == written_out(lengths, *mask)


@pytest.mark.parametrize("mask", [(None, None), (5, None)])
def test_answers_with_a_shared_prompt(mask: tuple[int | None, int | None]) -> None:
    prompt, first, second = 9, 4, 6
    work = Workload(np.asarray([prompt, first, second]), first + second, np.asarray([0, prompt, prompt]))
    alone = attended(np.asarray([prompt + first, prompt + second]), *mask)
    assert pairs_of(work, *mask) == alone - attended(np.asarray([prompt]), *mask)
    assert work.tokens == prompt + first + second


def test_layers_without_attention_count_their_weights_only() -> None:
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}
    given = ModelSection(config=config, attention="eager")
    found = model_flops(build_skeleton(given, byte_tokenizer(), 64))  # type: ignore[arg-type]
    assert not found.per_pair
    assert found.per_token > 0


def test_windows_are_those_of_the_layers() -> None:
    config = {"model_type": "gemma3_text", **SIZES, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8}
    found = model_flops(build_skeleton(ModelSection(config=config), byte_tokenizer(), 64))  # type: ignore[arg-type]
    assert set(found.per_pair) == {(8, None), (None, None)}
    assert found.per_pair[(8, None)] == 5 * found.per_pair[(None, None)] == 5 * 3 * 4 * 4 * 16
