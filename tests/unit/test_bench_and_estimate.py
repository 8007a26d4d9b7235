"""The commands bench and estimate: their figures, their output, and what they refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, read_jsonl

from myllm_ray import cli
from myllm_ray.common.hardware import hardware_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.orchestration.bench import WARM_UP, bench
from myllm_ray.verify.estimate import communication_of, estimate
from myllm_ray.worker import run_local

SIZES = "model.config={model_type: llama, hidden_size: 64, intermediate_size: 96, num_hidden_layers: 2, "
SIZES += "num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: true}"


def written(make_config: MakeConfig, folder: Path, *overrides: str) -> str:
    path = folder / "config.json"
    path.write_text(make_config(*overrides).model_dump_json())
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["myllm-ray", *arguments])
    cli.app(standalone_mode=False)
    return capsys.readouterr().out


def test_bench_prints_medians_of_the_measured_steps(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(make_config, tmp_path, "run.budget.tokens=10", "checkpoint.every_steps=1")
    found = json.loads(printed(capsys, monkeypatch, "bench", path, "--steps", "2", "--json").splitlines()[-1])
    assert found["steps"] == 2
    assert found["tokens_per_second"] > 0
    assert 0 < found["mfu"] < 1
    assert found["mfu"] == pytest.approx(found["tflops_per_second"] / found["peak_tflops"])
    assert found["step_seconds"] >= 0.5 * found["seconds"]["forward"] > 0
    folder = tmp_path / "runs" / "run-bench"
    assert len(read_jsonl(folder / "metrics.jsonl")) == WARM_UP + 2
    assert not list(folder.glob("checkpoints/*"))
    table = printed(capsys, monkeypatch, "bench", path, "--steps", "1")
    assert "medians of 1 steps" in table
    assert "MFU" in table
    with pytest.raises(ConfigError, match="--steps 1 or more"):
        bench(make_config(), 0)


@pytest.mark.slow
def test_estimated_tokens_are_those_of_the_run(make_config: MakeConfig) -> None:
    for overrides in (["run.max_steps=3"], ["run.max_steps=null", "run.epochs=2"]):
        found = estimate(make_config(*overrides, "data.validation=null")).data
        run = run_local(
            make_config(*overrides, "data.validation=null", "run.overwrite=true", "checkpoint.at_end=false")
        )
        rows = read_jsonl(Path(str(run["folder"])) / "metrics.jsonl")
        assert found.steps == rows[-1]["step"]
        assert found.trained == sum(row["tokens"] for row in rows)
        assert found.trained < found.tokens <= found.positions
        assert list(found.by_source.values()) == [found.tokens]
        assert found.flops > 6 * found.tokens


@pytest.mark.slow
def test_estimated_tokens_by_source(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = make_config().data.sources[0].path
    sources = ", ".join(
        f"{{name: {n}, path: {given}, format: instruction, share: {s}}}" for n, s in (("a", 0.7), ("b", 0.3))
    )
    path = written(make_config, tmp_path, f"data.train=[{sources}]", "run.max_steps=40")
    found = json.loads(printed(capsys, monkeypatch, "estimate", path, "--json").splitlines()[-1])["data"]
    assert sum(found["by_source"].values()) == found["tokens"]
    assert abs(found["by_source"]["a"] - 0.7 * found["tokens"]) <= 160
    table = printed(capsys, monkeypatch, "estimate", path)
    assert f"of a {found['by_source']['a']:,}" in " ".join(table.replace("│", " ").split())


@pytest.mark.slow
def test_parts_of_the_memory(make_config: MakeConfig) -> None:
    parts = estimate(make_config(SIZES)).memory
    model = estimate(make_config(SIZES))
    assert parts["parameters"] == pytest.approx(4 * model.parameters, rel=0.01)
    assert parts["optimizer"] == pytest.approx(8 * model.parameters, rel=0.01)
    assert parts["gradients"] == 4 * model.trained_parameters
    assert parts["activations"] > 0
    saving = estimate(make_config(SIZES, "accelerator.activation_checkpointing=full")).memory
    assert saving["activations"] < parts["activations"]
    half = estimate(make_config(SIZES, "accelerator.precision=bf16")).memory
    assert half["activations"] < parts["activations"]
    adapters = estimate(make_config(SIZES, "model.lora.rank=2")).memory
    assert adapters["optimizer"] < 0.2 * parts["optimizer"]
    plain = estimate(make_config(SIZES, "optimizer={name: sgd, lr: 0.1}")).memory
    assert plain["optimizer"] == 0


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["accelerator.name=ddp"], {"gradients"}),
        (["accelerator.name=fsdp"], {"gradients", "parameters"}),
        (["accelerator={name: fsdp, options: {replicas: 2}}"], {"gradients", "parameters"}),
        (["accelerator={name: deepspeed, stage: 1}"], {"gradients", "parameters"}),
    ],
)
def test_workers_divide_the_memory_and_communicate(
    make_config: MakeConfig, overrides: list[str], names: set[str]
) -> None:
    alone = estimate(make_config(SIZES))
    found = estimate(make_config(SIZES, *overrides), hardware_of("h100x4"), usd_per_hour=10.0)
    assert (found.workers, set(found.communication)) == (4, names)
    share = {"accelerator.name=ddp": 1.0, "accelerator={name: fsdp, options: {replicas: 2}}": 0.5}.get(
        overrides[0], 0.25
    )
    assert found.memory["optimizer"] == pytest.approx(share * alone.memory["optimizer"], rel=0.05)
    assert found.step_seconds is not None
    assert found.usd == pytest.approx(10 * found.hours)
    assert alone.communication == {}
    assert alone.usd is None


def test_communication_of_sharded_backends(make_config: MakeConfig) -> None:
    """8 workers, one micro-batch each; rings send (n - 1) / n of a tensor of n ranks."""

    def sent(options: str) -> dict[str, float]:
        config = make_config(
            SIZES, f"accelerator={{name: fsdp, options: {options}}}", "batch={global_size: 8, micro_size: 1}"
        )
        with torch.device("meta"):
            model = torch.nn.Linear(64, 64, bias=False)
        return {name: size / (4 * 64 * 64) for name, size in communication_of(model, config, 8).items()}

    assert sent("{}") == {"parameters": 2 * 7 / 8, "gradients": 7 / 8}
    assert sent("{reshard_after_forward: false}") == {"parameters": 7 / 8, "gradients": 7 / 8}
    # Two groups of four: the shards, a quarter each, are summed over the two groups.
    assert sent("{replicas: 2}") == {"parameters": 2 * 3 / 4, "gradients": 3 / 4 + 2 * 1 / 2 / 4}
    assert sent("{replicas: 8}") == {"gradients": 2 * 7 / 8}


def test_estimate_prints_a_table(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(make_config, tmp_path)
    table = printed(capsys, monkeypatch, "estimate", path, "--hardware", "a100", "--usd-per-hour", "2")
    for text in ("1 x A100", "memory per worker", "tokens", "hours", "USD", "assumes an MFU of 40%"):
        assert text in table
    assert not (tmp_path / "runs" / "run").exists()
    assert json.loads(printed(capsys, monkeypatch, "estimate", path, "--json").splitlines()[-1])["usd"] is None


def test_what_can_not_be_estimated(make_config: MakeConfig) -> None:
    prompts = ("trainer=grpo", "grpo={reward: 'helpers:variety'}", "data.train={source: brackets, format: prompt}")
    with pytest.raises(ConfigError, match=r"trainer grpo trains on prompts here; only trainers on tokens"):
        estimate(make_config(*prompts, "data.validation=null", "rollout.max_new_tokens=8"))
    with pytest.raises(ConfigError, match=r"bf16: T4 has none"):
        estimate(make_config("accelerator.precision=bf16"), hardware_of("t4"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer=dpo",),
        ("trainer=dpo", "dpo.shared_prompt=never"),
        ("trainer=dpo", "dpo.reference=precomputed"),
        ("trainer=dpo", "dpo.loss=simpo"),
        ("trainer=reward",),
    ],
)
def test_pairs_are_estimated(make_config: MakeConfig, overrides: tuple[str, ...]) -> None:
    pairs = "data.train={source: brackets, format: preference, limit: 30}"
    config = make_config(*overrides, pairs, "data.validation=null", "data.sequence_length=32", "run.max_steps=3", SIZES)
    found = estimate(config)
    copies = overrides == ("trainer=dpo",) or "dpo.shared_prompt=never" in overrides
    assert (found.memory["frozen models"] == found.memory["parameters"]) == copies
    assert (found.memory["frozen models"] == 0) != copies
    assert found.memory["activations"] > 0
    run = run_local(config)
    rows = read_jsonl(Path(str(run["folder"])) / "metrics.jsonl")
    assert found.data.trained == sum(row["tokens"] for row in rows)
    assert found.data.trained < found.data.tokens <= found.data.positions
