"""LoRA from a folder to an export, over backends, architectures and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import read_manifest, read_tensors
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_deferred, build_model
from myllm_ray.trained_model import open_run

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
HEADS = {**SMALL, "head_dim": 8}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "qwen3": {"model_type": "qwen3", **HEADS, "tie_word_embeddings": True},
    "gemma3": {"model_type": "gemma3_text", **HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160},
    "mistral": {"model_type": "mistral", **HEADS, "sliding_window": 16},
    "phi3": {"model_type": "phi3", **SMALL, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", **SMALL},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **HEADS,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
LORA = {"rank": 4, "alpha": 8}
COMMON = ("data.validation=null", "optimizer.lr=1e-2", "data.sequence_length=64", "batch.micro_size=1")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(24).view(2, 12)).logits
    return found


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["qwen3_moe"], id="one", marks=pytest.mark.promise),
        pytest.param([name for name in SHAPES if name != "qwen3_moe"], id="others", marks=pytest.mark.slow),
    ],
)
def test_from_a_folder_to_an_export(make_config: MakeConfig, tmp_path: Path, names: list[str]) -> None:
    """The curve of FSDP, killed after 3 steps, and DDP, resumed, is that of one process; so are the export's logits."""
    for name in names:
        made = build_model(ModelSection(config=SHAPES[name]), byte_tokenizer(), 64, 0)
        save_pretrained(made, byte_tokenizer(), tmp_path / name)

    def config(name: str, run: str, backend: str, *overrides: str) -> Any:
        model = {"name": str(tmp_path / name), "lora": LORA}
        given = (*COMMON, f"run.name={run}-{name}", *BACKENDS[backend], "scheduler.decay_steps=6", *overrides)
        return make_config(*given, model=model, tokenizer={"kind": "bytes"})

    wholes = run_all(1, [config(name, "whole", "single", "run.max_steps=6") for name in names])
    firsts = [killed_at_step_3(config, name, tmp_path / f"{name}.killed") for name in names]
    seconds = run_all(
        2,
        [
            config(name, "second", "ddp", "run.max_steps=6", f"checkpoint.resume={first}")
            for name, first in zip(names, firsts, strict=True)
        ],
    )
    for name, whole, first, second in zip(names, wholes, firsts, seconds, strict=True):
        rows = [*comparable(first), *comparable(second)]
        assert len(rows) == 6
        for row, other in zip(rows, comparable(whole), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), name
        manifest = read_manifest(second / "checkpoints" / "step-00000006")
        assert not any("embed" in n or "wte" in n for n in manifest["tensors"]), name
        model, tokenizer = open_run(second)
        wanted = logits(model.model)
        assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), wanted, atol=1e-3)
        save_pretrained(model, tokenizer, tmp_path / f"{name}-out")
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out", dtype=torch.float32)
        torch.testing.assert_close(logits(exported), wanted, rtol=1e-4, atol=1e-5, msg=name)


PAIRS = "data.train={source: brackets, format: preference, limit: 40}"
PROMPTS = ("data.train={source: brackets, format: prompt, limit: 40}", "rollout.max_new_tokens=4")
TRAINERS: dict[str, tuple[str, ...]] = {
    "sft": (),
    "pretrain": ("trainer=pretrain", "data.train={source: python-stdlib, format: text, limit: 20}"),
    "reward": ("trainer=reward", PAIRS),
    "dpo": ("trainer=dpo", PAIRS, "dpo={reference: adapter_off, beta: 0.5}"),
    "ppo": ("trainer=ppo", *PROMPTS, "ppo={reward: 'helpers:variety', epochs: 1}"),
    "ppo-own": ("trainer=ppo", *PROMPTS, "ppo={reward: 'helpers:variety', epochs: 1, critic: own}"),
    "grpo": ("trainer=grpo", *PROMPTS, "grpo={reward: 'helpers:variety', group_size: 2}"),
}


def killed_at_step_3(config: Any, name: str, marker: Path) -> Path:
    """Trains under FSDP in two processes; rank 0 is killed when the checkpoint of step 3 is complete."""
    kill = f"callbacks=[jsonl, {{'helpers:KillAtCheckpoint': {{step: 3, marker: '{marker}'}}}}]"
    made = config(name, "first", "fsdp", "run.max_steps=6", "checkpoint.every_steps=3", kill)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_all(2, [made])
    folder = Path(made.run.storage) / made.run.name
    assert [row["step"] for row in comparable(folder)] == [1, 2, 3]
    return folder


