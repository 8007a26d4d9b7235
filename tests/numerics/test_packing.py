"""Packed rows: the loss of a document equals its loss alone; otherwise each document has a separate row."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, ROOT, MakeConfig, comparable
from models_table import BY_POSITION, NO, UNKNOWN, all_names, written
from rl_helpers import Given, Scripted, prompts
from torch import Tensor, nn
from transformers import AutoConfig

from myllm_ray.common.types import Batch, Position
from myllm_ray.config.errors import CheckpointError, ConfigError, TrainingError
from myllm_ray.config.sections import ModelSection
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.model_checks import isolation_of
from myllm_ray.models import isolation
from myllm_ray.models.isolation import find_isolation, probe_isolation
from myllm_ray.models.load import build_model
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.preparation import absolute, prepare_data
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.worker import run_local

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}
LEAKS: dict[str, dict[str, Any]] = {
    "mamba": {"attention": "eager"},
    "mamba2": {"attention": "eager"},
    "qwen3_5_text": {},
    "qwen3_next": {},
    "falcon_h1": {},
    "nemotron_h": {},
    "granitemoehybrid": {},
    "opt": {},
    "falcon": {},
    "lfm2": {"config": {"layer_types": ["conv", "full_attention"] * 16}},
}
"""Architectures in which packed documents see each other, with the options of their small model."""


def section_of(model_type: str, **needs: Any) -> ModelSection:
    return ModelSection(**{**needs, "config": {"model_type": model_type, **needs.get("config", {})}})


@pytest.mark.parametrize("config", [LLAMA, GPT2])
@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("causal_lm", "documents"),
        ("causal_lm", "padded"),
        ("causal_lm", "rollouts"),
        ("actor_critic", "rollouts"),
        ("actor_own_critic", "rollouts"),
    ],
)
def test_attention_with_the_mask_of_transformers_keeps_documents_apart(
    config: dict[str, Any], kind: str, layout: str
) -> None:
    found = probe_isolation(ModelSection(config=config), kind, layout)
    assert found.isolated is True, found
    assert found.leak < 1e-4


@pytest.mark.parametrize("layout", ["documents", "rollouts"])
def test_a_state_space_does_not(layout: str) -> None:
    section = section_of("mamba", **LEAKS["mamba"])
    found = probe_isolation(section, layout=layout)
    assert found.isolated is False
    assert found.leak > 0.1
    assert "see each other" in found.reason
    assert probe_isolation(section, layout="padded").isolated is True


def test_a_mask_that_forgets_the_boundaries_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    assert probe_isolation(ModelSection(config=LLAMA)).isolated is False


def test_positions_that_do_not_restart_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe builds rows with the function of the collator."""
    monkeypatch.setattr(isolation, "restarting_positions", lambda lengths, width: torch.arange(width).numpy())
    assert probe_isolation(ModelSection(config=LLAMA)).isolated is False


def test_windows_are_shorter_than_the_documents() -> None:
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 12}
    assert probe_isolation(ModelSection(config=gemma)).isolated is True
    built = build_model(isolation._small_section(ModelSection(config=gemma), 10_000), isolation._NoTokenizer(), 48, 0)
    assert built.config.sliding_window == 8  # type: ignore[union-attr]
    assert sorted(built.config.layer_types) == ["full_attention", "sliding_attention"]  # type: ignore[union-attr, arg-type]


def test_a_window_counts_where_rows_are_longer() -> None:
    """Doge selects keys among all positions, also later ones; in rows within its window it selects nothing."""
    doge = section_of("doge", config={"keep_window_size": 128})
    assert probe_isolation(doge, sequence_length=128).isolated is True
    assert probe_isolation(doge, layout="padded", sequence_length=256).isolated is False


def test_a_model_that_looks_ahead_is_refused(make_config: MakeConfig) -> None:
    bert = {
        "model_type": "bert",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
    }
    with pytest.raises(ConfigError, match=r"tokens after it.*is_decoder"):
        prepare_data(absolute(make_config(model={"config": bert})))
    decoder = {**bert, "is_decoder": True}
    assert (
        prepare_data(absolute(make_config(model={"config": decoder}, tokenizer={"kind": "bytes"}))).isolation
        is not None
    )


