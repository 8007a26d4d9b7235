"""Dropout does not depend on the micro-batch size: masks are a function of (seed, step, row), and random enough."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from myllm_ray import preparation
from myllm_ray.config import ConfigError, TrainerConfig
from myllm_ray.dependencies import model_section
from myllm_ray.ops import dropout
from myllm_ray.ops.dropout import RowDropout, StepDropout, checkpoint_contexts, dropped, find_dropout
from myllm_ray.worker import run_local

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2}
DROPPING = {**GPT2, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
PLAIN = {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FEW = (
    "run.max_steps=3",
    "data.validation=null",
    "checkpoint.at_end=false",
    "data.sequence_length=96",
    "optimizer.name=sgd",
    "optimizer.weight_decay=0",
    "run.overwrite=true",
)


def cut(make_config: MakeConfig, name: str, size: int, *overrides: str, **top: Any) -> TrainerConfig:
    return make_config(
        f"run.name={name}", f"batch.micro_size={size}", *FEW, *overrides, **{"model": {"config": DROPPING}, **top}
    )


def curve(folder: str | Path) -> list[float]:
    return [row[name] for row in comparable(folder) for name in ("loss", "grad_norm")]


def curves(
    make_config: MakeConfig, *overrides: str, sizes: tuple[int, ...] = (8, 2, 1), **top: Any
) -> list[list[float]]:
    return [curve(run_local(cut(make_config, f"micro-{size}", size, *overrides, **top))["folder"]) for size in sizes]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.attention=eager", "data.packing=false", "accelerator.activation_checkpointing=full"),
        pytest.param(("accelerator.activation_checkpointing=2",), marks=pytest.mark.slow),
        pytest.param(("accelerator.precision=bf16",), marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_do_not_depend_on_the_micro_batch_size(
    make_config: MakeConfig, overrides: tuple[str, ...]
) -> None:
    whole, *others = curves(make_config, *overrides, sizes=(8, 4, 2, 1) if not overrides else (8, 1))
    (without,) = curves(make_config, *overrides, sizes=(8,), model={"config": PLAIN})
    assert abs(whole[0] - without[0]) > 1e-3, "there is dropout"
    for other in others:
        assert other == pytest.approx(whole, rel=2e-2 if "accelerator.precision=bf16" in overrides else 1e-5)


def test_adapters_have_dropout_too(make_config: MakeConfig) -> None:
    """The second matrices of the adapters start at zero, and their gradients show the masks."""

    def run(p: float, *sizes: int) -> list[list[float]]:
        return curves(
            make_config, "optimizer.lr=1", sizes=sizes, model={"config": LLAMA, "lora": {"rank": 4, "dropout": p}}
        )

    whole, cut_up = run(0.2, 8, 1)
    assert cut_up == pytest.approx(whole, rel=1e-5)
    assert whole != pytest.approx(run(0.0, 8)[0], rel=1e-3)


@pytest.mark.parametrize("shared", ["never", pytest.param("auto", marks=pytest.mark.slow)])
def test_reward_models_drop_by_answer(make_config: MakeConfig, tmp_path: Path, shared: str) -> None:
    pairs = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 4), "rejected": "no " * (1 + i % 3)} for i in range(16)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    data = {
        "train": {"path": str(tmp_path / "pairs.json"), "format": "preference"},
        "sequence_length": 96,
        "cache": str(tmp_path / "cache"),
    }
    whole, *others = curves(make_config, f"reward.shared_prompt={shared}", trainer="reward", data=data, sizes=(8, 2, 1))
    for other in others:
        assert other == pytest.approx(whole, rel=1e-5)


@pytest.mark.promise
@pytest.mark.timeout(600)
def test_every_backend_and_number_of_workers(make_config: MakeConfig) -> None:
    expected = curve(run_all(1, [cut(make_config, "reference", 8)])[0])
    for world in (1, 2):
        runs = [
            cut(
                make_config,
                f"{name}-{world}-{size}-{every}",
                size,
                *BACKENDS[name],
                f"accelerator.activation_checkpointing={every}",
            )
            for name in BACKENDS
            if name != "single"
            for size, every in ((1, "none"), (2, "full"))
        ]
        for folder in run_all(world, runs):
            assert curve(folder) == pytest.approx(expected, rel=1e-5), folder.name


@pytest.mark.promise
def test_one_and_two_workers(make_config: MakeConfig) -> None:
    expected = curve(run_all(1, [cut(make_config, "one", 8)])[0])
    for folder in run_all(
        2, [cut(make_config, "two", 4, "accelerator.name=ddp"), cut(make_config, "four", 1, "accelerator.name=fsdp")]
    ):
        assert curve(folder) == pytest.approx(expected, rel=1e-5), folder.name


def test_compiled_dropout_is_refused_before_anything_is_written(make_config: MakeConfig) -> None:
    config = cut(make_config, "compiled", 2, "accelerator.compile=blocks")
    with pytest.raises(
        ConfigError, match=r"accelerator.compile=blocks: the model has dropout \(model.transformer.drop.p=0.1\)"
    ):
        run_local(config)
    assert not (Path(config.run.storage) / "compiled").exists()


def test_trainers_with_a_reference_say_that_they_use_no_dropout(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression test: `lora.dropout` stayed active in DPO, so policy and reference differed."""
    lines: list[str] = []
    monkeypatch.setattr(preparation.log, "warning", lambda text, *values: lines.append(text % values))
    model = {"config": {**LLAMA, "attention_dropout": 0.1}, "lora": {"rank": 4, "dropout": 0.2}}
    config = make_config(model=model, trainer="dpo")
    section = model_section(config)
    assert section.lora is not None
    assert (section.lora.dropout, (section.config or {})["attention_dropout"]) == (0.0, 0.0)
    preparation._warn_of_dropout(config)
    assert lines == [
        "model.config.attention_dropout=0.1, model.lora.dropout=0.2: not used, "
        "trainer dpo trains without dropout: it compares two passes of the model"
    ]
    preparation._warn_of_dropout(make_config(model=model))
    assert len(lines) == 1


