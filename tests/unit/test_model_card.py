"""Model cards: the metadata of the hub, and no secrets or paths of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from myllm_ray.runs import model_card


def card(monkeypatch: pytest.MonkeyPatch, folder: Path, form: str = "hf", **config: Any) -> str:
    """Returns the card of a checkpoint whose run has nothing but the manifest."""
    full = {"trainer": "sft", "model": {"name": "org/base-7b"}, "data": {"train": {"path": "x"}}, **config}
    manifest = {"step": 7, "config": full, "identity": {"tokens": "abc"}, "versions": {"torch": "2", "python": "3.11"}}
    monkeypatch.setattr(model_card, "read_manifest", lambda _: manifest)
    return model_card.model_card(folder / "checkpoints" / "step-00000007", folder, form, "float32")


def test_a_base_model_and_data_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = {"train": [{"path": "hf://datasets/org/set/a.parquet"}, {"path": "hf://datasets/org/other"}]}
    text = card(monkeypatch, tmp_path / "my-run", form="adapter", data=data)
    found = ModelCard(text).data.to_dict()
    assert found["base_model"] == "org/base-7b"
    assert (found["base_model_relation"], found["library_name"]) == ("adapter", "peft")
    assert found["datasets"] == ["org/other", "org/set"]
    assert found["pipeline_tag"] == "text-generation"
    assert "trained from [org/base-7b](https://huggingface.co/org/base-7b)" in text
    assert "# my-run\n" in text
    assert "- hash of all training tokens: `abc`" in text
    assert "Packages: python 3.11, torch 2." in text


def test_other_kinds_of_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reward = card(monkeypatch, tmp_path, trainer="reward", model={"name": None, "config": {"model_type": "llama"}})
    assert ModelCard(reward).data.to_dict()["pipeline_tag"] == "text-classification"
    assert "AutoModelForSequenceClassification" in reward
    assert "trained from random weights" in reward
    gguf = card(
        monkeypatch, tmp_path, form="gguf", trainer="my_pkg.trainers:Mine", model={"name": None, "factory": "a:b"}
    )
    assert ModelCard(gguf).data.to_dict()["tags"] == ["myllm_ray", "Mine", "gguf"]
    assert "llama-cli -m FILE.gguf" in gguf


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("/home/me/data/rows.json", "rows.json"),
        ("~/data/rows.json", "rows.json"),
        ("/home/me/two words/my rows.json", "my rows.json"),
        ("data.train.path=/home/me/rows.json", "data.train.path=rows.json"),
        ("[/srv/a/b.json, /srv/c.json]", "[b.json, c.json]"),
        ("C:\\Users\\me\\rows.json", "rows.json"),
        ("configs/sft.yaml", "configs/sft.yaml"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("org/model", "org/model"),
        ("1 / 2, </details>, and/or", "1 / 2, </details>, and/or"),
    ],
)
def test_absolute_paths_are_reduced(given: str, kept: str) -> None:
    assert model_card._portable({"a": [given]}) == {"a": [kept]}


def test_a_broken_card_of_the_base_model_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for content, license in (
        ("---\nlicense: [\n---\n", None),
        ("no metadata", None),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: https://a.b/c\n---\n", "other"),
    ):
        (base / "README.md").write_text(content)
        found = yaml.safe_load(card(monkeypatch, tmp_path, model={"name": str(base)}).split("---\n")[1])
        assert found.get("license") == license
        assert found.get("license_name") == ("own" if license else None)