def test_the_config_of_a_folder_is_kept(tmp_path: Path) -> None:
    """The small model keeps the layer types of a folder's config, and the removal of dropout."""
    layers = ["conv", "full_attention"]
    AutoConfig.for_model("lfm2", layer_types=layers * 4, num_hidden_layers=8, hidden_size=128).save_pretrained(tmp_path)
    section = without_dropout(ModelSection(name=str(tmp_path)))[0]
    assert small_model(section).config["layer_types"] == layers  # type: ignore[index]
    assert probe_isolation(section).isolated is False
    AutoConfig.for_model("llama", pad_token_id=31_999, eos_token_id=[2, 31_998]).save_pretrained(tmp_path / "llama")
    assert probe_isolation(ModelSection(name=str(tmp_path / "llama"))).isolated is True, (
        "ids of tokens that the small model has not"
    )
    AutoConfig.for_model("gpt2", n_layer=3).save_pretrained(tmp_path / "gpt2")
    section, had = without_dropout(ModelSection(name=str(tmp_path / "gpt2")))
    assert had
    assert small_model(section).config["resid_pdrop"] == 0.0  # type: ignore[index]
    assert probe_isolation(section).isolated is True


def test_a_type_that_cannot_be_built_counts_as_leaking() -> None:
    found = probe_isolation(section_of("blt"))
    assert found.isolated is None
    assert "could not be tried" in found.reason


def test_the_verdict_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = find_isolation(ModelSection(config=LLAMA), "causal_lm", "documents", 64, tmp_path)
    monkeypatch.setattr(isolation, "probe_isolation", lambda *_: pytest.fail("asked again"))
    assert find_isolation(ModelSection(config=LLAMA), "causal_lm", "documents", 64, tmp_path) == first
    # A deeper model of the same kind is the same small model.
    assert (
        find_isolation(ModelSection(config={**LLAMA, "num_hidden_layers": 9}), "causal_lm", "documents", 64, tmp_path)
        == first
    )


def leaking(model_type: str) -> dict[str, Any]:
    """Returns a small model section with random weights large enough to leak across a document boundary."""
    section = small_model(section_of(model_type, **LEAKS[model_type]))
    return {
        "attention": section.attention,
        "config": {**(section.config or {}), "init_std" if model_type == "opt" else "initializer_range": 0.15},
    }


def sft(make_config: MakeConfig, model: dict[str, Any], *overrides: str) -> dict[str, Any]:
    config = make_config(
        "data.sequence_length=96",
        "data.validation=null",
        "run.max_steps=2",
        "batch.global_size=4",
        *overrides,
        model=model,
    )
    return run_local(config)


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "mamba" else pytest.mark.slow) for name in LEAKS]
)
def test_a_leaking_model_trains_on_separate_documents(make_config: MakeConfig, model_type: str) -> None:
    """`packing: true` gives the run of `packing: false` and logs it; in an earlier version documents leaked."""
    model, said = leaking(model_type), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("myllm_ray.preparation").addHandler(handler)
    try:
        packed = sft(make_config, model, "run.name=packed")
        assert any("one document a row, because documents in one row see each other" in line for line in said)
        alone = sft(make_config, model, "run.name=alone", "data.packing=false")
    finally:
        logging.getLogger("myllm_ray.preparation").removeHandler(handler)
    assert comparable(packed["folder"]) == comparable(alone["folder"])
    manifest = read_manifest(Path(packed["checkpoint"]))
    assert manifest["isolation"]["isolated"] is False
    assert manifest["identity"]["packing"] == "one document a row"
    assert json.loads((Path(packed["folder"]) / "environment.json").read_text())["packing"] == "one document a row"


def test_an_isolating_model_is_packed_as_before(make_config: MakeConfig) -> None:
    prepared = prepare_data(absolute(make_config()))
    assert prepared.isolation is not None
    assert prepared.isolation.isolated is True
    assert prepared.train.plan.packing.kind == "best_fit"
    assert prepared.packing == "several documents a row (best_fit)"
    assert prepare_data(absolute(make_config("data.packing=false"))).packing == "one document a row"
    whole = make_config("data.train.format=text", "data.train.fields.text=output", trainer="pretrain")
    assert prepare_data(absolute(whole)).train.plan.packing.kind == "continuous"


