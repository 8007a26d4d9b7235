"""A chat model from data to answers: train, sample, export, sample again, and start a run with rollouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from e2e.test_cli import call
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.trained_model import open_trained

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ok"}]}


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "chats.json").write_text(json.dumps([CHAT] * 8))
    return {
        "trainer": "sft",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(tmp_path / "chats.json"), "format": "chat"},
            "sequence_length": 128,
            "packing": False,
        },
        "batch": {"global_size": 4, "micro_size": 4},
        "optimizer": {"lr": 1e-2},
        "run": {"name": "chat", "storage": str(tmp_path / "runs"), "max_steps": 40},
        "callbacks": ["jsonl"],
    }


def write(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(json.dumps(raw))
    return path


def last_metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return found


def test_a_chat_model_stops_where_its_turns_end(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, _, err = call(capsys, monkeypatch, "train", write(tmp_path / "sft.json", raw))
    assert code == 0, err
    folder, exported = tmp_path / "runs" / "chat", tmp_path / "hf"
    code, out, err = call(capsys, monkeypatch, "export", folder, exported)
    assert code == 0, err
    assert "weights in float32; answers end at <|endoftext|>, <|im_end|>" in out
    assert GenerationConfig.from_pretrained(exported).eos_token_id == [256, 259]
    for path in (folder, exported, sorted((folder / "checkpoints").iterdir())[-1]):
        code, out, err = call(
            capsys, monkeypatch, "sample", path, "-p", "hi", "--temperature", "0", "--max-new-tokens", "40"
        )
        assert code == 0, err
        assert out.rstrip().endswith("hi\nok"), "it answers, and stops"
        assert "each prompt is a turn of the user in the chat template" in out
    _, out, _ = call(
        capsys,
        monkeypatch,
        "sample",
        folder,
        "-p",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "--raw",
        "--temperature",
        "0",
        "--max-new-tokens",
        "40",
    )
    assert out.rstrip().endswith("assistant\nok")
    code, _, err = call(capsys, monkeypatch, "sample", folder)
    assert (code, "give it a --prompt" in err) == (2, True)

    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": CHAT["messages"][:1]}] * 4))
    rollouts = {
        **raw,
        "model": {"name": str(exported)},
        "data": {"train": {"path": str(tmp_path / "prompts.json"), "format": "prompt"}, "sequence_length": 128},
        "rollout": {"max_new_tokens": 40, "temperature": 0.1},
        "optimizer": {"lr": 1e-6},
    }
    for trainer, section in (
        ("grpo", {"reward": "helpers:variety", "group_size": 2, "mask_truncated": True}),
        ("ppo", {"reward": "helpers:variety", "epochs": 1}),
    ):
        config = {
            **rollouts,
            "trainer": trainer,
            trainer: section,
            "run": {**raw["run"], "name": trainer, "max_steps": 1},
        }
        code, _, err = call(capsys, monkeypatch, "train", write(tmp_path / f"{trainer}.json", config))
        assert code == 0, err
        found = last_metrics(tmp_path / "runs" / trainer)
        assert (found["ended"], found["length"]) == (1, 3)


def test_a_model_that_is_no_chat_model_continues_its_prompt(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "abc"}] * 8))
    config = {
        **raw,
        "trainer": "pretrain",
        "data": {"train": {"path": str(tmp_path / "texts.json")}, "sequence_length": 16},
        "run": {**raw["run"], "name": "base", "max_steps": 1},
        "batch": {"global_size": 1},
    }
    assert call(capsys, monkeypatch, "train", write(tmp_path / "base.json", config))[0] == 0
    assert call(capsys, monkeypatch, "export", tmp_path / "runs" / "base", tmp_path / "hf")[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template is None, "no tool takes it for a chat model"
    for path in (tmp_path / "runs" / "base", tmp_path / "hf"):
        code, out, err = call(capsys, monkeypatch, "sample", path, "-p", "ab", "--max-new-tokens", "2")
        assert code == 0, err
        assert "prompts are continued without a chat template" in out


def test_export_keeps_what_the_base_model_brings(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, tokenizer = tmp_path / "base", byte_tokenizer()
    given = dict(LLAMA, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(given.pop("model_type"), **given), dtype=torch.bfloat16
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    published = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "eos_token_id": [256, 257]}
    (base / "generation_config.json").write_text(json.dumps(published))  # some published files lack do_sample
    config = {**raw, "model": {"name": str(base)}, "run": {**raw["run"], "max_steps": 1}}
    assert call(capsys, monkeypatch, "train", write(tmp_path / "c.json", config))[0] == 0
    code, out, err = call(capsys, monkeypatch, "export", tmp_path / "runs" / "chat", tmp_path / "hf")
    assert (code, "weights in bfloat16; answers end at <|endoftext|>, <|im_end|>, <|pad|>" in out) == (0, True), err
    again = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert {name: getattr(again, name) for name in published} == {**published, "eos_token_id": [256, 259, 257]}
    assert again.do_sample
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    second = {**config, "model": {"name": str(tmp_path / "runs" / "chat")}, "run": {**config["run"], "name": "second"}}
    assert call(capsys, monkeypatch, "train", write(tmp_path / "second.json", second))[0] == 0
    opened = open_trained(tmp_path / "runs" / "second")
    assert (opened.dtype, opened.end_tokens, opened.generation.top_k) == (torch.bfloat16, (256, 259, 257), 20), (
        "over stages, too"
    )
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert reloaded.dtype == torch.bfloat16
    assert reloaded.generation_config.temperature == 0.6
    assert torch.isfinite(reloaded(torch.tensor([[1, 2]])).logits).all()


def test_data_shows_the_requested_rows_and_which_answer_is_chosen(
    raw: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "pairs.json").write_text(
        json.dumps([{"prompt": f"{i}?", "chosen": "yes", "rejected": "no", "margin": 2} for i in range(4)])
    )
    config = write(
        tmp_path / "dpo.json",
        {
            **raw,
            "trainer": "dpo",
            "data": {"train": {"path": str(tmp_path / "pairs.json"), "format": "preference"}, "sequence_length": 32},
        },
    )
    code, out, err = call(capsys, monkeypatch, "data", config, "--step", "1", "--rows", "1")
    assert code == 0, err
    assert out.count("row 0:") == 1
    assert "row 1:" not in out
    assert "\nchosen: ⟦yes<|endoftext|>⟧\nrejected: ⟦no<|endoftext|>⟧\n(margin 2)" in out
    assert "prompt: " in out
    code, out, _ = call(capsys, monkeypatch, "data", config, "--step", "1")
    assert [f"row {i}:" in out for i in range(5)] == [True] * 4 + [False]
    rows = [{"prompt": "a", "completion": "b", "label": i % 2} for i in range(4)]
    (tmp_path / "kto.json").write_text(json.dumps(rows))
    code, out, _ = call(
        capsys,
        monkeypatch,
        "data",
        config,
        f"data.train={{path: {tmp_path / 'kto.json'}, format: unpaired}}",
        "dpo.loss=kto",
        "--rows",
        "4",
    )
    assert (out.count("(desirable)"), out.count("(undesirable)")) == (2, 2)
