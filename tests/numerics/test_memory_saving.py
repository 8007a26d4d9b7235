"""Activation checkpointing, compilation and models built shard by shard: equal results with less memory."""

from __future__ import annotations

import ctypes
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import MakeConfig, comparable
from spawned import BACKENDS, SHARED, run_all, start_processes

from myllm_ray.accelerators import memory
from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.memory import CACHE_VARIABLE, save_memory
from myllm_ray.common.materialize import source_of
from myllm_ray.config import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import AcceleratorSection, ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred, build_model

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "resid_pdrop": 0.3}
LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FEW = (
    "run.max_steps=4",
    "data.validation=null",
    "batch.micro_size=1",
    "checkpoint.at_end=false",
    "data.sequence_length=96",
)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in comparable(folder)]


def test_activation_checkpointing_changes_no_bit(make_config: MakeConfig) -> None:
    """With dropout: the second computation draws the same random numbers."""
    runs = [
        make_config(f"run.name=every-{n}", f"accelerator.activation_checkpointing={n}", *FEW, model={"config": GPT2})
        for n in ("none", "full", 2)
    ]
    none, full, second = run_all(1, runs)
    assert comparable(full) == comparable(none)
    assert comparable(second) == comparable(none)


def test_activation_checkpointing_keeps_less(make_config: MakeConfig) -> None:
    kept = {}
    batch = {"input_ids": torch.ones(2, 64, dtype=torch.int64), "labels": torch.ones(2, 64, dtype=torch.int64)}
    for what in ("none", 2, "full"):
        model = build_model(ModelSection(config=GPT2), byte_tokenizer(), 64, 0)
        names = [n for n, _ in model.named_parameters()]
        save_memory(model, AcceleratorSection(activation_checkpointing=what))
        assert [n for n, _ in model.named_parameters()] == names
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(**batch)
        kept[what] = sum(sizes)
    assert kept["full"] < 0.3 * kept["none"]
    assert kept["full"] < kept[2] < kept["none"]


@pytest.mark.promise
def test_activation_checkpointing_on_every_backend(make_config: MakeConfig) -> None:
    (plain,) = run_all(1, [make_config("run.name=plain", *FEW)])
    runs = [
        make_config(f"run.name={n}", *BACKENDS[n], "accelerator.activation_checkpointing=full", *FEW) for n in SHARED
    ]
    for folder in run_all(2, runs):
        assert losses(folder) == pytest.approx(losses(plain), rel=1e-5), folder.name


