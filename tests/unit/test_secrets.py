"""Keys and tokens do not appear in the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import MakeConfig

from myllm_ray import train
from myllm_ray.common.secrets import mask, mask_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("callbacks.wandb.api_key=abc123", "callbacks.wandb.api_key=***"),
        ("AWS_SECRET_ACCESS_KEY: wJalrXUtnFEMI", "AWS_SECRET_ACCESS_KEY: ***"),
        ('{"password": "two words", "x": 1}', '{"password": ***, "x": 1}'),
        ("HF_TOKEN=hf_abcdefghijklmnopqrst", "HF_TOKEN=***"),
        ("see hf_abcdefghijklmnopqrst here", "see *** here"),
        ("s3://me:secret@host/bucket", "s3://***@host/bucket"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("eos_token: <eos>, bos_token_id: 1", "eos_token: <eos>, bos_token_id: 1"),
        ("tokens_hash 0123456789abcdef", "tokens_hash 0123456789abcdef"),
        ("optimizer.lr=1e-3 tokenizer.path=/a/b", "optimizer.lr=1e-3 tokenizer.path=/a/b"),
    ],
)
def test_text(text: str, expected: str) -> None:
    assert mask_text(text) == expected


def test_structure() -> None:
    value = {
        "callbacks": [{"wandb": {"api_key": "abc", "project": "p"}}],
        "options": {"auth_token": "x", "eos_token": "</s>"},
        "optimizer": {"lr": 1.0},
    }
    assert mask(value) == {
        "callbacks": [{"wandb": {"api_key": "***", "project": "p"}}],
        "options": {"auth_token": "***", "eos_token": "</s>"},
        "optimizer": {"lr": 1.0},
    }


def test_nothing_in_a_runs_folder_has_the_secret(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["myllm-ray", "train", "c.yaml", "callbacks=[{helpers:Keyed: {api_key: hunter2secret}}]"]
    )
    config = make_config(callbacks=["jsonl", {"helpers:Keyed": {"api_key": "hunter2secret"}}])
    folder = Path(train(config).folder)
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    for path in files:
        assert b"hunter2secret" not in path.read_bytes(), path
    assert (
        json.loads((folder / "environment.json").read_text())["command"][-1]
        == "callbacks=[{helpers:Keyed: {api_key: ***}}]"
    )
