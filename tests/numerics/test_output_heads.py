"""Heads with a bias, a scale and a soft cap: the fused losses and scores, compared with autograd through the logits."""

from __future__ import annotations

import re
import sys
import warnings
from itertools import product
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.common.types import IGNORE
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.heads import ActorCritic
from myllm_ray.models.isolation import LONG, _small
from myllm_ray.models.output_head import find_change
from myllm_ray.ops.cross_entropy import linear_cross_entropy
from myllm_ray.ops.log_probs import linear_log_probs, log_probs_from_logits
from myllm_ray.ops.logits import LogitChange, head_outputs

CHANGES = [LogitChange(), LogitChange(scale=0.3), LogitChange(cap=2.0), LogitChange(scale=1.7, cap=3.0)]

MODELS: dict[str, tuple[dict[str, Any], LogitChange]] = {
    "gemma2": ({"final_logit_softcapping": 2.0}, LogitChange(cap=2.0)),
    "gemma3_text": ({"final_logit_softcapping": 3.0}, LogitChange(cap=3.0)),
    "cohere": ({"logit_scale": 0.25}, LogitChange(0.25)),
    "cohere2": ({"logit_scale": 2.5}, LogitChange(2.5)),
    "granite": ({"logits_scaling": 8.0}, LogitChange(1 / 8)),
    "granitemoe": ({"logits_scaling": 4.0, "num_local_experts": 2, "num_experts_per_tok": 1}, LogitChange(1 / 4)),
    "hyperclovax": ({"logits_scaling": 3.0}, LogitChange(3.0)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        LogitChange(0.5),
    ),
    "recurrent_gemma": ({"logits_soft_cap": 4.0, "lru_width": 32, "block_types": ["recurrent"]}, LogitChange(cap=4.0)),
    "gptj": ({"rotary_dim": 8}, LogitChange()),
    "phi": ({}, LogitChange()),
}
"""Settings of an architecture, and the change that its `forward` applies to the output of the head."""
BIASED = ("gptj", "phi")


def model_of(name: str, kind: type[CausalLM] = CausalLM) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=32,
        vocab_size=41,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **MODELS[name][0],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return kind(model)


def inputs_of(biased: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (7, 4), (7,)))
    targets = torch.tensor([[1, IGNORE, 3, 6, 0], [IGNORE, IGNORE, 2, 5, IGNORE]])
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_() if biased else None, targets


def equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], **tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"atol": 1e-10, "rtol": 1e-10}))


@pytest.mark.parametrize(("change", "biased", "chunk"), list(product(CHANGES, (False, True), (2, 512))))
def test_cross_entropy_equals_autograd(change: LogitChange, biased: bool, chunk: int) -> None:
    hidden, weight, bias, targets = inputs_of(biased)
    leaves = tuple(t for t in (hidden, weight, bias) if t is not None)
    logits = change.apply(torch.nn.functional.linear(hidden, weight, bias))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    losses = linear_cross_entropy(hidden, weight, targets, chunk, bias=bias, change=change)
    torch.testing.assert_close(losses.nll_sum, plain, atol=1e-10, rtol=1e-10)
    equal(torch.autograd.grad(3 * losses.nll_sum, leaves), torch.autograd.grad(3 * plain, leaves))
    with torch.no_grad():
        assert torch.equal(
            linear_cross_entropy(hidden, weight, targets, chunk, bias=bias, change=change).nll, losses.nll
        )


@pytest.mark.parametrize(
    ("change", "biased", "entropy", "temperature"), list(product(CHANGES, (False, True), (False, True), (1.0, 0.6)))
)
def test_scores_equal_autograd(change: LogitChange, biased: bool, entropy: bool, temperature: float) -> None:
    hidden, weight, bias, _ = inputs_of(biased)
    rows, targets = hidden.flatten(0, 1), torch.tensor([1, 0, 3, 6, 0, 2, 2, 5, 4, 1])
    leaves = tuple(t for t in (hidden, weight, bias) if t is not None)
    logits = change.apply(torch.nn.functional.linear(rows, weight, bias))
    plain = log_probs_from_logits(logits, targets, temperature, entropy)
    fused = linear_log_probs(rows, weight, targets, temperature, entropy, 3, bias, change)
    equal((fused.log_probs, fused.entropies), (plain.log_probs, plain.entropies))
    shares = torch.randn(2, len(targets), dtype=torch.float64)
    totals = [(s.log_probs * shares[0] + s.entropies * shares[1] * entropy).sum() for s in (fused, plain)]
    equal(torch.autograd.grad(totals[0], leaves), torch.autograd.grad(totals[1], leaves))


