"""A run that starts from another run's weights equals one that starts from an export of that run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all

from myllm_ray.config import CheckpointError, ConfigError
from myllm_ray.config.load import read_file
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.prepare import prepare
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model
from myllm_ray.preparation import absolute, check_model
from myllm_ray.trained_model import open_run
from myllm_ray.worker import run_local

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160}
FIRST = ["run.max_steps=2", "run.name=first", "data.validation=null", "optimizer.lr=1e-2"]
DPO = [
    "trainer=dpo",
    "data.train={source: brackets, format: preference, limit: 30}",
    "data.validation=null",
    "data.sequence_length=64",
]


def first_run(make_config: MakeConfig, *overrides: str, **top: Any) -> Path:
    (folder,) = run_all(1, [make_config(*FIRST, *overrides, **top)])
    return folder


def stage(make_config: MakeConfig, folder: Path | str, *overrides: str, **top: Any) -> Any:
    """Returns the config of a second stage, with the tokenizer of the first stage's model."""
    return make_config(
        "run.max_steps=2",
        "run.name=second",
        "data.validation=null",
        *overrides,
        **{"model": {"name": str(folder)}, "tokenizer": None, **top},
    )


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found: torch.Tensor = model.eval().model(input_ids=ids).logits
    return found


def test_a_stage_is_the_same_from_a_run_and_from_its_export(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = first_run(make_config)
    save_pretrained(*open_run(folder), tmp_path / "exported")
    (by_run,) = run_all(1, [stage(make_config, folder, *DPO, "run.name=by-run")])
    (by_folder,) = run_all(1, [stage(make_config, tmp_path / "exported", *DPO, "run.name=by-folder")])
    assert comparable(by_run) == comparable(by_folder)
    resolved = read_file(by_run / "config.yaml")
    assert resolved["model"]["name"] == str(folder / "checkpoints" / "step-00000002")
    assert resolved["tokenizer"]["path"] == str(folder / "tokenizer")
    manifest = json.loads((by_run / "checkpoints" / "step-00000002" / "manifest.json").read_text())
    assert manifest["weights"]["model.name"]["step"] == 2
    third = stage(make_config, by_run / "checkpoints" / "step-00000002", "run.name=third")
    shutil.rmtree(folder)  # a stage needs the previous stage only, not earlier ones
    run_all(1, [third])


@pytest.mark.parametrize(
    ("model", "lora"),
    [
        (LLAMA, True),
        (GPT2, True),
        (GPT2, False),
        ({"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, False),
    ],
    ids=["llama-lora", "gpt2-lora", "gpt2", "mamba"],
)
def test_weights_are_those_of_the_run(make_config: MakeConfig, model: dict[str, Any], lora: bool) -> None:
    """Covers merged adapters, GPT-2 (transposed matrices) and Mamba (weights can't be initialised one by one)."""
    extra = ["model.lora={rank: 4, alpha: 8}"] if lora else []
    attention = {"attention": "eager"} if model["model_type"] == "mamba" else {}
    folder = first_run(make_config, "data.packing=false", *extra, model={"config": model, **attention})
    trained = open_run(folder)[0]
    found = build_model(ModelSection(name=str(folder), **attention), byte_tokenizer(), 64, 0)
    torch.testing.assert_close(logits(found), logits(trained), rtol=1e-4, atol=1e-5)
    random = build_model(ModelSection(config=model, **attention), byte_tokenizer(), 160, 0)
    assert not torch.allclose(logits(random), logits(trained), atol=1e-3), "the test needs a run that changed something"
    assert not any("lora" in name for name, _ in found.named_parameters())


@pytest.mark.parametrize("backend", ["fsdp", pytest.param("deepspeed-3", marks=pytest.mark.slow)])
def test_shards_become_whole_and_are_sharded_again(make_config: MakeConfig, backend: str) -> None:
    (sharded,) = run_all(2, [make_config(*FIRST, "run.name=sharded", *BACKENDS[backend])])
    trained, found = open_run(sharded)[0], build_model(ModelSection(name=str(sharded)), byte_tokenizer(), 64, 0)
    for name, tensor in trained.named_parameters():
        assert torch.equal(found.get_parameter(name), tensor), name
    (single,) = run_all(1, [stage(make_config, sharded, "run.name=single")])
    (again,) = run_all(2, [stage(make_config, sharded, f"run.name={backend}", *BACKENDS[backend])])
    for row, other in zip(comparable(again), comparable(single), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_policy_of_a_ppo_run_and_the_head_of_a_reward_model(make_config: MakeConfig) -> None:
    prompts = [
        "data.train={source: brackets, format: prompt, limit: 30}",
        "data.sequence_length=32",
        "rollout.max_new_tokens=8",
    ]
    folder = first_run(make_config, "trainer=ppo", "ppo={reward: 'helpers:variety', epochs: 1, critic: own}", *prompts)
    trained, found = open_run(folder)[0], build_model(ModelSection(name=str(folder)), byte_tokenizer(), 64, 0)
    assert torch.equal(logits(found), logits(trained))
    judge = first_run(make_config, *DPO[1:], "trainer=reward", "run.name=judge")
    head = build_model(ModelSection(name=str(judge)), byte_tokenizer(), 64, 0, "reward_model").get_parameter(
        "model.score.weight"
    )
    assert torch.equal(head, open_run(judge)[0].get_parameter("model.score.weight"))
    with pytest.raises(ConfigError, match="holds a reward model, which has no head for tokens"):
        build_model(ModelSection(name=str(judge)), byte_tokenizer(), 64, 0)
    ppo = ["trainer=ppo", "ppo.reward=[]", "ppo.epochs=1", *prompts]
    run_all(1, [stage(make_config, folder, *ppo, f"ppo.reward_model={judge}")])
    config = absolute(stage(make_config, folder, *ppo, f"ppo.reward_model={folder}", "run.name=third"))
    with pytest.raises(ConfigError, match="was trained by trainer ppo, not by trainer reward"):
        check_model(config, prepare(config))


def test_a_language_model_gives_no_rewards(make_config: MakeConfig, tmp_path: Path) -> None:
    model = build_model(ModelSection(config=dict(LLAMA)), byte_tokenizer(), 64, 0)
    save_pretrained(model, byte_tokenizer(), tmp_path / "lm")
    config = absolute(
        make_config(
            "trainer=ppo",
            "data.train={source: brackets, format: prompt, limit: 30}",
            "data.sequence_length=32",
            "rollout.max_new_tokens=8",
            "data.validation=null",
            f"ppo.reward_model={tmp_path / 'lm'}",
            "ppo.epochs=1",
        )
    )
    with pytest.raises(ConfigError, match="its rewards would be random"):
        check_model(config, prepare(config))


def test_a_resume_on_changed_weights_is_refused(make_config: MakeConfig) -> None:
    folder = first_run(make_config)
    config = stage(make_config, folder / "checkpoints" / "step-00000002", "checkpoint.every_steps=1")
    run_local(config)
    longer = config.model_copy(deep=True)
    longer.checkpoint.resume, longer.run.max_steps = "auto", 3
    run_local(longer)
    shutil.rmtree(folder)
    first_run(make_config, "run.seed=1")
    longer.run.max_steps = 4
    with pytest.raises(
        CheckpointError, match=r"model\.name was the checkpoint .* of step 2, which holds other weights now"
    ):
        run_local(longer)


def test_what_can_not_be_a_starting_point(make_config: MakeConfig) -> None:
    folder = first_run(make_config)
    checkpoint = folder / "checkpoints" / "step-00000002"
    config = absolute(stage(make_config, folder))
    file = next(checkpoint.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"model\.name: .* is damaged"):
        check_model(config, prepare(config))
    with pytest.raises(ConfigError, match=r"model\.name: the run .* holds no complete checkpoint"):
        absolute(stage(make_config, folder))
    file.write_bytes(content)
    shutil.rmtree(folder / "model")
    with pytest.raises(
        ConfigError, match=r"does not contain the config of its model: use the run's folder, or export the run"
    ):
        check_model(config, prepare(config))


def test_a_tokenizer_can_only_be_left_out_where_the_model_has_one(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer is missing: only a model given by model.name has its own"):
        make_config(tokenizer=None)


def test_dropout_of_a_model_by_name_is_switched_off(make_config: MakeConfig, tmp_path: Path) -> None:
    """DPO needs deterministic passes; the config of a folder is changed, not replaced."""
    save_pretrained(
        build_model(ModelSection(config=GPT2), byte_tokenizer(), 64, 0), byte_tokenizer(), tmp_path / "gpt2"
    )
    run_all(1, [stage(make_config, tmp_path / "gpt2", *DPO)])


def test_a_folder_that_lacks_tensors_is_refused(tmp_path: Path) -> None:
    """The folder has a base model without its untied head, which transformers would initialise randomly."""
    made = build_model(ModelSection(config={**LLAMA, "tie_word_embeddings": False}), byte_tokenizer(), 64, 0)
    made.model.base_model.save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of the model, such as lm_head\.weight"):
        build_model(ModelSection(name=str(tmp_path / "base")), byte_tokenizer(), 64, 0)
