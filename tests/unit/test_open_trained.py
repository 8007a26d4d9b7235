"""Trained models by hub id, and what is known of a model without its weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import MakeConfig
from tiny_models import write_model

from myllm_ray.common import pretrained
from myllm_ray.config import CheckpointError, ConfigError
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.trained_model import kind_of_trained, open_trained
from myllm_ray.worker import run_local


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model in the cache of the hub, under the id `someone/talker`; the tests have no network."""
    folder = write_model(tmp_path / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)
    cached = tmp_path / "hub" / "models--someone--talker"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(folder, cached / "snapshots" / revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    pretrained._from_hub.cache_clear()
    yield folder
    pretrained._from_hub.cache_clear()


def test_a_hub_id(downloaded: Path) -> None:
    local, found = open_trained(downloaded), open_trained("someone/talker")
    assert found.on_chats
    assert found.end_tokens == local.end_tokens
    for one, other in zip(found.model.parameters(), local.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert kind_of_trained("someone/talker") == "causal_lm"
    with pytest.raises(ConfigError, match="model: no folder 'someone/other'"):
        open_trained("someone/other")


def test_without_weights(downloaded: Path, make_config: MakeConfig, tmp_path: Path) -> None:
    run_local(make_config("run.max_steps=1"))
    for path in (downloaded, tmp_path / "runs" / "run"):
        whole, without = open_trained(path), open_trained(path, weights=False)
        assert all(parameter.is_meta for parameter in without.model.parameters())
        assert [n for n, _ in without.model.named_parameters()] == [n for n, _ in whole.model.named_parameters()]
        assert without.end_tokens == whole.end_tokens
        assert kind_of_trained(path) == "causal_lm"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        kind_of_trained(tmp_path)
