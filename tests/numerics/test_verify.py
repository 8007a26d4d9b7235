"""`myllm-ray verify` certifies correct configs, and names the kind of each planted fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, MakeConfig

from myllm_ray.cli import main
from myllm_ray.common.types import Batch, Isolation
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.stream import LocalStream
from myllm_ray.models.shrink import small_model
from myllm_ray.verify.certificate import verify
from myllm_ray.verify.end_tokens import check_end_tokens
from myllm_ray.verify.packing import check_packing

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.2, "embd_pdrop": 0.1}


@pytest.fixture(autouse=True)
def fast_start(request: pytest.FixtureRequest) -> None:
    """Uses the fork server in all tests but the first, which starts processes as `verify` does."""
    if "sound" not in request.node.name:
        request.getfixturevalue("fork_server")


def found_kinds(config: Any, workers: int = 1, backends: tuple[str, ...] = ("own",)) -> list[tuple[str, int]]:
    certificate = verify(config, steps=3, backends=backends, workers=workers)
    assert not certificate.holds
    assert certificate.left_out == []
    return [(f.kind, f.difference.step) for f in certificate.findings]


@pytest.mark.promise
def test_a_sound_config_is_certified(make_config: MakeConfig) -> None:
    certificate = verify(
        make_config("run.max_steps=1000", "scheduler.warmup_steps=100"), steps=3, backends=("single", "deepspeed-1")
    )
    assert certificate.holds, certificate.findings
    assert len(certificate.rows) == 2 + 3
    assert all(0 <= apart["loss"] < 1e-5 for _, apart in certificate.rows)
    assert max(apart["weights"] for _, apart in certificate.rows) > 0, "something was compared"
    assert all(0 < apart["packing"] < 1e-5 for _, apart in certificate.rows)
    assert certificate.packing == "several documents a row (best_fit); documents in one row do not see each other"


@pytest.mark.slow
def test_dropout_and_half_precision_are_certified_too(make_config: MakeConfig) -> None:
    certificate = verify(
        make_config("accelerator.precision=bf16", model={"config": GPT2}), steps=3, backends=("ddp",), workers=1
    )
    assert certificate.holds, certificate.findings
    assert any("bf16" in variant.backend for variant, _ in certificate.rows)
    assert any("model.config.resid_pdrop=0.0" in variant.changes for variant, _ in certificate.rows)
    assert any(not variant.changes for variant, _ in certificate.rows)


@pytest.mark.slow
def test_the_configs_own_accelerator_is_compared_with_a_plain_one(make_config: MakeConfig) -> None:
    own = ("accelerator.name=fsdp", "accelerator.offload.parameters=cpu", "accelerator.activation_checkpointing=full")
    certificate = verify(make_config(*own), steps=3, backends=("own",), workers=1)
    assert certificate.holds, certificate.findings
    assert [v.backend for v, _ in certificate.rows] == ["single", "single", "own", "own"]


@pytest.mark.slow
def test_a_way_that_fails_is_left_out_with_its_reason(make_config: MakeConfig) -> None:
    certificate = verify(make_config("accelerator.name=faults:Broken"), steps=3, backends=("own",), workers=1)
    assert certificate.holds
    assert [(v.backend, reason) for v, reason in certificate.left_out] == [("own", "ZeroDivisionError: planted")] * 2


def test_a_mean_of_means_is_normalisation(make_config: MakeConfig) -> None:
    config = make_config("data.packing=false", trainer="faults:MeanOfMeans")
    assert {(kind, step) for kind, step in found_kinds(config, backends=())} == {("normalisation", 1)}


def test_a_mean_over_ranks_is_normalisation(make_config: MakeConfig) -> None:
    kinds = found_kinds(make_config("accelerator.name=faults:MeanOverRanks"), workers=2)
    assert kinds == [("normalisation", 1), ("normalisation", 1)]


@pytest.mark.parametrize(
    ("fault", "kind", "step"),
    [
        ("SteppedTwice", "schedule stepped twice", 3),
        ("LowPrecision", "precision", 1),
        pytest.param("Unclipped", "clipping", 1, marks=pytest.mark.slow),
        pytest.param("NoDropout", "dropout", 1, marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_named(make_config: MakeConfig, fault: str, kind: str, step: int) -> None:
    overrides = {"model": {"config": GPT2}} if fault == "NoDropout" else {}
    found = found_kinds(make_config(f"accelerator.name=faults:{fault}", **overrides))
    assert set(found) == {(kind, step)}


@pytest.mark.slow
def test_an_unsharded_reference_is_named(make_config: MakeConfig) -> None:
    """The losses are correct; only the memory that a rank holds is wrong."""
    config = make_config(
        "dpo.beta=0.5",
        "data={train: {source: brackets, format: preference}, sequence_length: 32}",
        "model.config.vocab_size=260",
        "accelerator.name=faults:UnshardedReference",
        trainer="dpo",
    )
    certificate = verify(config, steps=2, backends=("own", "fsdp"), workers=2)
    assert {(f.kind, f.variant.backend, f.variant.workers) for f in certificate.findings} == {("sharding", "own", 2)}
    assert "at the start, bytes of the parameters of reference on rank 0 " in str(certificate.findings[0])
    held = {(v.backend, v.workers): row["bytes_per_rank"] for v, row in certificate.rows}
    assert held["fsdp", 2] == pytest.approx(held["fsdp", 1] / 2, rel=0.02)
    assert held["own", 2] == pytest.approx(0.75 * held["fsdp", 1], rel=0.02)


def test_another_order_of_the_data_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of one row come from the next batch, as from a stream that counts in micro-batches."""
    batches = LocalStream.batches

    def shifted(self: LocalStream, start: Any, steps: int) -> Any:
        found: list[Batch] = list(batches(self, start, steps + 1))
        yield from found[1:] if self.spec.micro_size == 1 else found[:-1]

    monkeypatch.setattr(LocalStream, "batches", shifted)
    assert found_kinds(make_config(), backends=()) == [("data order", 1)]


