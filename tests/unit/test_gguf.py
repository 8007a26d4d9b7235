"""GGUF files: read back by transformers and by the gguf package, and what llama.cpp can't express is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import CONFIGS, GPT2_SPLIT, KINDS, byte_level, ends, model_of, sentencepiece, split, tokenizers_by_name
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import GenerationConfig

from myllm_ray.config import ConfigError
from myllm_ray.config.errors import UserError
from myllm_ray.config.sections import ModelSection, TokenizerSection
from myllm_ray.data.templates import DEFAULT_CHAT_TEMPLATE
from myllm_ray.data.tokenizer import byte_tokenizer, load_tokenizer, train_bpe
from myllm_ray.models.gguf.file import check_gguf, verify_gguf_logits, verify_gguf_tensors, write_gguf
from myllm_ray.models.gguf.tokenizer import plain_jinja
from myllm_ray.models.heads import RewardModel
from myllm_ray.models.load import build_model

gguf = pytest.importorskip("gguf")


def written(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Path]:
    tokenizer = byte_tokenizer()
    model = model_of(name, len(tokenizer) + 3)
    check_gguf(model, tokenizer, ends(tokenizer))
    write_gguf(model.model, tokenizer, folder / "m.gguf", ends(tokenizer), dtype, "m")
    return model.model, folder / "m.gguf"


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"llama3-rope"}))
def test_transformers_reads_the_same_model(tmp_path: Path, name: str) -> None:
    inner, path = written(tmp_path, name)
    verify_gguf_logits(inner, path)
    verify_gguf_tensors(inner, path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    inner, path = written(tmp_path, "gpt2", dtype)
    verify_gguf_logits(inner, path)
    verify_gguf_tensors(inner, path)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    short = "BF16" if dtype == torch.bfloat16 else "F16"
    assert kinds["blk.0.attn_qkv.weight"] == kinds["token_embd.weight"] == short
    assert kinds["blk.0.attn_norm.weight"] == kinds["position_embd.weight"] == "F32"


def test_a_name_with_mistral_can_be_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = model_of("mistral", len(tokenizer))
    write_gguf(model.model, tokenizer, tmp_path / "m.gguf", ends(tokenizer), torch.float32, "My-Mistral-SFT")
    verify_gguf_logits(model.model, tmp_path / "m.gguf")


def test_a_run_can_start_from_a_file(tmp_path: Path) -> None:
    inner, path = written(tmp_path, "llama")
    tokenizer = byte_tokenizer()
    ids = tokenizer("hello wörld")["input_ids"]
    for lora in (None, {"rank": 2}):
        section = ModelSection.model_validate({"name": str(path), "lora": lora})
        model: Any = build_model(section, tokenizer, 16, 0)
        with torch.no_grad():
            found, expected = (m.eval()(input_ids=torch.tensor([ids])).logits for m in (model.model, inner))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.name: no file '.*absent\.gguf'"):
        build_model(ModelSection(name=str(path.parent / "absent.gguf")), tokenizer, 16, 0)
    written(tmp_path, "gpt2")
    with pytest.raises(ConfigError, match=r"model\.name: transformers reads wrong sizes from .*: use the model's"):
        build_model(ModelSection(name=str(path)), tokenizer, 16, 0)


def test_a_tokenizer_from_a_file(tmp_path: Path) -> None:
    """transformers reads its merges from the file. Without merges its library panics, which is one line."""
    text = "hello wörld, hello, world"
    tokenizer = train_bpe([text] * 20, 300)
    model = model_of("llama", len(tokenizer))
    write_gguf(model.model, tokenizer, tmp_path / "m.gguf", ends(tokenizer), torch.float32, "m")
    found = load_tokenizer(TokenizerSection(path=str(tmp_path / "m.gguf")))
    assert found(text, add_special_tokens=False)["input_ids"] == tokenizer(text)["input_ids"]
    assert found.eos_token_id == tokenizer.eos_token_id
    written(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"m\.gguf' can't be loaded as a tokenizer: range end index"):
        load_tokenizer(TokenizerSection(path=str(tmp_path / "m.gguf")))


def test_a_difference_is_found(tmp_path: Path) -> None:
    inner, path = written(tmp_path, "llama")
    with torch.no_grad():
        inner.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(UserError, match="computes other logits than the run's model"):
        verify_gguf_logits(inner, path)
    with pytest.raises(UserError, match=r"other values of blk\.1\.ffn_up\.weight"):
        verify_gguf_tensors(inner, path)


def test_the_fields_of_the_file(tmp_path: Path) -> None:
    _, path = written(tmp_path, "mistral")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.context_length"] == 64, "llama.cpp ignores the sliding window, so contexts end at its size"
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"] == 256
    assert len(fields["tokenizer.ggml.tokens"]) == 263
    assert fields["tokenizer.ggml.token_type"][256:] == [3, 3, 3, 3, 5, 5, 5], "special tokens, and rows without one"
    assert fields["tokenizer.chat_template"] == plain_jinja(DEFAULT_CHAT_TEMPLATE)


def test_the_template_renders_the_same_without_generation_tags() -> None:
    tokenizer, messages = byte_tokenizer(), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    plain = plain_jinja(DEFAULT_CHAT_TEMPLATE)
    assert "generation %}" not in plain.replace("add_generation_prompt %}", "")
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages, chat_template=plain, tokenize=False) == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu, llama.cpp has silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rope has the type yarn",
        ),
        ("gpt2", {"activation_function": "relu"}, "its activation is relu, llama.cpp has gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "the scale of its attention"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, llama.cpp has 32"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "every 6th layer"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "its logits are capped"),
        ("llama", {"model_type": "olmo2"}, "does not support the architecture olmo2: it supports gemma3_text, gpt2"),
    ],
)
def test_settings_that_llama_cpp_ignores_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    model, tokenizer = model_of(name, 260), byte_tokenizer()
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=message):
        check_gguf(model, tokenizer, ends(tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_known_tokenizers_are_accepted(kind: str) -> None:
    tokenizer = tokenizers_by_name()[kind]
    check_gguf(model_of("llama", 400), tokenizer, ends(tokenizer))


def incomplete() -> Any:
    """A SentencePiece-like BPE that lacks a merge, so llama.cpp would merge more than it does."""
    tokenizer = sentencepiece(prefix=True)
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(raw))
    return tokenizer


def with_lstrip() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: byte_level(split(GPT2_SPLIT.replace("N}+", "N}{1,2}")), regex=False), "normalizer and pre-tokenizer"),
        (lambda: byte_level(regex=True, ignore_merges=True), "normalizer and pre-tokenizer"),
        (lambda: byte_level(regex=True, normalizer=normalizers.Lowercase()), "normalizer and pre-tokenizer"),
        (lambda: byte_level(pre_tokenizers.Punctuation(), regex=True), "normalizer and pre-tokenizer"),
        (incomplete, "whose concatenation is a token"),
        (with_lstrip, "the token <mask> removes spaces next to it"),
    ],
)
def test_tokenizers_that_llama_cpp_lacks_are_refused(make: Any, message: str) -> None:
    tokenizer = make()
    with pytest.raises(ConfigError, match=message):
        check_gguf(model_of("llama", 400), tokenizer, ends(tokenizer))


def test_other_refusals() -> None:
    tokenizer, many = byte_tokenizer(), GenerationConfig()
    many.eos_token_id = [256, 257, 258, 259]
    with pytest.raises(ConfigError, match="answers end at 4 tokens, and a GGUF file can name 3"):
        check_gguf(model_of("llama", 260), tokenizer, many)
    reward = RewardModel(model_of("llama", 260).model)
    with pytest.raises(ConfigError, match="needs a causal language model; this one is a RewardModel"):
        check_gguf(reward, tokenizer, ends(tokenizer))


def test_fp16_refuses_weights_beyond_its_range(tmp_path: Path) -> None:
    tokenizer, model = byte_tokenizer(), model_of("llama", 260)
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"fp16 can't represent model\.layers\.0\.mlp\.up_proj\.weight.*1e\+05"):
        write_gguf(model.model, tokenizer, tmp_path / "m.gguf", ends(tokenizer), torch.float16, "m")
