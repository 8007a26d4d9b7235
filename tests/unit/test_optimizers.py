"""Optimizers by name: Muon against a reference, the check of optimizers of other libraries, their state, LoRA+."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from myllm_ray.accelerators.optimizer_state import create_moments, group_numbers, load_group_numbers
from myllm_ray.config.errors import CheckpointError, ConfigError, UserError
from myllm_ray.engine.muon import Muon, orthogonalized
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.preparation import check_names


class Blocks(nn.Module):
    """An embedding, two blocks with a wide and a tall matrix, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 6)) for _ in range(2))
        self.experts = nn.Parameter(torch.randn(2, 6, 6))
        self.head = nn.Linear(6, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x + x @ self.experts.sum(0))


IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])


def gradients(model: nn.Module) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten()).backward()


def manager(model: nn.Module, **section: Any) -> OptimizerManager:
    return OptimizerManager(model, {"optimizer": section})


def by_hand(
    weight: np.ndarray, gradient: np.ndarray, buffer: np.ndarray, lr: float, decay: float, original: bool
) -> tuple[np.ndarray, np.ndarray]:
    """One step of Muon in fp64, written from the page of Jordan et al. and §2.2 of Liu et al."""
    buffer = 0.95 * buffer + 0.05 * gradient
    x = 0.05 * gradient + 0.95 * buffer
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * a @ x + 2.0315 * a @ a @ x
    rows, columns = weight.shape
    factor = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
    return weight * (1 - lr * decay) - lr * factor * x, buffer


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_muon_equals_the_reference(adjust: str) -> None:
    model, plain = Blocks(), Blocks()
    options = {"adjust_lr_fn": adjust, "adamw_lr": 0.02}
    optimizer = manager(model, name="muon", lr=0.05, weight_decay=0.1, betas=(0.8, 0.9), options=options).optimizer
    hidden = {n: p for n, p in plain.named_parameters() if n.startswith("layers") and p.dim() == 2}
    others = {n: p for n, p in plain.named_parameters() if n not in hidden}
    assert len(hidden) == 4
    assert {"table.weight", "head.weight", "experts"} <= others.keys()
    groups = [
        {"params": [p for p in others.values() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in others.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.8, 0.9))
    weights = {n: p.detach().double().numpy() for n, p in hidden.items()}
    buffers = {n: np.zeros_like(w) for n, w in weights.items()}
    for _ in range(3):
        gradients(model)
        optimizer.step()
        gradients(plain)
        adamw.step()
        for name, p in hidden.items():
            assert p.grad is not None
            weights[name], buffers[name] = by_hand(
                weights[name], p.grad.double().numpy(), buffers[name], 0.05, 0.1, adjust == "original"
            )
            p.data.copy_(torch.from_numpy(weights[name]))
        for name, p in plain.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=2e-5, msg=name)


def test_bf16_iterations_are_those_of_torch() -> None:
    model, other = nn.Linear(6, 10, bias=False), nn.Linear(6, 10, bias=False)
    other.load_state_dict(model.state_dict())
    ours = Muon([{"params": [model.weight], "use_muon": True}], lr=0.1, ns_dtype="bf16", adjust_lr_fn="original")
    torchs = torch.optim.Muon([other.weight], lr=0.1, weight_decay=0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        model.weight.grad = torch.randn(10, 6)
        other.weight.grad = model.weight.grad.clone()
        ours.step()
        torchs.step()
    torch.testing.assert_close(model.weight, other.weight, rtol=0, atol=5e-3)


def test_orthogonalized_has_singular_values_near_1() -> None:
    torch.manual_seed(0)
    for shape in ((8, 24), (24, 8)):
        values = torch.linalg.svdvals(orthogonalized(torch.randn(shape)))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_takes_patterns_and_the_rates_of_groups() -> None:
    model = Blocks()
    section: dict[str, Any] = {
        "lr": 1.0,
        "options": {"adamw_lr": 0.5, "matrices": r"layers\.\d\.0|head"},
        "groups": [{"pattern": r"layers\.0", "lr": 0.1}],
    }
    optimizer = manager(model, name="muon", **section).optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: (g["lr"], g["use_muon"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates["layers.0.0.weight"] == (0.1, True)
    assert rates["layers.0.2.weight"] == (0.1, False)
    assert rates["layers.1.0.weight"] == rates["head.weight"] == (1.0, True)
    assert rates["table.weight"] == rates["experts"] == (0.5, False)
    assert len(rates) == len(names)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "muon", "options": {"matrices": "nothing"}}, "'nothing' matches no trainable matrix"),
        ({"name": "muon", "options": {"matrices": "("}}, "is not a regular expression"),
        ({"name": "muon", "options": {"adamw_lr": "high"}}, "adamw_lr: must be a number above 0"),
        ({"name": "muon", "options": {"ns_dtype": "fp8"}}, "Muon does not accept its options: ns_dtype is"),
        ({"name": "muon", "options": {"nonsense": 1}}, "Muon does not accept its options"),
        ({"name": "muon", "momentum": 1.5}, "momentum must be in"),
        (
            {"name": "lion", "options": {"nonsense": 1}},
            "optimizer.options: Lion has no option nonsense; it takes betas",
        ),
        ({"name": "adamw", "groups": [{"pattern": "head", "options": {"bets": 1}}]}, "AdamW has no option bets"),
    ],
)
def test_options_that_do_not_exist(section: dict[str, Any], said: str) -> None:
    """A wrong key in the options of a group was ignored by torch."""
    with pytest.raises(ConfigError, match=said):
        manager(Blocks(), **section).build(Blocks())


