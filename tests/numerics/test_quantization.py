"""QLoRA: equal to bitsandbytes, the same on every backend, merged into the weights that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from conftest import LLAMA, ROOT, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch import nn
from transformers import AutoModelForCausalLM

from myllm_ray.config import CheckpointError, ConfigError, TrainerConfig, load_config
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model
from myllm_ray.models.lora import merge_adapters
from myllm_ray.models.quantization import NF4Linear, quantize
from myllm_ray.trained_model import open_run
from myllm_ray.worker import run_local

CONFIGS = ROOT / "configs"
QLORA = ("model.lora={rank: 4, alpha: 8}", "model.quantize=nf4", "optimizer.lr=1e-2")


def quantized(layer: nn.Linear) -> NF4Linear:
    made = NF4Linear(layer)
    for name, value in quantize(layer.weight.data).items():
        assert getattr(made, name).shape == value.shape
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("shape", [(48, 96), (7, 5), (300, 130)])
def test_the_weight_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    peer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], quant_type="nf4", compress_statistics=True)
    peer.load_state_dict({"weight": layer.weight.data, "bias": layer.bias.data})
    peer.to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(peer.weight.data, peer.weight.quant_state)
    assert torch.equal(quantized(layer).weight, expected.float())


def test_the_gradient_is_that_of_the_dequantized_layer() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(96, 48))
    plain = nn.Linear(96, 48)
    plain.weight, plain.bias = nn.Parameter(layer.weight), layer.bias
    inputs = [torch.randn(3, 5, 96) for _ in range(2)]
    for precision in (torch.float32, torch.bfloat16):
        results = []
        for module in (layer, plain):
            x = [i.clone().requires_grad_() for i in inputs]
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                y = module(x[0]) + module(x[1])
            y.float().square().sum().backward()
            results.append((y.detach(), *(i.grad for i in x)))
        for found, expected in zip(*results, strict=True):
            assert found.dtype == expected.dtype
            scale = float(expected.abs().max())
            assert float((found - expected).abs().max()) <= (1e-6 if precision == torch.float32 else 2e-2) * scale


def test_the_weight_is_not_kept_for_the_backward_pass() -> None:
    layer, saved = quantized(nn.Linear(256, 256)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(2, 256, requires_grad=True)).sum()
    assert all(t.numel() < 256 * 256 for t in saved)


def test_another_dtype_does_not_change_the_weight() -> None:
    layer = quantized(nn.Linear(96, 48))
    before = layer.weight
    assert torch.equal(layer.to(torch.bfloat16).weight, before)


@pytest.mark.promise
def test_every_backend_trains_the_same_run(make_config: MakeConfig, tmp_path: Path) -> None:
    common = (*QLORA, "run.max_steps=4", "data.validation=null")
    single, plain = run_all(
        1, [make_config("run.name=single", *common), make_config("run.name=plain", *common, "model.quantize=null")]
    )
    # tests/contracts/test_features.py has the other backends.
    names = ("ddp", "fsdp", "deepspeed-2")
    for folder in run_all(2, [make_config(f"run.name={name}", *BACKENDS[name], *common) for name in names]):
        for row, other in zip(comparable(folder), comparable(single), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-5), folder.name
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), folder.name
    losses = [[row["loss"] for row in comparable(folder)] for folder in (single, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)

    model, tokenizer = open_run(single)
    assert any(isinstance(module, NF4Linear) for module in model.modules())
    ids = torch.arange(20).view(2, 10)
    model.eval()
    with torch.no_grad():
        before = model.model(input_ids=ids).logits  # type: ignore[union-attr, operator]
        save_pretrained(model, tokenizer, tmp_path / "out")
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes_with_the_same_weights(make_config: MakeConfig) -> None:
    common = (*QLORA, "data.validation=null", "checkpoint.keep_last=null", "checkpoint.every_steps=2")
    (whole,) = run_all(1, [make_config("run.name=whole", *common, "run.max_steps=4")])
    step = whole / "checkpoints" / "step-00000002"
    (rest,) = run_all(
        2, [make_config("run.name=rest", *common, "run.max_steps=4", f"checkpoint.resume={step}", *BACKENDS["fsdp"])]
    )
    for row, other in zip(comparable(rest), comparable(whole)[2:], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_new_run_starts_from_the_weights_that_were_trained(make_config: MakeConfig) -> None:
    """Its base is the quantized one with the adapters merged; a resume without the quantization is refused."""
    common = (*QLORA, "data.validation=null", "run.max_steps=2")
    (first,) = run_all(1, [make_config("run.name=first", *common)])
    trained, _ = open_run(first)
    merge_adapters(trained.model)  # type: ignore[arg-type]
    again: Any = build_model(ModelSection(name=str(first)), byte_tokenizer(), 64, 0)
    for name, parameter in trained.model.named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(again.model.get_parameter(name), parameter, rtol=1e-6, atol=1e-7)
    checkpoint = first / "checkpoints" / "step-00000002"
    with pytest.raises(CheckpointError, match=r"quantize"):
        run_local(make_config("run.name=b", *common, "model.quantize=null", f"checkpoint.resume={checkpoint}"))


def test_layers_that_are_trained_in_full_are_not_quantized() -> None:
    lora = {"rank": 2, "targets": ["q_proj"], "modules_to_save": ["down_proj"]}
    section = ModelSection.model_validate({"config": dict(LLAMA), "lora": lora, "quantize": "nf4"})
    model = build_model(section, byte_tokenizer(), 64, 0)
    kinds = {name.rpartition(".")[2]: type(m) for name, m in model.named_modules() if "layers.0." in name}
    assert kinds["down_proj"] is nn.Linear
    assert kinds["k_proj"] is kinds["base_layer"] is NF4Linear


def test_a_model_that_is_loaded_as_a_whole() -> None:
    mamba: dict[str, Any] = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}
    section = {"config": mamba, "attention": "eager", "lora": {"targets": ["in_proj"]}, "quantize": "nf4"}
    model = build_model(ModelSection.model_validate(section), byte_tokenizer(), 64, 0)
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    assert layers
    assert all(layer.weight.abs().sum() > 0 for layer in layers)


def test_bad_input(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"accelerator\.compile=blocks can't compile the layers of model\.quantize"):
        make_config(*QLORA, "accelerator.compile=blocks")
    with pytest.raises(ValueError, match=r"model\.quantize freezes the linear layers: add adapters"):
        ModelSection.model_validate({"config": dict(LLAMA), "quantize": "nf4"})
    for other in ({"dora": True}, {"initialization": "pissa"}):
        with pytest.raises(ValueError, match=r"model\.lora\.(dora|initialization: pissa) needs weights that are not"):
            ModelSection.model_validate({"config": dict(LLAMA), "lora": other, "quantize": "nf4"})
    gpt2 = {"config": {"model_type": "gpt2", "n_embd": 32, "n_head": 2, "n_layer": 1}, "lora": {}, "quantize": "nf4"}
    with pytest.raises(ConfigError, match=r"model\.quantize: GPT2LMHeadModel has no frozen nn\.Linear layers"):
        build_model(ModelSection.model_validate(gpt2), byte_tokenizer(), 64, 0)


@pytest.mark.parametrize(
    "trainer", ["dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("reward", "grpo", "ppo"))]
)
def test_every_trainer_trains_adapters_of_a_quantized_model(trainer: str, tmp_path: Path) -> None:
    """Two processes of fsdp and of deepspeed ZeRO-3 have the losses of one process."""

    def config(name: str, *overrides: str) -> TrainerConfig:
        given = (*QLORA, f"run={{name: {name}, storage: {tmp_path}, max_steps: 2}}", "callbacks=[jsonl]")
        reference = ("dpo.reference=adapter_off",) if trainer == "dpo" else ()
        return load_config(CONFIGS / f"tiny_{trainer}.yaml", [*given, *reference, "data.validation=null", *overrides])

    (single,) = run_all(1, [config("single")])
    names = ("fsdp", "deepspeed-3")
    for folder in run_all(2, [config(name, *BACKENDS[name]) for name in names]):
        for row, other in zip(comparable(folder), comparable(single), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-6), folder.name
    if trainer == "dpo":
        (copied,) = run_all(1, [config("copied", "dpo.reference=copy")])
        assert comparable(copied) == comparable(single)
