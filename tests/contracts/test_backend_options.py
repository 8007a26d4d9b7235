"""Backend options: offloading, hybrid sharding, library options, and the errors for invalid ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import MakeConfig, comparable, ledger
from spawned import BACKENDS, leave, run_all, start_processes

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.config import ConfigError, TrainerConfig, UserError, validate
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.generate import HFSampler
from myllm_ray.models.load import build_model
from myllm_ray.preparation import check_names

SIX = (
    "run.max_steps=6",
    "data.validation=null",
    "batch.micro_size=1",
    "data.sequence_length=96",
    "checkpoint.every_steps=3",
)
OPTIONS: dict[str, list[str]] = {
    "ddp-options": [
        "accelerator.name=ddp",
        "accelerator.options={bucket_cap_mb: 1, static_graph: true, gradient_as_bucket_view: false}",
    ],
    "fsdp-offload": ["accelerator.name=fsdp", "accelerator.offload.parameters=cpu"],
    "fsdp-no-reshard": ["accelerator.name=fsdp", "accelerator.options={reshard_after_forward: false}"],
    "zero-1-offload": ["accelerator.name=deepspeed", "accelerator.stage=1", "accelerator.offload.optimizer=cpu"],
    "zero-2-offload": ["accelerator.name=deepspeed", "accelerator.stage=2", "accelerator.offload.optimizer=cpu"],
    "zero-3-offload": [
        "accelerator.name=deepspeed",
        "accelerator.stage=3",
        "accelerator.offload={optimizer: cpu, parameters: cpu}",
    ],
    "zero-json": [
        "accelerator.name=deepspeed",
        "accelerator.stage=2",
        "accelerator.options={gradient_clipping: auto, "
        "zero_optimization: {reduce_bucket_size: 1000, overlap_comm: false}}",
    ],
    "accelerate-handler": [
        "accelerator.name=accelerate",
        "accelerator.options={kwargs_handlers: {DistributedDataParallelKwargs: {bucket_cap_mb: 1}}}",
    ],
}


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in comparable(folder)]


def assert_same(folders: list[Path], expected: Path) -> None:
    for folder in folders:
        assert losses(folder) == pytest.approx(losses(expected)[-len(losses(folder)) :], rel=1e-5), folder.name


@pytest.mark.promise
def test_options_change_no_loss_and_checkpoints_move_between_them(make_config: MakeConfig) -> None:
    (plain,) = run_all(1, [make_config("run.name=plain", *SIX)])
    folders = run_all(2, [make_config(f"run.name={n}", *o, *SIX) for n, o in OPTIONS.items()])
    assert_same(folders, plain)
    again = run_all(
        2,
        [
            make_config(f"run.name={n}-again", *o, *SIX, f"checkpoint.resume={plain / 'checkpoints/step-00000003'}")
            for n, o in OPTIONS.items()
        ],
    )
    assert_same(again, plain)
    (back,) = run_all(
        1,
        [
            make_config(
                "run.name=back",
                *SIX,
                f"checkpoint.resume={folders[list(OPTIONS).index('zero-3-offload')] / 'checkpoints/step-00000003'}",
            )
        ],
    )
    assert_same([back], plain)


@pytest.mark.promise
def test_hybrid_sharding_on_four(make_config: MakeConfig) -> None:
    """Two groups of two ranks: sharded within a group, replicated between groups; the checkpoint is the usual one."""
    (plain,) = run_all(1, [make_config("run.name=plain", *SIX)])
    hybrid = ["accelerator.name=fsdp", "accelerator.options={replicas: 2}"]
    (first,) = run_all(4, [make_config("run.name=hybrid", *hybrid, *SIX)])
    assert_same([first], plain)
    for checkpoint in ("step-00000003", "step-00000006"):
        found, wanted = (
            read_tensors(first / "checkpoints" / checkpoint),
            read_tensors(plain / "checkpoints" / checkpoint),
        )
        assert found.keys() == wanted.keys()
        assert all(torch.allclose(found[k], wanted[k], atol=1e-4) for k in wanted)
    (back,) = run_all(
        1, [make_config("run.name=back", *SIX, f"checkpoint.resume={first / 'checkpoints/step-00000003'}")]
    )
    assert_same([back], plain)


def hook(name: str) -> list[str]:
    """Returns overrides for Accelerate with a communication hook of DDP."""
    handlers = f"{{kwargs_handlers: {{DistributedDataParallelKwargs: {{comm_hook: {name}}}}}}}"
    return ["accelerator.name=accelerate", f"accelerator.options={handlers}"]


@pytest.mark.promise
def test_buckets_are_the_same_after_a_resume(make_config: MakeConfig) -> None:
    """With three or more ranks the order of a sum depends on the place of a gradient in its bucket.

    Regression: DDP moved gradients to other buckets after its first backward pass. Each rank has one micro-batch.
    """
    backends = {name: BACKENDS[name] for name in ("ddp", "accelerate")}
    backends["ddp-static"] = [*BACKENDS["ddp"], "accelerator.options={static_graph: true}"]
    backends["accelerate-hook"] = hook("fp16")
    common = ("run.max_steps=5", "checkpoint={every_steps: 2, keep_last: null}", "batch.micro_size=2")
    wholes = run_all(4, [make_config(*common, *o, f"run.name={name}") for name, o in backends.items()])
    starts = [f"checkpoint.resume={folder / 'checkpoints' / 'step-00000002'}" for folder in wholes]
    configs = [
        make_config(*common, *options, f"run.name=resumed-{name}", start)
        for (name, options), start in zip(backends.items(), starts, strict=True)
    ]
    for whole, resumed in zip(wholes, run_all(4, configs), strict=True):
        assert comparable(resumed) == comparable(whole)[2:], whole.name
        first, second = (read_tensors(f / "checkpoints" / "step-00000005") for f in (whole, resumed))
        assert all(torch.equal(first[name], second[name]) for name in first)
    # Accelerate ignores the hook if it is not its enumeration.
    assert comparable(wholes[1]) != comparable(wholes[3])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_offload_to_disk(make_config: MakeConfig, tmp_path: Path) -> None:
    """The first run compiles DeepSpeed's I/O library, which takes minutes."""
    config = make_config(
        "run.name=disk",
        "accelerator.name=deepspeed",
        "accelerator.stage=3",
        f"accelerator.offload={{optimizer: disk, parameters: disk, path: {tmp_path / 'disk'}}}",
        *SIX,
    )
    try:
        check_names(config)
    except ConfigError as error:
        pytest.skip(str(error))
    (plain,) = run_all(1, [make_config("run.name=plain", *SIX)])
    folders = run_all(2, [config])
    assert_same(folders, plain)
    assert any((tmp_path / "disk").rglob("*")), "something was on the disk"
    raw = config.model_dump(mode="json")
    raw["run"]["name"], raw["checkpoint"]["resume"] = "disk-again", str(plain / "checkpoints/step-00000003")
    assert_same(run_all(2, [validate(raw)]), plain)


