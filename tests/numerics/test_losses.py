"""The losses, compared with slow reference implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.common.types import IGNORE, shifted_targets
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits, linear_cross_entropy
from myllm_ray.trainers.causal_lm import token_losses
from myllm_ray.trainers.sft import SFTTrainer

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}


def tiny(model_type: str, vocab: int = 50) -> CausalLM:
    torch.manual_seed(0)
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": vocab,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model_type != "gpt2":
        common["intermediate_size"] = 64
    config = AutoConfig.for_model(model_type, **common, **SHAPES[model_type])
    return CausalLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).train()


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Returns -Σ log softmax(W h_t)[x_t], computed token by token from the definition."""
    total = torch.zeros((), dtype=hidden.dtype)
    for b in range(hidden.shape[0]):
        for s in range(hidden.shape[1]):
            if targets[b, s] == IGNORE:
                continue
            logits = weight @ hidden[b, s]
            total = total - (logits[targets[b, s]] - torch.log(torch.exp(logits).sum()))
    return total


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_fused_head_equals_the_definition(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, IGNORE, 3, 6, 0], [IGNORE, IGNORE, 2, 5, IGNORE]])
    expected = torch.autograd.grad(3 * reference(hidden, weight, targets), (hidden, weight))
    losses = linear_cross_entropy(hidden, weight, targets, chunk)
    found = torch.autograd.grad(3 * losses.nll_sum, (hidden, weight))
    torch.testing.assert_close(losses.nll_sum, reference(hidden, weight, targets), atol=1e-10, rtol=1e-10)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert losses.nll.shape == losses.correct.shape == (6,)


def test_fused_head_without_targets_has_zero_gradients() -> None:
    hidden, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.full((1, 3), IGNORE))
    losses.nll_sum.backward()
    assert losses.nll_sum == 0
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() == 0


def test_positions_without_loss_have_no_influence() -> None:
    """NaN in the hidden states of positions without a target changes nothing."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4, 3), torch.randn(5, 3, requires_grad=True)
    targets = torch.tensor([[2, IGNORE, 4, IGNORE]])
    clean = linear_cross_entropy(hidden, weight, targets).nll_sum
    hidden[0, 1] = float("nan")
    assert torch.equal(linear_cross_entropy(hidden, weight, targets).nll_sum, clean)


@pytest.mark.parametrize("model_type", SHAPES)
def test_fused_model_equals_the_models_own_logits(model_type: str) -> None:
    model = tiny(model_type)
    assert model.fused
    ids = torch.randint(0, 50, (2, 9))
    position_ids = torch.arange(9).expand(2, 9)
    fused = model(ids, ids, position_ids)
    logits = model.model(input_ids=ids, position_ids=position_ids, use_cache=False).logits
    plain = cross_entropy_from_logits(logits, shifted_targets(ids))
    torch.testing.assert_close(fused.nll, plain.nll, atol=1e-5, rtol=1e-5)
    assert torch.equal(fused.correct, plain.correct)


@pytest.mark.parametrize("model_type", SHAPES)
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    """The loss of each document in a packed row equals its loss alone, and so do the gradients of the sum."""
    model = tiny(model_type)
    torch.manual_seed(1)
    documents = [torch.randint(0, 50, (n,)) for n in (11, 3, 17, 6)]
    width = 24
    rows = [documents[:2], documents[2:]]
    ids = torch.zeros(2, width, dtype=torch.long)
    labels = torch.full((2, width), IGNORE)
    positions = torch.zeros(2, width, dtype=torch.long)
    for r, row in enumerate(rows):
        at = 0
        for document in row:
            part = slice(at, at + len(document))
            ids[r, part], positions[r, part] = document, torch.arange(len(document))
            labels[r, part] = document
            labels[r, at] = IGNORE
            at += len(document)
        positions[r, at:] = torch.arange(width - at)
    packed = model(ids, labels, positions)
    packed_grads = torch.autograd.grad(packed.nll_sum, list(model.parameters()))
    alone = [model(d[None], d[None], torch.arange(len(d))[None]) for d in documents]
    torch.testing.assert_close(packed.nll, torch.cat([a.nll for a in alone]), atol=1e-5, rtol=1e-5)
    total = torch.stack([a.nll_sum for a in alone]).sum()
    for a, b in zip(packed_grads, torch.autograd.grad(total, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_metrics_by_hand() -> None:
    """Two sources with known probabilities: loss per source, accuracy, bits per byte and perplexity."""

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            logits = torch.log(torch.tensor([0.5, 0.25, 0.25])).expand(*input_ids.shape, 3)
            return logits + 0 * input_ids[..., None]

    trainer = SFTTrainer(Fixed(), bytes_per_token=[1, 2, 4], sources=["a", "b"])
    micro = {
        "input_ids": torch.tensor([[0, 0, 1, 2]]),
        "labels": torch.tensor([[0, 0, 1, 2]]),
        "source_ids": torch.tensor([[0, 0, 1, 1]]),
    }
    output = trainer.train_step(micro)
    values = {name: float(total) / float(weight) for name, (total, weight) in output.metrics.items()}
    assert float(output.loss_sum) == pytest.approx(math.log(2) + 2 * math.log(4))
    assert float(trainer.batch_weight(micro)) == 3
    assert values["loss/a"] == pytest.approx(
        1.5 * math.log(2)
    )  # the targets of source a's two positions: tokens 0 and 1
    assert values["loss/b"] == pytest.approx(math.log(4))
    assert values["token_accuracy"] == pytest.approx(1 / 3)
    assert values["bits_per_byte"] == pytest.approx(5 / 7)
    assert trainer.derived_metrics({"loss": math.log(2)})["perplexity"] == pytest.approx(2)


def test_a_plain_module_is_called_with_what_it_takes() -> None:
    class OnlyIds(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return torch.zeros(*input_ids.shape, 4)

    micro = {
        "input_ids": torch.tensor([[1, 2]]),
        "labels": torch.tensor([[1, 2]]),
        "position_ids": torch.tensor([[0, 1]]),
    }
    assert float(token_losses(OnlyIds(), micro).nll_sum) == pytest.approx(math.log(4))
