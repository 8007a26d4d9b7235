"""Checks of the GPU-specific behaviour, on one GPU within minutes: `make test-gpu`."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import LLAMA, MakeConfig, comparable, read_jsonl
from spawned import run_all
from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.precision import why_not
from myllm_ray.common.distributed import backend
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection, OptimizerSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred

from .conftest import DEVICE, ON_GPU, Run

pytestmark = pytest.mark.gpu
BACKENDS: dict[str, list[str]] = {
    **{name: [f"accelerator.name={name}"] for name in ("single", "ddp", "fsdp", "accelerate")},
    **{f"deepspeed-{n}": ["accelerator.name=deepspeed", f"accelerator.stage={n}"] for n in range(4)},
}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}
PAIRS = ["data.sequence_length=32", "data.train={source: brackets, format: preference}"]
PROMPTS = [
    "data.sequence_length=32",
    "data.train={source: brackets, format: prompt, limit: 30}",
    "rollout.max_new_tokens=8",
]
TRAINERS: dict[str, list[str]] = {
    "pretrain": ["trainer=pretrain"],
    "sft": ["trainer=sft"],
    "reward": ["trainer=reward", *PAIRS],
    "dpo": ["trainer=dpo", "dpo.beta=0.5", *PAIRS],
    "simpo": ["trainer=dpo", "dpo={loss: simpo, beta: 0.5}", *PAIRS],
    "grpo": ["trainer=grpo", "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}", *PROMPTS],
    "ppo": ["trainer=ppo", "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2}", *PROMPTS],
    "ppo-own-critic": [
        "trainer=ppo",
        "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2, critic: own}",
        *PROMPTS,
    ],
}


def close(
    found: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    tolerance: float,
    names: tuple[str, ...] = ("loss", "grad_norm"),
) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (row["step"], name)


def needs(precision: str, name: str) -> None:
    reason = why_not(precision, torch.device(DEVICE))
    if reason is None and precision == "fp16" and name == "accelerate" and not ON_GPU:
        reason = "Accelerate has fp16 on GPUs only"
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_and_precision(train: Run, name: str, precision: str) -> None:
    """Losses and gradient norms equal those of the CPU in fp32, within rounding."""
    needs(precision, name)
    close(
        train(f"{name}-{precision}", *BACKENDS[name], f"accelerator.precision={precision}"),
        train("reference", device="cpu"),
        TOLERANCE[precision],
    )


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer(train: Run, kind: str) -> None:
    """Rounding may change sampled answers; there only the importance ratio of the first step is checked (it is 1)."""
    found, expected = train(kind, *TRAINERS[kind]), train(kind, *TRAINERS[kind], device="cpu")
    if "rollout.max_new_tokens=8" not in TRAINERS[kind]:
        close(found, expected, 1e-3)
        return
    assert len(found) == len(expected)
    assert all(abs(row["loss"]) < 100 and row["length"] > 0 for row in found)
    assert found[0].get("importance_ratio", 1.0) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed-3"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_frozen_models_and_sampling_of_sharded_backends(train: Run, kind: str, name: str) -> None:
    found = train(f"{kind}-{name}", *TRAINERS[kind], *BACKENDS[name], "accelerator.precision=bf16")
    assert len(found) == 4
    if kind == "dpo":
        assert found[0]["rewards/margins"] == 0, "policy and reference start equal, bit for bit"


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto", "per_document", "flex", "flash2", "flash3"])
def test_every_attention(train: Run, attention: str, model_type: str) -> None:
    """Compares packed documents with eager attention on the CPU; Gemma 3 has windows shorter than the documents."""
    if attention.startswith("fl") and not ON_GPU:
        pytest.skip(f"{attention} needs a GPU")
    if attention.startswith("flash"):
        pytest.importorskip({"flash2": "flash_attn", "flash3": "flash_attn_interface"}[attention])
    precision = "bf16" if attention.startswith("flash") else "fp32"
    packed = ["data.packing=true", "data.sequence_length=256"]
    if model_type == "gemma3_text":
        packed += ["model.config.model_type=gemma3_text", "model.config.head_dim=32", "model.config.sliding_window=16"]
    options = (f"model.attention={attention}", f"accelerator.precision={precision}")
    found = train(f"{model_type}-{attention}", *options, *packed)
    close(found, train(f"{model_type}-eager", "model.attention=eager", *packed, device="cpu"), TOLERANCE[precision])


@pytest.mark.parametrize(
    "overrides",
    [
        ["accelerator.name=fsdp", "accelerator.offload.parameters=cpu"],
        ["accelerator.name=deepspeed", "accelerator.stage=2", "accelerator.offload.optimizer=cpu"],
        ["accelerator.name=deepspeed", "accelerator.stage=3", "accelerator.offload={optimizer: cpu, parameters: cpu}"],
    ],
    ids=["fsdp", "zero-2", "zero-3"],
)
def test_offload_with_clipping(train: Run, overrides: list[str]) -> None:
    """Gradient norms on the CPU are reduced with gloo, in addition to NCCL."""
    close(
        train("offload", *overrides, "gradient_clip=0.5"),
        train("clipped", "gradient_clip=0.5", device="cpu"),
        TOLERANCE["fp32"],
    )


@pytest.mark.parametrize(
    "overrides",
    [["accelerator.activation_checkpointing=full"], ["accelerator.compile=blocks"]],
    ids=["recompute", "compile"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_less_memory_and_compiled(train: Run, overrides: list[str]) -> None:
    close(train("memory", *overrides), train("reference", device="cpu"), TOLERANCE["fp32"])


def test_the_fsdp_plugin_of_accelerate(train: Run) -> None:
    if not ON_GPU:
        pytest.skip("Accelerate passes over its FSDP plugin on CPUs")
    options = ["accelerator.name=accelerate", "accelerator.options={fsdp_plugin: {}}"]
    close(train("plugin", *options), train("reference", device="cpu"), TOLERANCE["fp32"])
    assert train("plugin-dpo", *TRAINERS["dpo"], *options)[0]["rewards/margins"] == 0


@pytest.mark.parametrize("name", ["single", "fsdp", "deepspeed-3"])
def test_a_resumed_run_equals_the_undisturbed_one(train: Run, name: str) -> None:
    """Resumes from a checkpoint that was written in the background; equal within rounding."""
    saving = ["checkpoint={every_steps: 2, async: true, keep_last: null}", *BACKENDS[name]]
    whole = train(f"whole-{name}", *saving)
    train(f"half-{name}", *saving, "run.max_steps=2", "scheduler.name=constant")
    resumed = train(f"half-{name}", *saving, "scheduler.name=constant", "checkpoint.resume=auto")
    constant = train(f"constant-{name}", *saving, "scheduler.name=constant")
    assert len(whole) == len(constant) == 4
    close([row for row in resumed if row["step"] > 2], constant[2:], TOLERANCE["fp32"])


@pytest.mark.parametrize("name", ["single", "fsdp", "deepspeed-3"])
def test_a_frozen_model_takes_half_the_memory_in_bf16(name: str) -> None:
    section: dict[str, Any] = {
        "name": name.partition("-")[0],
        "device": DEVICE,
        "precision": "bf16",
        **({"stage": 3} if "-" in name else {}),
    }
    config = {
        "accelerator": section,
        "optimizer": OptimizerSection().model_dump(),
        "max_steps": 1,
        "batch": {"micro_size": 1, "global_size": 1},
    }

    def deferred() -> nn.Module:
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "tie_word_embeddings": False}
        return build_deferred(ModelSection(config={**LLAMA, **sizes}), byte_tokenizer(), 64, 0)

    accelerator: Accelerator = resolve("accelerators", section["name"], "accelerator.name")(config)
    accelerator.setup()
    try:
        model = deferred()
        total = sum(p.numel() for p in model.parameters())
        trained = accelerator.prepare(
            model, OptimizerManager(model, config).build, SchedulerManager(config=config).build
        )
        before = torch.cuda.memory_allocated() if ON_GPU else 0
        frozen = accelerator.prepare_frozen(deferred())
        held, expected = accelerator.parameter_bytes(frozen)
        assert held == expected
        assert held < 2.2 * total
        if ON_GPU:
            assert torch.cuda.memory_allocated() - before < 2.5 * total
        ids = torch.arange(64, device=accelerator.device)[None]
        trained.eval()
        with torch.no_grad(), accelerator.autocast():
            assert torch.equal(frozen(input_ids=ids, labels=ids).nll, trained(input_ids=ids, labels=ids).nll)
    finally:
        accelerator.close()


def test_the_optimizer_is_fused_for_sharded_parameters() -> None:
    config = {
        "accelerator": {"name": "fsdp", "device": DEVICE},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "max_steps": 1,
    }
    accelerator: Accelerator = resolve("accelerators", "fsdp", "accelerator.name")(config)
    accelerator.setup()
    try:
        model = build_deferred(ModelSection(config=LLAMA), byte_tokenizer(), 64, 0)
        accelerator.prepare(model, OptimizerManager(model, config).build, SchedulerManager(config=config).build)
        assert accelerator.optimizer.defaults["fused"]
    finally:
        accelerator.close()


def test_the_process_group_has_both_devices() -> None:
    dist.init_process_group(backend(DEVICE), store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=1))
    try:
        for device in {"cpu", DEVICE}:
            value = torch.ones(3, device=device)
            dist.all_reduce(value)
            assert value.tolist() == [1.0] * 3
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("background", [False, True])
def test_tensors_on_the_device_are_saved_and_loaded(tmp_path: Path, background: bool) -> None:
    saved = {f"model.{dtype}": torch.randn(129, 65).to(DEVICE, dtype) for dtype in (torch.float32, torch.bfloat16)}
    saved["optimizer.w.step"] = torch.tensor(3.0, device=DEVICE)
    saved["model.turned"] = torch.randn(7, 5, device=DEVICE).T
    manager = CheckpointManager(folder=tmp_path, background=background)
    folder = manager.save(1, saved, {})
    manager.wait()
    loaded = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    manager.load(folder, loaded)
    for name, tensor in loaded.items():
        assert tensor.device.type == DEVICE
        assert torch.equal(tensor, saved[name])


def test_strict_determinism_is_bit_for_bit(train: Run, make_config: MakeConfig) -> None:
    where = next((key for key in ("run", "accelerator") if hasattr(getattr(make_config(), key), "determinism")), None)
    if where is None:
        pytest.skip("the config has no determinism")
    strict = f"{where}.determinism=strict"
    assert train("once", strict) == train("again", strict)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_through_ray(make_config: MakeConfig, train: Run, kind: str) -> None:
    """Ray assigns the GPU; with GRPO a rollout actor shares it with the worker."""
    from myllm_ray import train as through_ray

    gpus = 0.0 if not ON_GPU else 0.5 if kind == "grpo" else 1.0
    rollout = ["rollout.placement=actors"] if kind == "grpo" else []
    config = make_config(
        "data.validation=null",
        "run.max_steps=4",
        "accelerator.name=ddp",
        "scaling.workers=1",
        f"scaling.gpus_per_worker={gpus}",
        *TRAINERS[kind],
        *rollout,
        f"run.name=ray-{kind}",
    )
    rows = comparable(Path(str(through_ray(config).folder)))
    assert len(rows) == 4
    if kind == "sft":
        close(rows, train("sft", *TRAINERS["sft"], device="cpu"), 1e-3)


def test_doctor_finds_no_fault() -> None:
    if not ON_GPU:
        pytest.skip("doctor has a test of its own on CPUs")
    from myllm_ray.verify.doctor import examine

    failed = [f"{line.what}: {line.detail}" for line in examine() if ", cuda" in line.what and not line.works]
    assert failed == []
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def test_figures_on_the_device(make_config: MakeConfig) -> None:
    """Phases are measured by events, and the peak memory of the device is logged."""
    if not ON_GPU:
        pytest.skip("events of CUDA")
    config = make_config("accelerator.device=cuda", "run.max_steps=8", "logging.every_steps=4", "run.name=figures")
    (folder,) = run_all(1, [config])
    row = read_jsonl(folder / "metrics.jsonl")[-1]
    assert row["memory/device_peak"] > 0
    assert row["time/forward"] > 0
    assert row["time/backward"] > 0
    assert row["tflops_per_second"] > 0
    assert 0 <= row.get("mfu", 0) < 1