def test_a_model_without_blocks_has_no_matrix_for_muon() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4))
    with pytest.raises(ConfigError, match="no trainable matrix in a repeated block: name the matrices"):
        manager(model, name="muon").build(model)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        UserError, match=r"optimizer.name=lion needs pytorch_optimizer: pip install 'myllm_ray\[optim\]'"
    ):
        manager(Blocks(), name="lion").build(Blocks())


class Normalized(torch.optim.Optimizer):
    """Not element-wise: the step depends on the norm of the whole tensor."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / float(p.grad.norm()))


class Forgetful(torch.optim.Optimizer):
    """Keeps its state in an attribute, which no checkpoint contains."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] / self.count * p.grad)


LAYOUTS = ("whole", "shards", "slices", "slices_by_group")
ACCEPTED: dict[str, tuple[str, ...]] = {
    "muon": ("whole", "shards"),
    "lion": LAYOUTS,
    "ademamix": ("whole", "shards", "slices"),
    "pytorch_optimizer:Lamb": ("whole",),
    "pytorch_optimizer:ADOPT": ("whole", "slices"),
    "pytorch_optimizer:Prodigy": (),
    "schedulefree:AdamWScheduleFree": (),
    "bitsandbytes.optim:AdamW8bit": (),
    "lbfgs": (),
    "test_optimizers:Normalized": ("whole",),
    "test_optimizers:Forgetful": (),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_optimizer_is_accepted_where_it_keeps_the_curve(name: str) -> None:
    for layout in LAYOUTS:
        if layout in ACCEPTED[name]:
            manager(Blocks(), name=name, weight_decay=0.1).check(layout)  # type: ignore[arg-type]
            continue
        with pytest.raises(ConfigError, match=f"optimizer.name={name}") as error:
            manager(Blocks(), name=name).check(layout)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "layout", "said"),
    [
        ("ademamix", "slices_by_group", "counts its steps in its parameter groups, .* use fsdp"),
        ("test_optimizers:Normalized", "slices", "needs whole tensors, but this backend passes flat slices"),
        ("test_optimizers:Normalized", "shards", "does not support sharded tensors|needs whole tensors"),
        ("test_optimizers:Forgetful", "whole", "a resumed run would differ from an uninterrupted one"),
        ("schedulefree:AdamWScheduleFree", "whole", "use another optimizer, with the section `ema`"),
        ("lbfgs", "whole", "fails in its first steps: .*closure"),
    ],
)
def test_the_reason_of_a_refusal(name: str, layout: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        manager(Blocks(), name=name).check(layout)


def test_the_check_finds_an_option_that_is_not_element_wise() -> None:
    """The options of a pattern are checked too: gradient centralization subtracts the mean of a row."""
    section = {"name": "pytorch_optimizer:Lion", "groups": [{"pattern": "head", "options": {"use_gc": True}}]}
    manager(Blocks(), **section).check("whole")
    with pytest.raises(ConfigError, match="needs whole tensors"):
        manager(Blocks(), **section).check("slices")


@pytest.mark.parametrize("name", ["lion", "ademamix", "muon", "adamw"])
def test_creating_the_moments_leaves_no_trace(name: str) -> None:
    """Regression: the step that creates the moments counted in `step` of a group, so bias corrections were off by 1."""
    plain, prepared = Blocks(), Blocks()
    first, second = (manager(m, name=name, lr=0.01, weight_decay=0.1).optimizer for m in (plain, prepared))
    create_moments(second)
    for _ in range(2):
        for model, optimizer in ((plain, first), (prepared, second)):
            gradients(model)
            optimizer.step()
    for name, p in plain.named_parameters():
        assert torch.equal(prepared.get_parameter(name), p), name
    assert group_numbers(first) == group_numbers(second)


def test_numbers_of_groups_are_saved_and_loaded() -> None:
    model = Blocks()
    optimizer = manager(model, name="ademamix", lr=0.01).optimizer
    for _ in range(3):
        gradients(model)
        optimizer.step()
    assert group_numbers(optimizer) == [{"step": 3}, {"step": 3}]
    fresh = manager(Blocks(), name="ademamix", lr=0.01).optimizer
    load_group_numbers(fresh, group_numbers(optimizer))
    assert [g["step"] for g in fresh.param_groups] == [3, 3]
    with pytest.raises(CheckpointError, match="1 parameter groups, this run has 2"):
        load_group_numbers(fresh, [{"step": 3}])
    assert group_numbers(manager(Blocks(), name="adamw").optimizer) == [{}, {}]


def test_lora_plus_is_a_pattern(make_config: Any) -> None:
    """LoRA+ (Hayou et al., 2024, arXiv:2402.12354) trains B with a higher learning rate than A."""
    from myllm_ray.data.tokenizer import byte_tokenizer
    from myllm_ray.models.load import build_model

    config = make_config(
        "model.lora={rank: 2, alpha: 4}", "optimizer={lr: 1.0e-4, groups: [{pattern: lora_B, lr: 1.6e-3}]}"
    )
    check_names(config)
    model = build_model(config.model, byte_tokenizer(), 32, 0)
    optimizer = OptimizerManager(model, config).optimizer
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1.6e-3}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1.0e-4}
    assert len(rates) == sum("lora_" in name for name in rates)
