"""Models and tokenizers as published: revisions, added tokens, chat templates, damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.common import pretrained
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection, TokenizerSection
from myllm_ray.data.chat_template import ChatTemplate, end_tokens
from myllm_ray.data.tokenizer import byte_tokenizer, load_tokenizer
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.models.vocabulary import with_mean_rows
from myllm_ray.trained_model import open_trained
from myllm_ray.worker import run_local

SHAPES: dict[str, dict[str, Any]] = {
    "tied": LLAMA,
    "untied": {**LLAMA, "tie_word_embeddings": False},
    "head with bias": {**LLAMA, "model_type": "phi", "tie_word_embeddings": False},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 2},
}


def saved(folder: Path, config: dict[str, Any], **arguments: Any) -> Path:
    """Writes a model with random weights for the byte tokenizer, and that tokenizer."""
    torch.manual_seed(3)
    given = {**config, "vocab_size": 260, "tie_word_embeddings": config.get("tie_word_embeddings", False)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given))
    model.save_pretrained(folder, **arguments)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["causal_lm", "reward_model"])
@pytest.mark.parametrize("shape", SHAPES)
def test_new_tokens_get_the_mean_embedding(shape: str, kind: str, tmp_path: Path) -> None:
    if shape == "mamba" and kind == "reward_model":
        pytest.skip("transformers has no sequence classifier for Mamba")
    folder = saved(tmp_path / "base", SHAPES[shape])
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder), add_special_tokens=["<a>", "<b>"]))
    assert len(tokenizer) == 262
    attention: Any = "eager" if shape == "mamba" else "sdpa"
    with pytest.raises(ConfigError, match=r"260 token embeddings, the tokenizer 262 tokens: .*model.resize_vocabulary"):
        build_skeleton(ModelSection(name=str(folder), attention=attention), tokenizer, 16, kind)
    section = ModelSection(name=str(folder), resize_vocabulary=True, attention=attention)
    build_skeleton(section, tokenizer, 16, kind)
    model: Any = build_model(section, tokenizer, 16, 0, kind)
    old = load_file(folder / "model.safetensors")
    rows = 0
    for name, parameter in model.model.named_parameters():
        if name in old and old[name].shape != parameter.shape:
            assert len(parameter) == 320
            torch.testing.assert_close(parameter[:260], old[name], rtol=0, atol=0)
            expected = old[name].double().mean(0).float()
            torch.testing.assert_close(parameter[260:], expected.expand(60, *expected.shape), rtol=0, atol=0)
            rows += 1
    assert rows == {"tied": 1, "untied": 2, "head with bias": 3, "mamba": 2}[shape] - (
        0 if kind == "causal_lm" else {"tied": 0, "untied": 1, "head with bias": 2}[shape]
    )
    assert model.config.get_text_config().vocab_size == 320


def test_an_attention_that_the_architecture_lacks_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", SHAPES["mamba"])
    with pytest.raises(
        ConfigError, match=r"^model\.name: .* the architecture has no model\.attention: sdpa; use eager$"
    ):
        build_skeleton(ModelSection(name=str(folder), attention="sdpa"), byte_tokenizer(), 16)
    build_skeleton(ModelSection(name=str(folder)), byte_tokenizer(), 16)


@pytest.mark.parametrize("shape", ["tied", "untied"])
def test_adapters_need_the_new_embeddings_to_be_trained(shape: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", SHAPES[shape])
    tokenizer = load_tokenizer(TokenizerSection(path=str(folder), add_special_tokens=["<a>"]))
    given: dict[str, Any] = {"name": str(folder), "resize_vocabulary": True, "lora": {"rank": 2}}
    with pytest.raises(
        ConfigError, match=r"new tokens would stay frozen: set .*modules_to_save: \[embed_tokens, lm_head\]"
    ):
        build_skeleton(ModelSection.model_validate(given), tokenizer, 16)
    given["lora"]["modules_to_save"] = ["embed_tokens", "lm_head"]
    model = build_model(ModelSection.model_validate(given), tokenizer, 16, 0)
    assert model.get_submodule("model.model.embed_tokens").weight.requires_grad


def test_a_model_with_enough_embeddings_is_not_resized(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", LLAMA)
    model: Any = build_model(ModelSection(name=str(folder), resize_vocabulary=True), byte_tokenizer(), 16, 0)
    assert len(model.model.get_input_embeddings().weight) == 260


def test_the_mean_does_not_depend_on_the_number_of_threads() -> None:
    tensor = torch.randn(9000, 33)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = with_mean_rows(tensor, 9001)
        torch.set_num_threads(2)
        assert torch.equal(one, with_mean_rows(tensor, 9001))
    finally:
        torch.set_num_threads(threads)


def test_a_chat_template_by_name_is_trained_and_saved(make_config: MakeConfig, tmp_path: Path) -> None:
    """A base model without a template learns llama3's: its tokens are added, and the run contains the template."""
    base = saved(tmp_path / "base", LLAMA)
    chats = [
        {"messages": [{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(16)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    config = make_config(
        model={"name": str(base), "resize_vocabulary": True},
        tokenizer={"path": str(base), "chat_template": "llama3"},
        data={"train": {"path": str(tmp_path / "chats.jsonl"), "format": "chat"}, "sequence_length": 64},
        run={"name": "run", "storage": str(tmp_path / "runs"), "max_steps": 2},
    )
    summary = run_local(config)
    opened = open_trained(summary["folder"])
    tokenizer = opened.tokenizer
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert eot in opened.end_tokens
    assert eot >= 260
    assert len(opened.model.get_submodule("model").get_input_embeddings().weight) == 320  # type: ignore[operator]
    text = tokenizer.apply_chat_template(chats[0]["messages"], tokenize=False)
    assert text == (
        "<|start_header_id|>user<|end_header_id|>\n\nn0<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma"])
def test_named_templates_are_known_to_the_mask(name: str) -> None:
    tokenizer = load_tokenizer(TokenizerSection(kind="bytes", chat_template=name))
    template = ChatTemplate.of(tokenizer)
    assert template.turn_ends
    assert template.header
    assert template.marks_generation
    assert not template.notes()
    (end,) = template.turn_ends
    assert tokenizer.convert_tokens_to_ids(end) in end_tokens(tokenizer)
    assert end in tokenizer.all_special_tokens


def test_a_chat_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "my.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}")
    tokenizer = load_tokenizer(TokenizerSection(kind="bytes", chat_template=str(path)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[user]a<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"tokenizer\.chat_template: '.*t\.jinja' is neither the name of a template \(chatml, llama3, gemma\)"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", r"tokenizer\.chat_template: .*does not write"),
        ("{% for m in messages %}", r"tokenizer\.chat_template: "),
    ],
)
def test_a_chat_template_that_can_not_be_used(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(TokenizerSection(kind="bytes", chat_template=str(path)))


def test_a_damaged_shard_is_found_before_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", LLAMA, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = shards[-1].read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2], b"", b"not a header at all"):
        shards[-1].write_bytes(content)
        with pytest.raises(ConfigError, match=rf"^model\.name: .*{shards[-1].name} is damaged \(.*\): download"):
            run_local(make_config(model={"name": str(folder)}, tokenizer=None))
    shards[-1].unlink()
    with pytest.raises(ConfigError, match=rf"^model\.name: .*{shards[-1].name} is missing: download"):
        run_local(make_config(model={"name": str(folder)}, tokenizer=None))
    shards[-1].write_bytes(whole)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.absent.weight"] = shards[-1].name
    index.write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=r"lacks the tensor model\.absent\.weight"):
        run_local(make_config(model={"name": str(folder)}, tokenizer=None))
    index.write_text("{")
    with pytest.raises(ConfigError, match=r"index\.json is damaged \(it is not a valid index\)"):
        run_local(make_config(model={"name": str(folder)}, tokenizer=None))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", ("org/model", None, "config.json")),
        ("org/model@v1.0", ("org/model", "v1.0", "config.json")),
        ("org/model@refs/pr/3", ("org/model", "refs/pr/3", "config.json")),
        ("org/model/q8.gguf", ("org/model", None, "q8.gguf")),
        ("org/model@main/q8.gguf", ("org/model", "main", "q8.gguf")),
        ("gpt2", ("gpt2", None, "config.json")),
    ],
)
def test_the_parts_of_a_hub_name(
    name: str, expected: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    class Info:
        sha = "abc"

    def info(self: Any, repository: str, revision: str | None = None, timeout: float = 0) -> Info:
        asked.append((repository, revision))
        return Info()

    def download(repository: str, revision: str, allow_patterns: list[str], etag_timeout: float) -> str:
        assert (repository, revision) == (expected[0], "abc")
        assert any(Path(expected[2]).match(pattern) for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    pretrained._from_hub.cache_clear()
    assert pretrained.pretrained_folder(name, "model.name") == tmp_path
    assert asked == [expected[:2]]
    pretrained._from_hub.cache_clear()