# Tests of the dispatch mode without a trainer.

ROWS, WIDTH = 5, 7
X = torch.randn(ROWS, WIDTH, 8, generator=torch.Generator().manual_seed(0))


def forward(rows: slice, width: int, seed: int = 3) -> list[Tensor]:
    """Calls dropout as models do, on some rows of X truncated to a width."""
    x = X[rows, :width]
    with RowDropout(seed, torch.arange(ROWS)[rows], width):
        heads = x.view(len(x), width, 2, 4).transpose(1, 2)
        inplace = x.clone()
        nn.Dropout(0.2, inplace=True)(inplace)
        return [
            nn.Dropout(0.3)(x),
            torch.dropout(x, 0.3, True),
            functional.dropout(x.reshape(-1, 8), 0.3).view(x.shape),
            inplace,
            functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.4, is_causal=True)
            .transpose(1, 2)
            .flatten(2),
        ]


def test_the_masks_of_a_row_do_not_depend_on_other_rows() -> None:
    whole = forward(slice(0, ROWS), WIDTH)
    assert all((a != b).any() for a, b in pairwise(whole)), "each call has masks of its own"
    for rows, width in ((slice(2, 3), WIDTH), (slice(1, 4), WIDTH), (slice(0, ROWS), 4)):
        for found, expected in zip(forward(rows, width), whole, strict=True):
            torch.testing.assert_close(found, expected[rows, :width])


