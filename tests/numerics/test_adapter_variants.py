"""Variants of LoRA: initial values, merging, full rank against full fine-tuning, selected layers, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch import nn
from transformers import AutoModelForCausalLM

from myllm_ray.config import ConfigError
from myllm_ray.config.lora_section import LoraSection
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model, build_skeleton
from myllm_ray.models.lora import add_adapters, fill_adapters
from myllm_ray.trained_model import open_run

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160}
UNTIED = {**LLAMA, "tie_word_embeddings": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True, "rslora": True},
    "gaussian": {"initialization": "gaussian"},
    "pissa": {"initialization": "pissa"},
    "pissa-dora": {"initialization": "pissa", "dora": True},
    "head": {"targets": ["q_proj", "lm_head"]},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj", "down_proj"], "layers": [1]},
}
SHORT = ("run.max_steps=3", "data.validation=null", "optimizer.lr=1e-2", "data.sequence_length=64")


def lora(**given: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 8, **given}


def build(config: dict[str, Any], section: dict[str, Any] | None, seed: int = 3, **model: Any) -> nn.Module:
    return build_model(
        ModelSection.model_validate({"config": config, "lora": section, **model}), byte_tokenizer(), 64, seed
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval().model(input_ids=torch.arange(24).view(2, 12)).logits
    return found


@pytest.mark.parametrize("config", [UNTIED, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("saved", "head")])
def test_a_new_adapter_changes_nothing_and_depends_on_seed_and_name(config: dict[str, Any], variant: str) -> None:
    section = lora(**VARIANTS[variant])
    torch.manual_seed(1)
    first, plain = build(config, section), build(config, None)
    torch.manual_seed(2)
    again = build(config, section)
    for name, parameter in first.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    # B = 0 gives the base exactly; PiSSA splits a weight into two summands.
    torch.testing.assert_close(logits(first), logits(plain), rtol=1e-4, atol=1e-5)
    other = build(config, section, seed=4)
    changed = [n for n, p in first.named_parameters() if ".lora_A." in n and torch.equal(other.get_parameter(n), p)]
    assert changed == []
    if "pissa" in variant:
        start = next(p for n, p in first.named_parameters() if ".lora_B." in n)
        assert start.abs().max() > 0


def test_pissa_finds_the_principal_part() -> None:
    """A weight of low rank is explained by its adapter; the frozen rest is zero. Compared with torch's exact SVD."""
    torch.manual_seed(0)
    weight = torch.randn(12, 3) @ torch.randn(3, 20)
    model = nn.Sequential(nn.Linear(20, 12, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    section = LoraSection.model_validate(lora(rank=3, alpha=6, initialization="pissa", targets=["0"]))
    add_adapters(model, section)
    fill_adapters(model, 0, section)
    layer: Any = model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    torch.testing.assert_close(layer.base_layer.weight, torch.zeros_like(weight), rtol=0, atol=1e-4)
    torch.testing.assert_close(2 * b @ a, weight, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(weight)[:3]
    torch.testing.assert_close(a.norm(dim=1) ** 2, values / 2, rtol=1e-4, atol=1e-4)
    assert all(float(row[row.abs().argmax()]) > 0 for row in a), "the signs are fixed"


def test_the_scale_and_the_magnitude_are_those_of_the_papers() -> None:
    """A slow reference for one layer, with B that is not zero."""
    torch.manual_seed(0)
    for options in ({}, {"rslora": True}, {"dora": True}):
        base = nn.Linear(6, 5)
        model = nn.Sequential(base)
        weight, bias, x = base.weight.detach().clone(), base.bias.detach().clone(), torch.randn(7, 6)
        section = LoraSection.model_validate(lora(targets=["0"], **options))
        add_adapters(model, section)
        fill_adapters(model, 0, section)
        layer: Any = model[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_()
            changed = weight + 8 / (math.sqrt(4) if "rslora" in options else 4) * (
                layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            )
            if "dora" in options:
                rows = [
                    weight[i].norm() * changed[i] / changed[i].norm() for i in range(5)
                ]  # arXiv:2402.09353, eq. 5, with the norm of each output
                changed = torch.stack(rows)
            torch.testing.assert_close(model(x), x @ changed.T + bias, rtol=1e-5, atol=1e-5)


def _least_squares(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(40, 6, generator=generator), torch.randn(40, 5, generator=generator)
    return x.double(), y.double(), torch.randn(5, 6, generator=generator).double()


def _adapted_layer(weight: torch.Tensor, rank: int) -> tuple[nn.Sequential, Any]:
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(weight)
    section = LoraSection.model_validate({"rank": rank, "alpha": rank, "targets": ["0"]})
    add_adapters(model, section)
    model.double()
    fill_adapters(model, 0, section)
    return model, model[0]


def test_full_rank_with_an_orthogonal_a_makes_the_steps_of_full_fine_tuning() -> None:
    """With s = 1 and A orthogonal and frozen, dL/dB = G Aᵀ, so a step of SGD changes B A by -lr G Aᵀ A = -lr G.

    This is the step of full fine-tuning: the trajectories are equal at every step.
    """
    x, y, weight = _least_squares()
    model, layer = _adapted_layer(weight, 6)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.linalg.qr(torch.randn(6, 6).double())[0])
    layer.lora_A["default"].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([layer.lora_B["default"].weight], lr=0.05)
    full = weight.clone()
    for _ in range(20):
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        gradient = 2 * (x @ full.T - y).T @ x / y.numel()  # the slow reference
        full -= 0.05 * gradient
        change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(layer.base_layer.weight + change, full, rtol=1e-10, atol=1e-12)


def test_full_rank_learns_the_function_of_full_fine_tuning() -> None:
    """With A and B trained, full rank reaches the minimum of least squares, which has a closed form; rank 1 does not.

    Every update is possible at full rank, so the minima over B A are those over the weight.
    """
    x, y, weight = _least_squares()
    best = torch.linalg.lstsq(x, y).solution.T
    apart = {}
    for rank in (5, 1):
        model, layer = _adapted_layer(weight, rank)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(trained, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

        def closure(model: nn.Module = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = ((model(x) - y) ** 2).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)
        change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        apart[rank] = float((layer.base_layer.weight + change - best).detach().abs().max())
    assert apart[5] < 1e-4
    assert apart[1] > 0.1


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        *(pytest.param(UNTIED, v, id=v, marks=[] if v in ("saved", "dora") else pytest.mark.promise) for v in VARIANTS),
        pytest.param(GPT2, "dora", id="gpt2-dora", marks=pytest.mark.promise),
        pytest.param(GPT2, "pissa-dora", id="gpt2-pissa-dora", marks=pytest.mark.promise),
    ],
)
def test_merged_equals_adapter(make_config: MakeConfig, tmp_path: Path, config: dict[str, Any], variant: str) -> None:
    """The run, a new stage that starts from it, and its export compute the same logits."""
    (folder,) = run_all(1, [make_config(*SHORT, model={"config": config, "lora": lora(**VARIANTS[variant])})])
    model, tokenizer = open_run(folder)
    wanted = logits(model)
    stage = build_model(ModelSection(name=str(folder)), byte_tokenizer(), 64, 0)
    torch.testing.assert_close(logits(stage), wanted, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in stage.named_parameters())
    assert not torch.allclose(logits(build(config, None, seed=0)), wanted, atol=1e-3), "the run changed something"
    save_pretrained(model, tokenizer, tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        exported = out(input_ids=torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(exported, wanted, rtol=1e-4, atol=1e-5)


EVERYWHERE = [*BACKENDS]


@pytest.mark.parametrize(
    ("variants", "backends"),
    [
        pytest.param(["dora", "saved"], ["ddp", "fsdp"], id="two", marks=pytest.mark.promise),
        pytest.param(["plain", "pissa", "dora", "saved"], EVERYWHERE[1:], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_backend_trains_the_same_adapters(
    make_config: MakeConfig, variants: list[str], backends: list[str]
) -> None:
    def config(variant: str, name: str) -> Any:
        overrides = (*SHORT, f"run.name={variant}-{name}", *BACKENDS[name], "batch.micro_size=1")
        return make_config(*overrides, model={"config": UNTIED, "lora": lora(**VARIANTS[variant])})

    plain = dict(zip(variants, run_all(1, [config(v, "single") for v in variants]), strict=True))
    pairs = [(v, b) for v in variants for b in backends]
    for (variant, backend), folder in zip(pairs, run_all(2, [config(v, b) for v, b in pairs]), strict=True):
        for row, other in zip(comparable(folder), comparable(plain[variant]), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), (variant, backend)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3), (variant, backend)


def test_selected_layers() -> None:
    def adapted(config: dict[str, Any] = UNTIED, **given: Any) -> set[str]:
        section = ModelSection.model_validate({"config": config, "lora": lora(**given)})
        skeleton = build_skeleton(section, byte_tokenizer(), 64)
        assert skeleton is not None
        names = {n for n, p in skeleton.named_parameters() if p.requires_grad}
        return {n.removeprefix("model.model.").partition(".lora_")[0] for n in names}

    both = {f"layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"}
    assert adapted(targets=["q_proj", "v_proj"]) == both
    assert adapted(targets=r".*self_attn\.[qv]_proj") == both
    assert adapted(targets=["q_proj", "v_proj"], layers=[1]) == {n for n in both if "layers.1" in n}
    assert adapted(targets=["q_proj", "v_proj", "k_proj"], exclude=["k_proj"]) == both
    assert adapted(exclude=r".*(mlp|[ko]_proj).*") == both
    assert len(adapted()) == 14
    # PEFT shortens long lists of names.
    some = adapted({**UNTIED, "num_hidden_layers": 12}, layers=[1, 10, 11])
    assert some == {n.replace("layers.1.", f"layers.{i}.") for n in adapted(layers=[1]) for i in (1, 10, 11)}
    assert len(some) == 21
    assert adapted(targets=["q_proj"], layers=[0], modules_to_save=["lm_head"]) == {
        "layers.0.self_attn.q_proj",
        "model.lm_head.weight",
    }


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            UNTIED,
            {"targets": ["q_proj", "query"]},
            "model.lora.targets: 'query' matches nothing; names look like",
        ),
        (UNTIED, {"targets": "q_proj"}, "model.lora.targets: the pattern 'q_proj' matches no name completely"),
        (UNTIED, {"targets": ["embed_tokens"]}, "model.lora.targets: 'embed_tokens' is a Embedding"),
        (UNTIED, {"exclude": ["router"]}, "model.lora.exclude: 'router' matches nothing"),
        (UNTIED, {"exclude": ".*"}, "model.lora: no layer is left to adapt"),
        (UNTIED, {"layers": [0, 2]}, "model.lora.layers: no targeted layer is in block 2; they are in 0 to 1"),
        (UNTIED, {"modules_to_save": ["wte"]}, "model.lora.modules_to_save: 'wte' matches nothing"),
        (
            UNTIED,
            {"modules_to_save": ["mlp"]},
            "and model.layers.0.mlp.gate_proj has an adapter",
        ),
        (LLAMA, {"targets": ["lm_head"]}, "lm_head shares its weight with model.embed_tokens"),
        (LLAMA, {"modules_to_save": ["lm_head"]}, "list both, [lm_head, embed_tokens], to train the shared weight"),
    ],
)
def test_what_can_not_be_adapted(config: dict[str, Any], given: dict[str, Any], message: str) -> None:
    section = ModelSection.model_validate({"config": config, "lora": lora(**given)})
    with pytest.raises(ConfigError) as caught:
        build_skeleton(section, byte_tokenizer(), 64)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tied_head_is_trained_with_its_embedding(make_config: MakeConfig, tmp_path: Path) -> None:
    section = lora(modules_to_save=["embed_tokens", "lm_head"])
    (folder,) = run_all(1, [make_config(*SHORT, model={"config": LLAMA, "lora": section})])
    model, tokenizer = open_run(folder)
    wanted, start = logits(model), build(LLAMA, None, seed=0)
    inner: Any = model.model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight
    assert not torch.equal(inner.lm_head.weight, start.get_parameter("model.model.embed_tokens.weight"))
    save_pretrained(model, tokenizer, tmp_path / "out")
    out = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(out(input_ids=torch.arange(24).view(2, 12)).logits, wanted, rtol=1e-4, atol=1e-5)


def test_patterns_of_the_config(make_config: MakeConfig) -> None:
    for override, message in (
        ("model.lora={targets: '(q_proj'}", "is not a regular expression"),
        ("model.lora={targets: []}", "targets is an empty list"),
        ("model.freeze=['*']", "is not a regular expression"),
        ("model.lora={initialization: eva}", "initialization"),
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            make_config(override)
    dpo = ("trainer=dpo", "data.train={source: brackets, format: preference}", "dpo.reference=adapter_off")
    for given in ("{modules_to_save: [embed_tokens]}", "{initialization: pissa}"):
        with pytest.raises(ConfigError, match="without its adapters, the model is not its base"):
            make_config(*dpo, f"model.lora={given}")
