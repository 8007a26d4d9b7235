"""Small models and tokenizers for the tests of the export to GGUF."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from myllm_ray.data.tokenizer import SPECIAL, byte_tokenizer, train_bpe
from myllm_ray.models.causal_lm import CausalLM

TEXTS = [
    "The river runs past 12 stones, and it's 3,456 metres long.\n\n\tWe've measured it twice!",
    "def f(x):\n    return {'a': x ** 2, \"b\": [1, 2, 30000]}  # squares\r\n",
    "Ünïcödé: größer, naïve, 你好，世界 — ça va? 🙂 ½ ٣",
    "   leading and trailing   ",
]
"""Texts with what pre-tokenizers treat differently: digits, contractions, spaces, line breaks, other scripts."""
_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE, "num_key_value_heads": 2},
    "llama-tied": {"model_type": "llama", **_SHAPE, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-biases": {"model_type": "llama", **_SHAPE, "num_key_value_heads": 2, "attention_bias": True},
    "llama3-rope": {
        "model_type": "llama",
        **_SHAPE,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"model_type": "mistral", **_SHAPE, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": 64},
    "qwen2": {"model_type": "qwen2", **_SHAPE, "num_key_value_heads": 2},
    "qwen3": {"model_type": "qwen3", **_SHAPE, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 96},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SHAPE,
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 16,
        "max_position_embeddings": 256,
    },
}
GPT2_SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def model_of(name: str, rows: int, scale: float = 3.0) -> CausalLM:
    """Returns a model of `CONFIGS` with random weights, whose logits differ enough for stable greedy tokens."""
    given = dict(CONFIGS[name], vocab_size=rows, bos_token_id=None, eos_token_id=256, pad_token_id=None)
    torch.manual_seed(7)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(scale)
    return CausalLM(model.eval())


def wrap(raw: Tokenizer, template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=SPECIAL[0], pad_token=SPECIAL[1], chat_template=template
    )


def byte_level(*before: Any, regex: bool, ignore_merges: bool = False, normalizer: Any = None) -> Any:
    """Returns a trained byte-level BPE with the given steps before the byte-level one."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps = [*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps) if before else steps[0]
    raw.decoder = decoders.ByteLevel()
    if normalizer is not None:
        raw.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return wrap(raw)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(prefix: bool) -> Any:
    """Returns a BPE in the style of SentencePiece, with all merges of each token, as a conversion of one has."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    trained = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", *SPECIAL], show_progress=False)
    raw.train_from_iterator([text.encode("ascii", "ignore").decode() for text in TEXTS * 3], trained)
    state = json.loads(raw.to_str())
    vocabulary = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    special = ["<unk>", *SPECIAL]
    order = ["".join(m) if isinstance(m, list) else m.replace(" ", "") for m in state["model"]["merges"]]
    pieces = [*special, *(f"<0x{b:02X}>" for b in range(256)), *(t for t in vocabulary if t not in special)]
    known = set(pieces)
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    state["model"]["merges"] = [
        [whole[:at], whole[at:]]
        for whole in order
        for at in range(1, len(whole))
        if whole[:at] in known and whole[at:] in known
    ]
    for token in state["added_tokens"]:
        token["id"] = pieces.index(token["content"])
    raw = Tokenizer.from_str(json.dumps(state))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *([decoders.Strip(" ", 1, 0)] * prefix)]
    )
    return wrap(raw)


KINDS = ("bytes", "bpe", "smollm", "qwen2", "llama3", "llama3-merges", "sentencepiece", "gemma")


@cache
def tokenizers_by_name() -> dict[str, Any]:
    """Returns one tokenizer of each of `KINDS`, which a GGUF file can express."""
    from myllm_ray.models.gguf.tokenizer import _LLAMA3, _QWEN2

    return {
        "bytes": byte_tokenizer(),
        "bpe": train_bpe(TEXTS * 3, 360),
        "smollm": byte_level(pre_tokenizers.Digits(individual_digits=True), regex=True),
        "qwen2": byte_level(split(_QWEN2), regex=False, normalizer=normalizers.NFC()),
        "llama3": byte_level(split(_LLAMA3), regex=False, ignore_merges=True),
        "llama3-merges": byte_level(split(_LLAMA3), regex=False),
        "sentencepiece": sentencepiece(prefix=True),
        "gemma": sentencepiece(prefix=False),
    }


def ends(tokenizer: Any) -> GenerationConfig:
    config = GenerationConfig()
    config.eos_token_id = [tokenizer.eos_token_id]
    return config