def test_attention_is_torchs_but_for_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers grouped heads, boolean and additive masks, causal attention, a scale, and a fully masked query.

    Dropout has a probability of almost zero here, so that nothing is dropped.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
    seen = torch.rand(2, 1, 6, 6, generator=generator) > 0.5
    seen[0, :, 2] = False
    for options in (
        {"attn_mask": seen},
        {"attn_mask": torch.where(seen | (torch.arange(6) == 0), 0.0, -9.0)},
        {"is_causal": True},
        {"scale": 0.7},
    ):
        expected = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)  # type: ignore[arg-type]
        with RowDropout(0, torch.arange(2)):
            found = functional.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, enable_gqa=True, **options)  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
        for a, b in zip(
            torch.autograd.grad(found.square().sum(), (q, k, v)),
            torch.autograd.grad(expected.square().sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_recomputation_draws_the_same_masks() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return functional.dropout(torch.tanh(functional.dropout(x @ weight, 0.3)), 0.2)

    def gradient(**options: Any) -> Tensor:
        with RowDropout(3, torch.arange(ROWS), WIDTH):
            y = block(functional.dropout(X, 0.1))
            y = checkpoint(block, y, use_reentrant=False, **options) if options else block(y)
            y = functional.dropout(y @ weight, 0.1)
        return torch.autograd.grad(y.square().sum(), weight)[0]

    assert torch.equal(gradient(context_fn=checkpoint_contexts), gradient())


def test_what_cannot_be_drawn_by_row_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers tensors without known rows, other kinds of dropout, and checkpointing by the model itself.

    The gradient under the model's own checkpointing stays correct.
    """
    lines: list[str] = []
    monkeypatch.setattr(dropout, "_reported", set())
    monkeypatch.setattr(dropout.log, "warning", lambda text, *values: lines.append(text % values))
    weight = torch.randn(8, 8, requires_grad=True)
    with RowDropout(3, torch.arange(ROWS), WIDTH):
        for size in (2, 3):
            functional.dropout(torch.randn(size, 8), 0.1)
        functional.dropout2d(torch.randn(ROWS, 2, 2, 2))
        inner = checkpoint(lambda x: functional.dropout(x @ weight, 0.5), X, use_reentrant=False)
    kept = (inner != 0).float()
    torch.testing.assert_close(
        torch.autograd.grad(inner.sum(), weight)[0], (X.flatten(0, 1).T @ kept.flatten(0, 1)) * 2
    )
    assert [line.split(":")[0] for line in lines] == [
        "dropout on a tensor whose rows can't be identified, of shape (2, 8) in a micro-batch of 5 rows",
        "dropout by dropout2d",
        "dropout inside built-in activation checkpointing (use accelerator.activation_checkpointing instead)",
    ]
    assert all("depends on batch.micro_size" in line for line in lines)


def test_modules_that_call_dropout_inside_torch_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression test: nn.MultiheadAttention and nn.LSTM drew masks per micro-batch without a warning."""
    lines: list[str] = []
    monkeypatch.setattr(dropout, "_reported", set())
    monkeypatch.setattr(dropout.log, "warning", lambda text, *values: lines.append(text % values))
    for p, training in ((0.0, True), (0.1, False), (0.1, True)):
        modules = [
            nn.MultiheadAttention(8, 2, dropout=p, batch_first=True),
            *(kind(8, 8, num_layers=2, dropout=p, batch_first=True) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
        ]
        with RowDropout(3, torch.arange(ROWS), WIDTH):
            for module in modules:
                module.train(training)(*[X] * (3 if isinstance(module, nn.MultiheadAttention) else 1))
        assert bool(lines) == (p > 0 and training), lines
    assert [line.split(":")[0] for line in lines] == [
        "dropout inside nn.MultiheadAttention (functional.scaled_dot_product_attention has masks by row)",
        *(f"dropout between the layers of {name}" for name in ("lstm", "gru", "rnn_tanh")),
    ]


def test_nothing_is_installed_for_a_model_without_dropout() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    def model(p: float) -> nn.Module:
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=8,
                n_layer=1,
                n_head=1,
                vocab_size=8,
                n_positions=8,
                resid_pdrop=0.0,
                embd_pdrop=p,
                attn_pdrop=0.0,
            )
        )

    assert find_dropout(model(0.0)) is None
    assert not StepDropout(model(0.0), 0).active
    assert find_dropout(model(0.1)) == "transformer.drop.p=0.1"
    assert StepDropout(model(0.1), 0).active
    assert StepDropout(nn.Linear(2, 2), 0).active, "a custom model may call functional.dropout"


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().float(), b.flatten().float()]))[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_random_enough(p: float) -> None:
    """Means and correlations are within five standard deviations of those of independent masks.

    Correlations are taken between neighbours in every direction, rows, calls and steps.
    """
    shape = (32, 64, 256)
    masks = {key: dropped(key, torch.arange(32), shape, p).float() for key in (1, 2, 2**32 + 1, 2**63 + 5)}
    one = masks[1]
    n = one.numel()
    assert abs(float(one.mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
    for dims, size in (((1, 2), 64 * 256), ((0, 2), 32 * 256), ((0, 1), 32 * 64)):
        spread = float(one.mean(dims).var()) / (p * (1 - p) / size)
        assert 0.5 < spread < 1.7, "each row, column and feature is dropped as often as chance has it"
    pairs = [(one, other) for key, other in masks.items() if key != 1]
    pairs += [
        (one.narrow(dim, 0, one.shape[dim] - straggler), one.narrow(dim, straggler, one.shape[dim] - straggler))
        for dim in range(3)
        for straggler in (1, 2, 8)
    ]
    assert max(abs(correlation(a, b)) for a, b in pairs) < 5 / (0.7 * n) ** 0.5
    # Products of the four corners of a rectangle: a mask that is a sum or product of a row word and a column word
    # fails this test.
    centred = one - p
    corners = centred[:, :-1, :-1] * centred[:, 1:, :-1] * centred[:, :-1, 1:] * centred[:, 1:, 1:]
    assert abs(float(corners.mean())) < 5 * (p * (1 - p)) ** 2 / corners.numel() ** 0.5
    words = (one[..., :256].view(-1, 8) * 2 ** torch.arange(8)).sum(1).long()
    ones = torch.tensor([bin(w).count("1") for w in range(256)])
    expected = len(words) * p**ones * (1 - p) ** (8 - ones)
    enough = expected > 5
    chi = (torch.bincount(words, minlength=256)[enough] - expected[enough]).square() / expected[enough]
    assert float(chi.sum()) < int(enough.sum()) + 5 * (2 * int(enough.sum())) ** 0.5, "runs of eight features"