@pytest.mark.promise
def test_zero_3_resumes_in_one_process_without_deepspeed(make_config: MakeConfig, tmp_path: Path) -> None:
    (plain,) = run_all(1, [make_config("run.name=plain", *SIX)])
    (zero,) = run_all(
        2,
        [
            make_config(
                "run.name=zero", *BACKENDS["deepspeed-3"], *SIX[1:], "run.max_steps=3", "scheduler.decay_steps=6"
            )
        ],
    )
    config = make_config("run.name=onwards", *SIX, f"checkpoint.resume={zero}")
    path = tmp_path / "on.json"
    path.write_text(config.model_dump_json(by_alias=True))
    code = (
        "import sys\nfor name in ('deepspeed', 'accelerate', 'ray'):\n    sys.modules[name] = None\n"
        "from myllm_ray.config import load_config\nfrom myllm_ray.worker import run_local\n"
        f"run_local(load_config({str(path)!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    on = plain.parent / "onwards"
    assert ledger(on) == ledger(plain)[3:]
    assert_same([on], plain)


def generate(rank: int, world: int, store: str, name: str, out: str) -> None:
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    section = {"name": name.partition("-")[0], **({"stage": 3} if "-" in name else {})}
    config = {"accelerator": section, "gradient_clip": None}
    accelerator: Accelerator = resolve("accelerators", section["name"], "name")(config)
    accelerator.setup()
    model = build_model(ModelSection(config=SMALL), byte_tokenizer(), 32, 0)
    accelerator.prepare(model, OptimizerManager(model, config).build, SchedulerManager(config=config).build)
    ids = torch.tensor([[1, 2, 3]])
    for most in (4 + 6 * rank, 5):  # the second time after a forward pass for training
        sampler = HFSampler(byte_tokenizer(), RolloutSection(max_new_tokens=most))
        with accelerator.generation():
            tokens = sampler(accelerator.model, ids, torch.ones_like(ids), 2, [5, 6]).tokens
        torch.save(tokens, f"{out}-{rank}-{most}")
        with accelerator.microbatch(last=True):
            losses = accelerator.model(input_ids=ids, labels=ids)
            accelerator.backward(0.0 * losses.nll_sum)
        accelerator.optimizer_step(None)
    leave()


SMALL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed-3"])
def test_generation_with_sharded_parameters(tmp_path: Path, name: str) -> None:
    start_processes(generate, (2, str(tmp_path / "store"), name, str(tmp_path / "out")), 2)
    model = build_model(ModelSection(config=SMALL), byte_tokenizer(), 32, 0)
    ids = torch.tensor([[1, 2, 3]])
    for rank, most in ((0, 4), (1, 10), (0, 5), (1, 5)):  # ranks do not call the model equally often
        expected = HFSampler(byte_tokenizer(), RolloutSection(max_new_tokens=most))(
            model, ids, torch.ones_like(ids), 2, [5, 6]
        ).tokens
        assert torch.equal(torch.load(tmp_path / f"out-{rank}-{most}"), expected)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["accelerator.name=deepsped"], "did you mean deepspeed?"),
        (hook("power_sgd"), "a resumed run would differ"),
        (hook("fp8"), "choose from no, fp16, bf16"),
        (hook("bf16"), "in bf16 on GPUs only"),
        (
            ["accelerator.name=deepspeed", "accelerator.stage=4"],
            "accelerator.stage: input should be 0, 1, 2 or 3 (got 4)",
        ),
        (["accelerator.name=ddp", "accelerator.stage=2"], "stage belongs to deepspeed, accelerator.name is ddp"),
        (
            ["accelerator.name=ddp", "accelerator.options={bucket_cap: 1}"],
            "options.bucket_cap for DistributedDataParallel: did you mean bucket_cap_mb?",
        ),
        (["accelerator.name=fsdp", "accelerator.options={replica: 2}"], "did you mean replicas?"),
        (
            ["accelerator.name=ddp", "accelerator.offload.parameters=cpu"],
            "accelerator.offload.parameters=cpu: not supported by ddp, which offloads nothing",
        ),
        (
            ["accelerator.name=fsdp", "accelerator.offload.optimizer=cpu"],
            "not supported by fsdp, which offloads parameters to cpu",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.offload.parameters=cpu"],
            "only stage 3 shards parameters, accelerator.stage is 2",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.stage=3", "accelerator.offload.parameters=disk"],
            "disk needs a folder: give accelerator.offload.path",
        ),
        (
            [
                "accelerator.name=deepspeed",
                "accelerator.stage=3",
                "accelerator.offload={parameters: disk, path: /proc/nowhere}",
            ],
            "accelerator.offload.path: /proc/nowhere can't be written",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={gradient_clipping: 2.0}"],
            "options.gradient_clipping=2.0 contradicts gradient_clip",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={zero_optimization: {stage: 3}}"],
            "contradicts accelerator.stage, which sets it to 2",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={bf16: {enabled: true}}"],
            "contradicts accelerator.precision",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={optimizer: {type: Adam}}"],
            "the section `optimizer` controls this",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={zero_optimisation: {}}"],
            "did you mean zero_optimization?",
        ),
        (
            ["accelerator.name=deepspeed", "accelerator.options={zero_optimization: {reduce_bucket_size: many}}"],
            "accelerator.options: reduce_bucket_size",
        ),
        (["accelerator.name=deepspeed", "optimizer.name=adafactor"], "optimizer.name=adafactor needs whole tensors"),
        (
            ["accelerator.name=accelerate", "accelerator.options={mixed_precision: bf16}"],
            "accelerator.precision controls this; remove the option",
        ),
        (
            ["accelerator.name=accelerate", "accelerator.options={fsdp_plugin: {shard: 1}}"],
            "options.fsdp_plugin.shard for FullyShardedDataParallelPlugin",
        ),
        (
            ["accelerator.name=accelerate", "accelerator.precision=fp16", "accelerator.device=cpu"],
            "Accelerate supports it on GPUs only",
        ),
        (
            ["accelerator.name=accelerate", "accelerator.options={fsdp_plugin: {}}", "accelerator.device=cpu"],
            "use accelerator.name=fsdp",
        ),
        (
            [
                "accelerator.name=accelerate",
                "accelerator.options={fsdp_plugin: {}}",
                "accelerator.precision=fp16",
                "accelerator.device=cpu",
            ],
            "Accelerate supports it on GPUs only",
        ),
        (
            [
                "accelerator.name=deepspeed",
                "accelerator.options={zero_optimisation: {}}",
                "accelerator.precision=fp16",
                "accelerator.device=cpu",
            ],
            "did you mean zero_optimization?",
        ),
        (["accelerator.activation_checkpointing=0"], "accelerator.activation_checkpointing"),
        (["accelerator.tf32=true", "accelerator.device=cpu"], "accelerator.tf32: the CPU has no TF32"),
        (
            ["accelerator.name=fsdp", "accelerator.gradient_dtype=bf16"],
            "gradient_dtype: bf16 needs gradients that are computed in bf16, and precision is fp32",
        ),
        (
            [
                "accelerator.name=deepspeed",
                "accelerator.precision=bf16",
                "accelerator.options={communication_data_type: bf16}",
            ],
            "communication_data_type=bf16 contradicts accelerator.gradient_dtype, which sets it to fp32",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_starts(
    make_config: MakeConfig, any_cpu: str, overrides: list[str], said: str
) -> None:
    """The line is the same on every CPU: general errors are reported before features that this machine lacks."""
    with pytest.raises(UserError) as caught:
        check_names(make_config(*overrides))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "package"), [("accelerate", "myllm_ray[accelerate]"), ("deepspeed", "deepspeed")])
def test_a_missing_library_is_reported(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        UserError, match=rf"accelerator.name={name} needs {name}: pip install '{package.replace('[', '.')[:6]}"
    ):
        check_names(make_config(f"accelerator.name={name}"))


def test_disk_without_libaio_is_reported(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    config: TrainerConfig = make_config(
        "accelerator.name=deepspeed",
        "accelerator.stage=3",
        f"accelerator.offload={{optimizer: disk, path: {tmp_path / 'disk'}}}",
    )
    with pytest.raises(ConfigError, match=r"libaio-dev"):
        check_names(config)
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)


@pytest.mark.parametrize("name", [n for n in BACKENDS if n != "single"])
def test_every_backend_takes_a_range_of_workers(make_config: MakeConfig, name: str) -> None:
    """Regression test: the DeepSpeed backend compared the range with a number."""
    check_names(make_config(*BACKENDS[name], "scaling.workers=[1,2]"))