@pytest.mark.parametrize(
    ("trainers", "backends"),
    [
        pytest.param(["dpo", "ppo-own"], ["fsdp"], id="two"),
        pytest.param([*TRAINERS], ["ddp", "fsdp", "deepspeed-2", "deepspeed-3"], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_trainer(make_config: MakeConfig, trainers: list[str], backends: list[str]) -> None:
    """Each trains the same adapters on each backend, and its checkpoint holds no frozen weights and can be opened."""

    def config(trainer: str, backend: str) -> Any:
        given = (*COMMON, "run.max_steps=2", f"run.name={trainer}-{backend}")
        model = {"config": {**LLAMA, "tie_word_embeddings": False}, "lora": LORA}
        return make_config(*given, *BACKENDS[backend], *TRAINERS[trainer], model=model)

    plain = dict(zip(trainers, run_all(1, [config(t, "single") for t in trainers]), strict=True))
    pairs = [(t, b) for t in trainers for b in backends]
    for (trainer, backend), folder in zip(pairs, run_all(2, [config(t, b) for t, b in pairs]), strict=True):
        for row, other in zip(comparable(folder), comparable(plain[trainer]), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6), (trainer, backend)
        manifest = read_manifest(folder / "checkpoints" / "step-00000002")
        assert not any("base_layer" in n for n in manifest["tensors"]), (trainer, backend)
        kind = manifest["base"]["model"]
        stage = build_model(ModelSection(name=str(folder)), byte_tokenizer(), 32, 0, kind)
        opened = open_run(folder)[0]
        if kind == "causal_lm":
            torch.testing.assert_close(logits(stage.model), logits(opened.model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backend", "trainer"),
    [
        ("single", "sft"),
        *(
            pytest.param(backend, trainer, marks=pytest.mark.slow)
            for backend, trainer in (("ddp", "sft"), *(("single", t) for t in ("reward", "dpo", "ppo-own", "grpo")))
        ),
    ],
)
def test_frozen_weights_in_half_precision_change_no_bit(make_config: MakeConfig, backend: str, trainer: str) -> None:
    """A run whose checkpoints hold frozen weights keeps them in fp32; the other run holds them in bf16."""
    made = {}
    for name, extra in (("plain", {}), ("dora", {"dora": True})):
        model = {"config": {**LLAMA, "tie_word_embeddings": False}, "lora": {**LORA, **extra}}
        given = (*COMMON, "run.max_steps=2", "accelerator.precision=bf16")
        world = 1 if backend == "single" else 2
        for whole in (True, False):
            overrides = (*given, *BACKENDS[backend], *TRAINERS[trainer], f"run.name={name}-{whole}")
            (made[name, whole],) = run_all(world, [make_config(*overrides, model=model)], whole=whole)
    for name in ("plain", "dora"):
        assert comparable(made[name, True]) == comparable(made[name, False])
        held = [read_manifest(made[name, whole] / "checkpoints" / "step-00000002") for whole in (True, False)]
        assert len(held[0]["tensors"]) > len(held[1]["tensors"])
        trained = read_tensors(made[name, False] / "checkpoints" / "step-00000002")
        same = read_tensors(made[name, True] / "checkpoints" / "step-00000002")
        assert all(torch.equal(same[k], v) for k, v in trained.items())


def test_which_weights_are_held_in_half_precision() -> None:
    """The frozen matrices of linear layers; not embeddings, norms, adapters, or the layers of DoRA."""

    def dtypes(precision: str, saves_frozen: bool, **lora: Any) -> dict[str, torch.dtype]:
        section = ModelSection.model_validate({"config": LLAMA, "lora": {**LORA, **lora}})
        config = {"accelerator": {"precision": precision}, "optimizer": {"name": "sgd"}}
        accelerator = SingleGPUAccelerator(config)
        accelerator.setup()
        accelerator.keeps_frozen = saves_frozen
        model = build_deferred(section, byte_tokenizer(), 64, 0)
        optimizer = OptimizerManager(model, config)
        accelerator.prepare(model, optimizer.build, SchedulerManager(config={"max_steps": 2}).build)
        return {name: p.dtype for name, p in model.named_parameters()}

    found = dtypes("bf16", saves_frozen=False)
    assert {n for n, d in found.items() if d == torch.bfloat16} == {n for n in found if n.endswith("base_layer.weight")}
    for other in (dtypes("bf16", True), dtypes("fp32", False), dtypes("bf16", False, dora=True)):
        assert {*other.values()} == {torch.float32}