@pytest.mark.parametrize("name", MODELS)
def test_a_changed_head_is_fused_with_the_same_loss_and_gradients(name: str) -> None:
    model = model_of(name)
    assert model.fused
    assert model.logit_change == pytest.approx(MODELS[name][1])
    assert (model.head_bias is not None) == (name in BIASED)
    ids, positions = torch.randint(0, 41, (2, 9)), torch.arange(9).expand(2, 9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    logits = model.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    fused = model(ids, ids, positions)
    torch.testing.assert_close(fused.nll_sum, plain, rtol=1e-5, atol=1e-5)
    found, expected = (torch.autograd.grad(v, parameters, allow_unused=True) for v in (fused.nll_sum, plain))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-7)
    # The other two outputs: scores, and the logits of sampling.
    predictors = torch.arange(8)
    scores = model(ids[:1], position_ids=positions[:1], predictors=predictors, targets=ids[0, 1:], temperature=0.7)
    again = log_probs_from_logits(logits[0, :-1], ids[0, 1:], 0.7)
    torch.testing.assert_close(scores.log_probs, again.log_probs, rtol=1e-5, atol=1e-5)
    last = model.next_logits({"input_ids": ids, "position_ids": positions, "use_cache": False})
    torch.testing.assert_close(last, logits[:, -1], rtol=1e-5, atol=1e-5)


def test_the_policy_of_ppo_has_the_changed_head_too() -> None:
    model = model_of("gemma2", ActorCritic)
    ids = torch.randint(0, 41, (1, 9))
    predictors, positions = torch.arange(8), torch.arange(9)[None]
    scores = model(ids, position_ids=positions, predictors=predictors, targets=ids[0, 1:], entropy=True)
    logits = model.model(input_ids=ids, position_ids=positions, use_cache=False).logits
    plain = log_probs_from_logits(logits[0, :-1], ids[0, 1:], entropy=True)
    torch.testing.assert_close(scores.log_probs, plain.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropies, plain.entropies, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi"])
def test_the_change_is_found_without_weights_and_leaves_no_trace(name: str) -> None:
    model = model_of(name).model
    before = {k: set(m.__dict__) for k, m in model.named_modules()}
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(model.config)
        assert find_change(meta) == find_change(model) == pytest.approx(MODELS[name][1])
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == before


@pytest.mark.parametrize(
    "what", ["cut vocabulary", "layer before the head", "unknown function", "own bias", "embedding as head"]
)
def test_a_head_that_is_not_linear_is_not_fused(what: str) -> None:
    """The model's own logits are used, and the loss is theirs."""
    model = model_of("cohere").model
    forward, head = model.forward, model.lm_head

    def changed(**inputs: Any) -> Any:
        output = forward(**inputs)
        logits = output.logits
        output.logits = {
            "cut vocabulary": logits[..., :40],
            "unknown function": logits + logits.abs(),
            "own bias": logits + 1,
        }.get(what, logits)
        return output

    if what == "layer before the head":
        norm = torch.nn.LayerNorm(32)
        head.forward = lambda hidden: torch.nn.functional.linear(norm(hidden.float()), head.weight)
        model.get_output_embeddings = lambda: torch.nn.Sequential(norm, head)
    elif what == "embedding as head":
        model.get_output_embeddings = lambda: model.model.embed_tokens
    else:
        model.forward = changed
    wrapped = CausalLM(model)
    assert not wrapped.fused
    ids = torch.randint(0, 40, (1, 6))
    logits = model(input_ids=ids, use_cache=False).logits
    plain = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    torch.testing.assert_close(wrapped(ids, ids, torch.arange(6)[None]).nll_sum, plain, rtol=1e-5, atol=1e-5)


SETTING = re.compile(r"^(final_logit|output_logit|logits?_)|^lm_head_multiplier$")
"""Names of the config keys of all architectures of transformers that change logits."""


def causal_models() -> list[str]:
    sys.path.append(str(ROOT / "tests"))
    from models_table import all_names

    return all_names()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_fused_architecture_has_the_logits_of_its_own_forward() -> None:
    """All causal language models of transformers that can be built small, with every key that changes logits set."""
    from models_table import NEEDED, UNKNOWN, written

    checked, changed = 0, set()
    verdicts = written()
    for name in causal_models():
        if verdicts.get(name, UNKNOWN) == UNKNOWN:
            continue
        known = AutoConfig.for_model(name).to_dict()
        keys = [k for k, v in known.items() if SETTING.match(k) and (v is None or type(v) in (int, float))]
        config = {"model_type": name, **NEEDED.get(name, {}), **dict.fromkeys(keys, 3.0)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                wrapped: Any = _small(ModelSection(config=config, attention="eager"), "causal_lm", LONG)
            except Exception:  # the architecture does not accept the value
                continue
            if not wrapped.fused:
                continue
            if wrapped.head_bias is not None:
                torch.nn.init.normal_(wrapped.head_bias)
            inputs = {"input_ids": torch.randint(1, 30, (1, 8)), "position_ids": torch.arange(8)[None]}
            with torch.no_grad():
                logits = wrapped.model(**inputs, use_cache=False).logits[0]
                hidden = wrapped.hidden({**inputs, "use_cache": False})[0]
                fused = wrapped.logit_change.apply(head_outputs(hidden, wrapped.head, wrapped.head_bias))
        torch.testing.assert_close(fused, logits, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        checked += 1
        if wrapped.logit_change != LogitChange():
            changed.add(name)
    assert checked > 100
    assert {"gemma2", "gemma4_text", "vaultgemma", "cohere2_moe", "granitemoehybrid", "minicpm3", "xlstm"} <= changed
