"""Mixture-of-experts models: equal runs for all micro-batch sizes, backends, worker counts and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, comparable
from spawned import BACKENDS, run_all
from test_preferences_and_rollouts import COMMON, TRAINERS

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
KINDS: dict[str, list[str]] = {
    "sft": ["run.max_steps=3", "evaluation.every_steps=3"],
    **{kind: [*COMMON, *TRAINERS[kind], "run.max_steps=2"] for kind in ("reward", "dpo", "kto", "grpo", "ppo")},
}


def config_of(make_config: MakeConfig, kind: str, *overrides: str) -> Any:
    rollout = ["rollout.max_new_tokens=8"] if kind in ("grpo", "ppo") else []
    own = ["ppo.critic=own"] if kind == "ppo" else []
    return make_config(
        "model.router_loss_weight=0.5",
        "checkpoint.at_end=false",
        *rollout,
        *KINDS[kind],
        *own,
        *overrides,
        model={"config": MIXTRAL},
    )


def assert_same(folder: Path, expected: Path) -> None:
    found, wanted = comparable(folder), comparable(expected)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        assert "experts/layer_1/load_max" in row
        assert row["router_loss"] > 1
        for name, value in other.items():
            if name != "calibration_error":  # it is binned, so a rounding difference can move a pair
                assert row[name] == pytest.approx(value, rel=2e-4, abs=2e-5), (folder.name, row["step"], name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_micro_batch_size_changes_nothing(make_config: MakeConfig, kind: str) -> None:
    size = 4 if kind in ("grpo", "ppo") else 8  # sampling is not split: only the forward passes are
    (whole,) = run_all(1, [config_of(make_config, kind, f"batch.micro_size={size}", "run.name=whole")])
    smaller = f"batch.micro_size={size}" if size == 4 else "batch.micro_size=2"
    (cut,) = run_all(
        1, [config_of(make_config, kind, smaller, *(["rollout.micro_size=2"] if size == 4 else []), "run.name=cut")]
    )
    assert_same(cut, whole)
    if kind in ("dpo", "reward"):
        (plain,) = run_all(1, [config_of(make_config, kind, f"{kind}.shared_prompt=never", "run.name=plain")])
        assert_same(plain, whole)
    (off,) = run_all(
        1, [config_of(make_config, kind, "model.router_loss_weight=0", "run.name=without", f"batch.micro_size={size}")]
    )
    with_loss, without = comparable(whole)[0], comparable(off)[0]
    assert with_loss["loss"] == pytest.approx(without["loss"] + 0.5 * without["router_loss"], rel=1e-4)
    assert with_loss["router_loss"] == pytest.approx(without["router_loss"], rel=1e-5)
    assert with_loss["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    "backend",
    [
        "fsdp",
        *(pytest.param(name, marks=pytest.mark.promise) for name in ("ddp", "deepspeed-2", "deepspeed-3")),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("accelerate", "deepspeed-0", "deepspeed-1")),
    ],
)
def test_every_backend_trains_the_same_experts(make_config: MakeConfig, backend: str) -> None:
    (single,) = run_all(1, [config_of(make_config, "sft", "run.name=single")])
    options = ["accelerator.activation_checkpointing=full"] if backend in ("fsdp", "deepspeed-3") else []
    for folder in run_all(2, [config_of(make_config, "sft", f"run.name={backend}", *BACKENDS[backend], *options)]):
        assert_same(folder, single)


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.promise) for kind in ("dpo", "grpo")),
        pytest.param("ppo", marks=pytest.mark.slow),
    ],
)
def test_every_trainer_on_sharding_backends(make_config: MakeConfig, kind: str) -> None:
    (single,) = run_all(1, [config_of(make_config, kind, "run.name=single")])
    for folder in run_all(
        2, [config_of(make_config, kind, f"run.name={name}", *BACKENDS[name]) for name in ("fsdp", "deepspeed-3")]
    ):
        assert_same(folder, single)