def test_a_trainer_that_forgets_where_documents_begin_is_named(make_config: MakeConfig) -> None:
    assert found_kinds(make_config(trainer="faults:Forgetful"), backends=()) == [("packing", 1)]


def test_a_leak_in_the_model_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without document boundaries in the mask, rows fall back to one document each.

    If the verdict is wrong as well, the losses show the leak.
    """
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    check = check_packing(make_config(f"data.cache={tmp_path / 'fresh'}"))  # a cache without a stored verdict
    assert "one document a row; documents in one row see each other" in check.text
    assert check.distance({"loss": 1.0, "grad_norm": 1.0}) is None, "nothing to compare"
    monkeypatch.setattr("myllm_ray.models.isolation._compare", lambda *_, **__: Isolation(True, "planted"))
    assert found_kinds(make_config(), backends=()) == [("packing", 1)]


def test_wrong_end_tokens_are_named(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling stops at the end-of-text token only, but the chat template ends turns with another token.

    Such answers never end.
    """
    path = tmp_path / "chats.jsonl"
    path.write_text(
        "\n".join(
            json.dumps(
                {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n + 1}"}]}
            )
            for n in range(40)
        )
    )
    config = make_config(f"data={{train: {{path: {path}, format: chat}}, sequence_length: 64}}")
    assert str(check_end_tokens(config)).startswith("sampling stops at <|endoftext|> or <|im_end|>; ")
    assert not check_end_tokens(config).wrong
    monkeypatch.setattr("myllm_ray.dependencies.end_tokens", lambda tokenizer, others=(): (tokenizer.eos_token_id,))
    certificate = verify(config, steps=2, backends=(), workers=1)
    assert [(f.kind, f.difference.step, f.difference.found) for f in certificate.findings] == [("end tokens", 0, 0.0)]
    assert "no document trains on a token at which sampling stops (<|endoftext|>)" in str(certificate.findings[0])


def test_a_format_that_leaves_the_end_token_out_is_named(make_config: MakeConfig) -> None:
    assert check_end_tokens(make_config("data.train.format=helpers:without_its_end")).wrong


def test_prompts_hold_no_end_tokens(make_config: MakeConfig) -> None:
    config = make_config(
        "data={train: {source: arithmetic, format: prompt}, sequence_length: 16}",
        "rollout={max_new_tokens: 4}",
        "grpo={reward: [{function: 'math:prod'}], group_size: 2}",
        trainer="grpo",
    )
    assert str(check_end_tokens(config)).endswith("; the data contains no answers")
    assert not check_end_tokens(config).wrong


def test_the_command(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config("run.max_steps=1000").model_dump(mode="json")))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["myllm-ray", "verify", str(path), "--steps", "3", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        shown = capsys.readouterr()
        return int(stopped.value.code or 0), shown.out, shown.err

    code, out, _ = call("--backend", "single", "--output", str(tmp_path / "certificate.json"))
    assert code == 0, out
    assert "certified: 2 ways to train this config are the same run" in out
    assert "packing: several documents a row" in out
    assert json.loads((tmp_path / "certificate.json").read_text())["holds"] is True
    code, out, _ = call("--backend", "own", "--workers", "2", "accelerator.name=faults:SteppedTwice")
    assert code == 1
    assert "schedule stepped twice: the learning rate is that of step 5" in out
    code, _, err = call("--backend", "dpp")
    assert code == 2
    assert "--backend dpp: choose from single, ddp" in err


def test_nothing_to_train_on_is_reported(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"there is nothing to train on: .* are after data\.sequence_length=8"):
        verify(make_config("data.sequence_length=8"), steps=3, backends=())


@pytest.mark.parametrize("name", ["pretrain", "sft", "quickstart"])
def test_shrunk_models_keep_their_type(name: str) -> None:
    from myllm_ray.config import load_config

    section = load_config(ROOT / "configs" / f"{name}.yaml").model
    small = small_model(section)
    assert small.config is not None
    assert section.config is not None
    assert small.config["model_type"] == section.config["model_type"]


def test_layer_kinds_are_kept_when_shrunk() -> None:
    small = small_model(ModelSection(config={"model_type": "gemma3_text", "num_hidden_layers": 12}))
    assert small.config is not None
    assert sorted(small.config["layer_types"]) == ["full_attention", "sliding_attention"]
