"""Checkpoints of partly trained models: what they hold, and their base when they are read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch import nn
from transformers import initialization

from myllm_ray import base_weights
from myllm_ray.base_weights import files_sha256
from myllm_ray.config import CheckpointError, ConfigError
from myllm_ray.config.amendments import value_of
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.prepare import prepare
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import read_manifest, read_tensors
from myllm_ray.engine.checkpointing.verification import manifest_checksum
from myllm_ray.engine.run_folder import claim
from myllm_ray.models import initialization as random_weights
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.preparation import absolute, check_model, prepare_run
from myllm_ray.trained_model import open_run
from myllm_ray.worker import run_local, run_worker

LORA = {"rank": 4, "alpha": 8}
SHORT = ("run.max_steps=2", "data.validation=null", "optimizer.lr=1e-2", "data.sequence_length=64")


def export(folder: Path, seed: int = 0, **config: Any) -> Path:
    made = build_model(ModelSection(config={**LLAMA, **config}), byte_tokenizer(), 64, seed)
    shutil.rmtree(folder, ignore_errors=True)
    save_pretrained(made, byte_tokenizer(), folder)
    return folder


def by_name(make_config: MakeConfig, name: Path | str, *overrides: str, **model: Any) -> Any:
    given = {"name": str(name), "lora": LORA, **model}
    return make_config(*SHORT, *overrides, model=given, tokenizer={"kind": "bytes"})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval().model(input_ids=torch.arange(24).view(2, 12)).logits
    return found


def loaded(name: Path | str, kind: str = "causal_lm") -> nn.Module:
    return build_model(ModelSection(name=str(name)), byte_tokenizer(), 64, 9, kind)


def step(folder: Path, number: int = 2) -> Path:
    return folder / "checkpoints" / f"step-{number:08d}"


def test_a_checkpoint_holds_the_trained_tensors_only(make_config: MakeConfig) -> None:
    """Its files have under 5 % of the bytes of full training; so have those of a model of 100 M, on the meta device."""
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "vocab_size": 4096}
    model = {"config": {**LLAMA, **shape}}
    lora = {"rank": 2, "alpha": 4}
    full, part = run_all(
        1,
        [
            make_config(*SHORT, "run.name=full", "run.max_steps=1", model=model),
            make_config(*SHORT, "run.name=part", "run.max_steps=1", model={**model, "lora": lora}),
        ],
    )
    sizes = {f: sum(p.stat().st_size for p in sorted(step(f, 1).rglob("*"))) for f in (full, part)}
    assert sizes[part] < 0.05 * sizes[full]
    held = {n for n in read_tensors(step(part, 1)) if n.startswith("model.")}
    assert held
    assert all(".lora_" in n for n in held)
    large = {**LLAMA, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 32000}
    section = ModelSection.model_validate({"config": large, "lora": {"rank": 8}})
    skeleton = build_skeleton(section, byte_tokenizer(), 64)
    assert skeleton is not None
    trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
    total = sum(p.numel() for p in skeleton.parameters()) - trained
    assert total > 9e7
    assert trained < 0.05 * total


def test_a_chain_of_stages_on_a_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    """Base folder, LoRA on it, LoRA on that run, a full stage on that: each equals a stage on an export."""
    base = export(tmp_path / "base")
    (first,) = run_all(1, [by_name(make_config, base, "run.name=first")])
    assert read_manifest(step(first))["base"]["source"] == "files"
    save_pretrained(*open_run(first), tmp_path / "exported")
    (second,) = run_all(1, [by_name(make_config, first, "run.name=second")])
    (other,) = run_all(1, [by_name(make_config, tmp_path / "exported", "run.name=other")])
    for row, same in zip(comparable(second), comparable(other), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-5)
    assert read_manifest(step(second))["base"] == {
        "source": "checkpoint",
        "name": str(step(first)),
        "checksum": read_manifest(step(first))["checksum"],
        "model": "causal_lm",
    }
    torch.testing.assert_close(logits(loaded(second)), logits(open_run(second)[0]), rtol=1e-4, atol=1e-5)
    (third,) = run_all(1, [by_name(make_config, second, "run.name=third", lora=None)])
    assert "base" not in read_manifest(step(third))
    wanted = logits(open_run(third)[0])
    shutil.rmtree(second)  # the third stage trains, and therefore holds, everything
    torch.testing.assert_close(logits(loaded(third)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "model",
    [LLAMA, {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}],
    ids=["llama", "mamba"],
)
def test_random_weights_are_built_again(make_config: MakeConfig, model: dict[str, Any]) -> None:
    """Mamba's weights can't be made one by one, so its adapters are added to a model with its weights."""
    attention = {"attention": "eager"} if model["model_type"] == "mamba" else {}
    targets = {"targets": ["in_proj", "x_proj"]} if attention else {}
    given = {"config": model, "lora": {**LORA, **targets}, **attention}
    (folder,) = run_all(1, [make_config(*SHORT, "data.packing=false", "run.seed=5", model=given)])
    manifest = read_manifest(step(folder))
    assert (manifest["base"]["source"], manifest["base"]["seed"]) == ("random", 5)
    assert not any("embed" in name for name in manifest["tensors"])
    found = build_model(ModelSection(name=str(folder), **attention), byte_tokenizer(), 64, 0)
    torch.testing.assert_close(logits(found), logits(open_run(folder)[0]), rtol=1e-4, atol=1e-5)
    start = build_model(ModelSection(config=model, **attention), byte_tokenizer(), 64, 5)
    assert not torch.allclose(logits(start), logits(found), atol=1e-3)


def test_another_base_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    base = export(tmp_path / "base")
    config = by_name(make_config, base, "checkpoint.every_steps=1")
    run_local(config)
    folder = Path(config.run.storage) / config.run.name
    config.checkpoint.resume, config.run.max_steps = "auto", 3
    os.utime(base / "model.safetensors")  # another modification time, but the same weights
    run_local(config)
    export(base, seed=1)
    config.run.max_steps = 4
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(CheckpointError, match="holds only the trained weights, and their base has changed") as caught:
        run_local(config)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in folder.rglob("*")) == before, "refused before anything is written"
    with pytest.raises(CheckpointError, match=r"base has changed \(sha256"):
        open_run(folder)
    stage = absolute(by_name(make_config, folder, "run.name=stage"))
    with pytest.raises(CheckpointError, match=r"model\.name: .* and their base has changed"):
        check_model(stage, prepare(stage))
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"and their base can't be loaded: model\.name: no folder"):
        open_run(folder)
    export(base)
    open_run(folder)


def test_a_base_that_lacks_a_file_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    base = export(tmp_path / "base")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    for text in (json.dumps(index), "{"):
        (base / "model.safetensors.index.json").write_text(text)
        config = absolute(by_name(make_config, base))
        with pytest.raises(ConfigError, match=r"model\.name: .*(is missing|is damaged)"):
            base_weights.base_identity(config, byte_tokenizer())


def test_another_initialization_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of transformers or torch that initializes random weights differently changes the base."""
    config = make_config(*SHORT, model={"config": LLAMA, "lora": LORA})
    run_local(config)
    folder = Path(config.run.storage) / config.run.name
    open_run(folder)
    monkeypatch.setattr(initialization, "normal_", lambda t, mean=0.0, std=1.0, **_: t.uniform_(-std, std))
    with pytest.raises(CheckpointError, match=r"their base has changed \(sha256"):
        open_run(folder)