def test_a_model_without_blocks_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"accelerator.activation_checkpointing: Linear has no repeated blocks"):
        save_memory(torch.nn.Linear(2, 2), AcceleratorSection(activation_checkpointing="full"))


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # torch, compiling
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_compiled_is_the_same_run(make_config: MakeConfig, what: str) -> None:
    (plain,) = run_all(1, [make_config("run.name=plain", *FEW)])
    for name in ("single", "ddp", "fsdp", "deepspeed-2", "deepspeed-3"):
        (folder,) = run_all(1, [make_config(f"run.name={name}", *BACKENDS[name], f"accelerator.compile={what}", *FEW)])
        assert losses(folder) == pytest.approx(losses(plain), rel=1e-5), name


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # torch, compiling
def test_blocks_are_compiled_once_for_all_widths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of several widths, also one that equals the hidden size, with packed documents; the results are eager's."""
    from torch._dynamo.testing import CompileCounter

    counter, original = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "own"))
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **given: original(self, backend=counter, fullgraph=True, **given)
    )
    monkeypatch.setattr(torch.fx.experimental._config, "use_duck_shape", True)
    torch._dynamo.reset()
    plain, model = (build_model(ModelSection(config=LLAMA), byte_tokenizer(), 64, 0) for _ in range(2))
    save_memory(model, AcceleratorSection(compile="blocks"), str(tmp_path))
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "own")
    for rows, width in ((2, 32), (2, 24), (3, 48), (2, 64)):
        ids = torch.randint(0, 250, (rows, width))
        positions = torch.arange(width // 2).repeat(2).expand(rows, width)
        found, expected = (m(ids, ids, positions).nll_sum for m in (model, plain))
        found.backward()
        torch.testing.assert_close(found, expected)
        assert counter.frame_count == 1, width


@pytest.mark.parametrize("imported", [False, True], ids=["unset", "set by inductor"])
def test_compiled_code_is_kept_in_the_data_cache(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig, tmp_path: Path, imported: bool
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv(CACHE_VARIABLE, "")  # so that the original value is restored
    monkeypatch.delenv(CACHE_VARIABLE)
    if imported:
        cache_dir()
        assert CACHE_VARIABLE in os.environ
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: None)
    config = make_config("accelerator.compile=blocks", f"data.cache={tmp_path}")
    accelerator = resolve("accelerators", "single", "accelerator.name")(config)
    accelerator.setup()
    model = build_model(ModelSection(config=LLAMA), byte_tokenizer(), 64, 0)
    accelerator.prepare(model, OptimizerManager(model, config).build, SchedulerManager(config=config).build)
    assert os.environ[CACHE_VARIABLE] == str(tmp_path / "compiled")


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig) -> None:
    monkeypatch.setattr(memory, "cpp_compiler", lambda: None)
    accelerator = resolve("accelerators", "single", "accelerator.name")(make_config("accelerator.compile=blocks"))
    with pytest.raises(ConfigError, match=r"accelerator\.compile=blocks: torch\.compile needs a C\+\+ compiler"):
        accelerator.check()
    resolve("accelerators", "single", "accelerator.name")(make_config()).check()


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_code(tmp_path: Path) -> None:
    """Its first step compiles nothing: everything is in the cache of the first process."""
    import subprocess
    import sys

    program = """
import json, sys, time
import torch
from torch._dynamo.utils import counters
from myllm_ray.accelerators.memory import save_memory
from myllm_ray.config.sections import AcceleratorSection, ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.load import build_model
config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
model = build_model(ModelSection(config=config), byte_tokenizer(), 64, 0)
save_memory(model, AcceleratorSection(compile="blocks"), sys.argv[1])
ids = torch.ones(2, 48, dtype=torch.int64)
begun = time.perf_counter()
model(ids, ids, torch.arange(48).expand(2, 48)).nll_sum.backward()
seconds = time.perf_counter() - begun
found = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps({"seconds": seconds, **{k: v for k, v in found.items() if "cache" in k}}))
"""
    environment = {k: v for k, v in os.environ.items() if k != CACHE_VARIABLE}
    first, second = (
        json.loads(
            subprocess.run(
                [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    print(first, second)
    assert first["fxgraph_cache_miss"] > 0
    assert second["fxgraph_cache_hit"] == first["fxgraph_cache_miss"]
    assert "fxgraph_cache_miss" not in second
    assert first["autograd_cache_miss"] == second["autograd_cache_hit"] == 1, "a block is traced once"
    assert "autograd_cache_miss" not in second
    assert second["seconds"] < first["seconds"] / 2


MODELS: dict[str, dict[str, Any]] = {
    "llama": {"pad_token_id": 3},
    "qwen3": {},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 2},
}


@pytest.mark.parametrize("name", [*MODELS, "gpt2", "mamba"])
def test_weights_made_one_by_one_are_initialised_as_transformers_would(name: str) -> None:
    """The distribution of each tensor equals that of transformers' initialisation; buffers are equal."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "model_type": name,
        **(
            GPT2
            if name == "gpt2"
            else {"hidden_size": 64, "num_hidden_layers": 2}
            if name == "mamba"
            else {**sizes, **MODELS[name]}
        ),
    }
    attention: Any = "eager" if name == "mamba" else "sdpa"
    model = build_model(ModelSection(config=config, attention=attention), byte_tokenizer(), 64, 0)
    torch.manual_seed(0)
    usual = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, "vocab_size": 260}), dtype=torch.float32)
    wanted = dict(usual.named_parameters())
    for key, tensor in model.model.named_parameters():
        mean, std = wanted[key].mean().item(), wanted[key].std().item() if wanted[key].numel() > 1 else 0.0
        assert tensor.mean().item() == pytest.approx(mean, abs=0.2 * std + 1e-6), key
        assert tensor.std().item() == pytest.approx(std, rel=0.25, abs=1e-6), key
    for key, buffer in usual.named_buffers():
        assert torch.equal(dict(model.model.named_buffers())[key], buffer), key
    if name == "llama":
        assert not model.model.get_input_embeddings().weight[3].any(), "the row of the padding token is zero"


def test_random_weights_are_a_function_of_seed_and_name() -> None:
    def weights(seed: int, layers: int) -> dict[str, torch.Tensor]:
        section = ModelSection(config={**GPT2, "n_layer": layers})
        return {n: p.detach() for n, p in build_model(section, byte_tokenizer(), 64, seed).named_parameters()}

    one, again, longer, other = weights(0, 2), weights(0, 2), weights(0, 3), weights(1, 2)
    name = "model.transformer.h.1.attn.c_attn.weight"
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert torch.equal(one[name], longer[name])
    assert not torch.equal(one[name], other[name])
    assert not torch.equal(one[name], one["model.transformer.h.0.attn.c_attn.weight"])


def test_weights_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    """Reads a folder of several safetensors files, and one with other tensor names (GPT-2's base model)."""
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_key_value_heads": 2,
    }
    for config in (llama, GPT2):
        made = build_model(ModelSection(config=config), byte_tokenizer(), 64, 5)
        folder = tmp_path / str(config["model_type"])
        (made.model.base_model if config is GPT2 else made.model).save_pretrained(folder, max_shard_size="20KB")
        section = ModelSection(name=str(folder))
        assert source_of(build_deferred(section, byte_tokenizer(), 64, 0)) is not None
        read = build_model(section, byte_tokenizer(), 64, 0)
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            assert torch.equal(read.get_parameter(name) if "inv_freq" not in name else read.get_buffer(name), tensor), (
                name
            )


M_MMAP_THRESHOLD = -3  # malloc.h
WIDE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
}


def limited(rank: int, world: int, store: str, section: dict[str, Any], out: str) -> None:
    """Builds a model of 255 MB under a limit of 0.75 times its size above the memory that the process holds."""
    torch.set_num_threads(1)
    # Large tensors return to the system when they are freed. Otherwise what glibc's heap keeps depends on what the
    # process did before.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 64 * 1024)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    config = {"accelerator": section, "optimizer": {"name": "sgd"}}
    accelerator: Accelerator = resolve("accelerators", section["name"], "name")(config)
    accelerator.setup()
    model = build_deferred(ModelSection(config=WIDE), byte_tokenizer(), 64, 0)
    size = sum(p.numel() * 4 for p in model.parameters())
    held = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmData")
    )
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(0.75 * size), resource.RLIM_INFINITY))
    if hasattr(accelerator, "deepspeed"):  # the limit is for building the model; ZeRO's optimizer buffers are extra
        initialize = accelerator.deepspeed.initialize

        def unlimited(**arguments: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return initialize(**arguments)

        accelerator.deepspeed.initialize = unlimited
    try:
        accelerator.prepare(model, OptimizerManager(model, config).build, SchedulerManager(config=config).build)
        result = "built"
    except (MemoryError, RuntimeError) as error:
        result = "too large" if "alloc" in str(error) or isinstance(error, MemoryError) else str(error)
    Path(f"{out}-{rank}").write_text(result)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "expected"), [("ddp", "too large"), ("fsdp", "built"), ("deepspeed-3", "built")])
def test_a_model_larger_than_a_workers_memory_is_built(tmp_path: Path, name: str, expected: str) -> None:
    section = {"name": name.split("-")[0], **({"stage": 3} if "-" in name else {})}
    start_processes(limited, (2, str(tmp_path / "store"), section, str(tmp_path / "out")), 2)
    assert {(tmp_path / f"out-{rank}").read_text() for rank in range(2)} == {expected}