def test_packing_that_is_required_is_an_error_where_it_leaks(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("data.packing=required", model=leaking("mamba"))
    with pytest.raises(ConfigError, match=r"data.packing: required, but documents in one row see each other"):
        run_local(config)
    assert not (tmp_path / "runs" / "run").exists()
    assert prepare_data(absolute(make_config("data.packing=required"))).train.plan.packing.kind == "best_fit"
    with pytest.raises(ConfigError, match="one example per row"):
        isolation_of(make_config("data.packing=required", "data.train.format=preference", trainer="dpo"))


def test_a_run_does_not_resume_under_another_verdict(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, fresh = leaking("mamba"), f"data.cache={tmp_path / 'fresh'}"
    with monkeypatch.context() as older:
        older.setattr("myllm_ray.models.isolation._compare", lambda *_, **__: isolation.Isolation(True, "planted"))
        sft(make_config, model, fresh)
    (path,) = (tmp_path / "fresh").glob("isolation-*.json")
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"it was several documents a row \(best_fit\), now it is one document a row"
    ):
        sft(make_config, model, fresh, "checkpoint.resume=auto", "run.max_steps=3")


class Attentive(nn.Module):
    """A model from a factory: causal attention, with a mask between documents if `restarts` is true."""

    def __init__(self, restarts: bool):
        super().__init__()
        self.restarts = restarts
        self.embed, self.head = nn.Embedding(300, 16), nn.Linear(16, 300)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        states = self.embed(input_ids)
        seen = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()[None]
        if self.restarts:
            document = (position_ids == 0).cumsum(1)
            seen = seen & (document[:, None] == document[:, :, None])
        states = states + nn.functional.scaled_dot_product_attention(states, states, states, attn_mask=seen)
        logits: Tensor = self.head(states)
        return logits


def build(restarts: bool = True) -> nn.Module:
    return Attentive(restarts)


def build_large(width: int = 8192) -> nn.Module:
    return nn.Sequential(nn.Embedding(8192, width))


def build_declared() -> nn.Module:
    return build_large()


build_declared.isolates_packed_documents = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "isolated"),
    [
        ("build", {}, True),
        ("build", {"restarts": False}, False),
        ("build_large", {}, None),
        ("build_declared", {}, True),
    ],
)
def test_models_of_a_factory(name: str, options: dict[str, Any], isolated: bool | None) -> None:
    found = probe_isolation(ModelSection(factory=f"test_packing:{name}", options=options))
    assert found.isolated is isolated, found
    if isolated is None:
        assert "isolates_packed_documents = True" in found.reason


def test_answers_that_see_each_other_are_found_before_the_first_step() -> None:
    """A manually constructed trainer has no probe of the model; the same model trains with one answer per row."""
    torch.manual_seed(0)
    section = ModelSection(**leaking("mamba"))
    answers = [[3, 4, 5, 1], [6, 7, 1], [8, 9, 10, 11, 1], [12, 1]]

    def trainer(**named: Any) -> GRPOTrainer:
        model = build_model(section, isolation._NoTokenizer(), 32, 0)
        return GRPOTrainer(
            model, sampler=Scripted(answers, 6), rewards=[Given([1.0, 0.0, 0.5, 0.25])], group_size=2, **named
        )

    batch = Batch([prompts([[2, 3, 4], [5, 6, 7, 8]])], Position(), Position(), 0)
    made = trainer()
    made.check(batch)
    with pytest.raises(TrainingError, match="answers that share a row see each other"):
        next(made.optimizer_steps(batch))
    made = trainer(packs_rows=False)
    made.check(batch)
    assert len(next(made.optimizer_steps(batch))) == 1


@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_answers_are_not_packed_in_a_leaking_model(make_config: MakeConfig, trainer: str) -> None:
    section = {"reward": ["helpers:variety"], **({"group_size": 2} if trainer == "grpo" else {})}
    raw = {"train": {"source": "brackets", "format": "prompt", "limit": 16}, "sequence_length": 128}

    def make(model):
        return absolute(
            make_config(
                "data.validation=null", "run.max_steps=8", trainer=trainer, model=model, data=raw, **{trainer: section}
            )
        )

    leaky, sound = prepare_data(make(leaking("mamba"))), prepare_data(make({"config": LLAMA}))
    assert (leaky.packs_answers, leaky.packing) == (False, "one answer a row")
    assert (sound.packs_answers, sound.packing) == (True, "several answers a row")


@pytest.mark.slow
def test_the_table_of_all_model_types() -> None:
    """The table in docs/models-supported.md matches the probe; `make models-supported` writes it."""
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "models_table.py"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {name: row["verdict"] for name, row in json.loads(ran.stdout).items()}
    page = written()
    assert set(found) == set(page) == set(all_names())
    built = {
        name for name in found if UNKNOWN not in (found[name], page[name])
    }  # some need packages that are not on every machine
    assert {name: found[name] for name in built} == {name: page[name] for name in built}
    assert sum(verdict != UNKNOWN for verdict in found.values()) > 100
    assert all(found[name] == NO for name in LEAKS)
    assert all(found[name] == BY_POSITION for name in ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox"))