def test_a_base_that_was_drawn_whole_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions drew large tensors whole. The smallest tensors, which are compared too, have equal values."""
    width, inner = 64, 1024
    assert LLAMA["hidden_size"] == width
    config = make_config(*SHORT, model={"config": {**LLAMA, "intermediate_size": inner}, "lora": LORA})
    run_local(config)
    folder = Path(config.run.storage) / config.run.name
    open_run(folder)
    monkeypatch.setattr(random_weights, "DRAWN_IN_BLOCKS", width * inner)
    with pytest.raises(CheckpointError, match=r"their base has changed \(sha256"):
        open_run(folder)


def test_checkpoints_with_all_tensors_are_read(make_config: MakeConfig, tmp_path: Path) -> None:
    """Earlier versions saved frozen weights too. A run that resumes from one continues to save them."""
    base = export(tmp_path / "base")
    config = absolute(by_name(make_config, base, "run.name=old", "checkpoint.every_steps=1"))
    prepared = prepare(config)
    claim(config, prepared.identity)
    run_worker(config, prepared)  # without the identity of the base, everything is saved
    old = Path(config.run.storage) / "old"
    manifest = read_manifest(step(old))
    assert "base" not in manifest
    assert "model.model.model.embed_tokens.weight" in manifest["tensors"]
    (new,) = run_all(1, [by_name(make_config, base, "run.name=new", "run.max_steps=4")])
    torch.testing.assert_close(logits(loaded(old)), logits(open_run(old)[0]), rtol=1e-4, atol=1e-5)
    # Keys of the config that did not exist at that time have their defaults.
    for added in ("freeze", "lora.rslora", "lora.targets"):
        section, _, key = f"model.{added}".rpartition(".")
        del value_of(manifest["config"], section)[key]
    (step(old) / "manifest.json").write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    resumed = [by_name(make_config, base, f"checkpoint.resume={old}", "run.max_steps=4", "run.name=resumed")]
    (folder,) = run_all(1, resumed)
    assert comparable(folder) == comparable(new)[2:]
    assert "model.model.model.embed_tokens.weight" in read_manifest(step(folder, 4))["tensors"]
    assert torch.equal(logits(open_run(folder)[0]), logits(open_run(new)[0]))


@pytest.mark.parametrize(
    ("backends", "steps"),
    [
        pytest.param(["fsdp", "ddp"], 2, id="two"),
        pytest.param([name for name in BACKENDS if name != "single"], 3, id="all", marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters(make_config: MakeConfig, backends: list[str], steps: int) -> None:
    """Freezing without LoRA: every backend trains the same run, and its checkpoint moves to the next backend."""
    model = {"config": {**LLAMA, "tie_word_embeddings": False}, "freeze": ["embed_tokens", r"layers\.0\."]}
    common = (*SHORT, f"run.max_steps={steps}", "batch.micro_size=1", "optimizer.lr=1e-3")

    def config(name: str, backend: str, *overrides: str) -> Any:
        every = ("checkpoint.every_steps=1", "checkpoint.keep_last=null")
        return make_config(*common, *every, f"run.name={name}", *BACKENDS[backend], *overrides, model=model)

    (plain,) = run_all(1, [config("plain", "single")])
    folders = dict(zip(backends, run_all(2, [config(b, b) for b in backends]), strict=True))
    moved = [
        config(f"moved-{b}", b, f"checkpoint.resume={step(folders[other], 1)}")
        for b, other in zip(backends, [*backends[1:], backends[0]], strict=True)
    ]
    assert steps > 1
    for folder in [*folders.values(), *run_all(2, moved)]:
        rows = comparable(folder)
        for row, other in zip(rows, comparable(plain)[-len(rows) :], strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), folder.name
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), folder.name
        names = {
            n.removeprefix("model.") for n in read_manifest(step(folder, steps))["tensors"] if "optimizer" not in n
        }
        assert names
        assert not any("embed_tokens" in n or "layers.0." in n for n in names), folder.name
    start = build_model(ModelSection(config=model["config"]), byte_tokenizer(), 64, 0)
    for name, parameter in open_run(plain)[0].named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(parameter, start.get_parameter(name)) == frozen, name
        assert parameter.requires_grad != frozen
    torch.testing.assert_close(logits(loaded(plain)), logits(open_run(plain)[0]), rtol=1e-4, atol=1e-5)


def test_what_can_not_be_frozen(make_config: MakeConfig) -> None:
    for freeze, message in (
        (["layers\\.7\\."], "matches no trainable parameter; names look like model.model.embed_tokens.weight"),
        (["."], "match every parameter, so nothing is left to train"),
        (["embed", "embed_tokens"], None),
    ):
        section = ModelSection(config=LLAMA, freeze=freeze)
        if message is None:
            build_model(section, byte_tokenizer(), 64, 0)
            continue
        with pytest.raises(ConfigError, match=message):
            build_model(section, byte_tokenizer(), 64, 0)
    config = absolute(make_config("model.freeze=['layers.7.']"))
    with pytest.raises(ConfigError, match=r"model\.freeze: pattern"):
        prepare_run(config)
    assert not (Path(config.run.storage) / config.run.name).exists()


def test_a_frozen_a_is_built_again(make_config: MakeConfig) -> None:
    """Only the matrices B are trained, so A is not in the checkpoint."""
    model = {"config": LLAMA, "lora": LORA, "freeze": [r"\.lora_A\."]}
    (folder,) = run_all(1, [make_config(*SHORT, model=model)])
    assert not any("lora_A" in name for name in read_manifest(step(folder))["tensors"])
    torch.testing.assert_close(logits(loaded(folder)), logits(open_run(folder)[0]), rtol=1e-4, atol=1e-5)


def test_heads_of_reward_models_and_critics(make_config: MakeConfig, tmp_path: Path) -> None:
    base = export(tmp_path / "base")
    pairs = ("data.train={source: brackets, format: preference, limit: 30}",)
    (judge,) = run_all(1, [by_name(make_config, base, "trainer=reward", *pairs, "run.name=judge")])
    assert read_manifest(step(judge))["base"]["model"] == "reward_model"
    head = loaded(judge, "reward_model").get_parameter("model.score.weight")
    assert torch.equal(head, open_run(judge)[0].get_parameter("model.score.weight"))
    prompts = ("data.train={source: brackets, format: prompt, limit: 30}", "rollout.max_new_tokens=4")
    ppo = ("trainer=ppo", "ppo={reward: [], epochs: 1, critic: own, reward_model: JUDGE}")
    given = (*prompts, *(o.replace("JUDGE", str(judge)) for o in ppo), "data.sequence_length=32")
    (policy,) = run_all(1, [by_name(make_config, base, *given, "run.name=policy")])
    torch.testing.assert_close(logits(loaded(policy)), logits(open_run(policy)[0]), rtol=1e-4, atol=1e-5)


def test_checksums_of_a_base_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, cache = export(tmp_path / "base"), tmp_path / "cache"
    first = files_sha256(sorted(base.glob("*.safetensors")), cache)
    read: list[str] = []
    digest = base_weights.hashlib.file_digest
    monkeypatch.setattr(base_weights.hashlib, "file_digest", lambda f, n: read.append(f.name) or digest(f, n))
    assert files_sha256(sorted(base.glob("*.safetensors")), cache) == first
    assert read == []
    file = base / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert files_sha256(sorted(base.glob("*.safetensors")), cache) != first
    assert read == [str(file)]
    # The cache of the hub names a file by its checksum: nothing is read.
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / ("a" * 64)).write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blobs / ("a" * 64))
    files_sha256(sorted(snapshot.glob("*.safetensors")), cache)
    assert read == [str(file)]
    for entry in sorted(cache.iterdir()):
        entry.write_text("damaged")
    changed = files_sha256(sorted(base.glob("*.safetensors")), cache)
    assert changed != first
    assert json.loads(sorted(cache.iterdir())[0].read_text())["path"] == str(file)
