"""Reward models, DPO and its variants: losses and gradients against references, in fp64.

The references are written token by token from the papers.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from rl_helpers import VOCAB, assert_close, gradients, log_prob, pairs, tiny
from torch import Tensor

from myllm_ray.common.types import Batch, Micro, Position
from myllm_ray.trainers.dpo import DPOTrainer
from myllm_ray.trainers.reward import RewardTrainer

Row = tuple[list[int], list[int], list[int]]


def made_up_rows(seed: int, count: int = 5) -> list[Row]:
    made = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [made.randrange(3, VOCAB) for _ in range(made.randint(1, most))]

    return [(tokens(5), tokens(7), tokens(7)) for _ in range(count)]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def slow_loss(
    loss: str,
    chosen: list[Tensor],
    rejected: list[Tensor],
    ref_chosen: list[Tensor],
    ref_rejected: list[Tensor],
    k: dict[str, Any],
) -> Tensor:
    """Returns the loss of one pair from its token log-probabilities. Equations: see trainers/dpo.py."""
    zero = torch.zeros((), dtype=torch.float64)
    beta, eps = k.get("beta", 0.1), k.get("label_smoothing", 0.0)
    log_c, log_r = sum(chosen, zero), sum(rejected, zero)
    ref_c, ref_r = sum(ref_chosen, zero), sum(ref_rejected, zero)
    if loss == "ipo":  # means over tokens, as in its reference implementations
        delta = (log_c - ref_c) / len(chosen) - (log_r - ref_r) / len(rejected)
        return (delta - 1 / (2 * beta)) ** 2
    if loss in ("simpo", "orpo"):
        mean_c, mean_r = log_c / len(chosen), log_r / len(rejected)
        if loss == "simpo":
            inner = beta * mean_c - beta * mean_r - k.get("gamma", 0.5)
            return -(1 - eps) * torch.log(sigmoid(inner)) - eps * torch.log(sigmoid(-inner))
        p_c, p_r = torch.exp(mean_c), torch.exp(mean_r)
        odds_ratio = (p_c / (1 - p_c)) / (p_r / (1 - p_r))
        return -mean_c - beta * torch.log(sigmoid(torch.log(odds_ratio)))
    ratio_c, ratio_r = log_c - ref_c, log_r - ref_r
    if k.get("length_normalization"):
        ratio_c, ratio_r = ratio_c / len(chosen), ratio_r / len(rejected)
    inner = beta * ratio_c - beta * ratio_r
    if loss == "sigmoid":
        return -(1 - eps) * torch.log(sigmoid(inner)) - eps * torch.log(sigmoid(-inner))
    if loss == "robust":
        return (-(1 - eps) * torch.log(sigmoid(inner)) + eps * torch.log(sigmoid(-inner))) / (1 - 2 * eps)
    if loss == "hinge":
        return torch.clamp(1 - inner, min=0)
    if loss == "apo_zero":
        return (1 - sigmoid(beta * ratio_c)) + sigmoid(beta * ratio_r)
    assert loss == "apo_down"
    return sigmoid(beta * ratio_c) + (1 - sigmoid(inner))


CASES: list[dict[str, Any]] = [
    {"loss": "sigmoid"},
    {"loss": "sigmoid", "label_smoothing": 0.2, "beta": 0.5},
    {"loss": "robust", "label_smoothing": 0.1},
    {"loss": "sigmoid", "length_normalization": True, "beta": 1.3},
    {"loss": "ipo", "beta": 0.3},
    {"loss": "hinge", "beta": 0.4},
    {"loss": "simpo", "beta": 2.0, "gamma": 0.7},
    {"loss": "simpo", "beta": 2.0, "label_smoothing": 0.1},
    {"loss": "orpo", "beta": 0.6},
    {"loss": "apo_zero", "beta": 0.5},
    {"loss": "apo_down", "beta": 0.5},
]


def one_batch(trainer: Any, micros: list[Micro]) -> Tensor:
    """Returns the loss of a batch, computed as in the engine."""
    batch = Batch(micros, Position(), Position(), 0)
    (expanded,) = trainer.optimizer_steps(batch)
    weight = sum(trainer.batch_weight(m) for m in expanded)
    return sum((trainer.train_step(m).loss_sum for m in expanded), torch.zeros((), dtype=torch.float64)) / weight


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "two-rows"])
@pytest.mark.parametrize("settings", CASES, ids=lambda k: "-".join(str(v) for v in k.values()))
def test_pair_losses(settings: dict[str, Any], shared: bool) -> None:
    rows, policy, reference = made_up_rows(1), tiny(1), tiny(2)
    with torch.no_grad():
        refs = [(log_prob(reference, p, c), log_prob(reference, p, r)) for p, c, r in rows]
    losses = [
        slow_loss(settings["loss"], log_prob(policy, p, c), log_prob(policy, p, r), *ref, settings)
        for (p, c, r), ref in zip(rows, refs, strict=True)
    ]
    wanted_loss = sum(losses, torch.zeros((), dtype=torch.float64)) / len(rows)
    wanted = gradients(wanted_loss, policy)
    needs = DPOTrainer.Config(**settings).needs_reference
    trainer = DPOTrainer(policy, reference=reference if needs else None, shared_prompt=shared, **settings)
    filling: Row = ([], [], [])  # uneven micro-batches, with a fill row
    found_loss = one_batch(trainer, [pairs(rows[:3]), pairs([*rows[3:], filling])])
    assert found_loss.item() == pytest.approx(wanted_loss.item(), abs=1e-8)
    assert_close(gradients(found_loss, policy), wanted)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "two-rows"])
def test_tokens_are_those_that_are_trained_on(shared: bool) -> None:
    """Counts answer tokens, not prompt tokens; KTO counts the first answer only: the second measures divergence."""
    rows = made_up_rows(5)
    micro = pairs([*rows, ([], [], [])], {"desirable": [1.0] * 6, "divergence": [0.0] * 6, "margins": [0.0] * 6})
    both = sum(len(c) + len(r) for _, c, r in rows)
    for loss, wanted in (("sigmoid", both), ("orpo", both), ("kto", sum(len(c) for _, c, _ in rows))):
        trainer = DPOTrainer(tiny(6), reference=tiny(6), shared_prompt=shared, loss=loss)
        assert int(trainer.train_step(micro).metrics["tokens"][0]) == wanted, loss
    assert (
        int(RewardTrainer(tiny(6, "reward_model"), shared_prompt=shared).train_step(micro).metrics["tokens"][0]) == both
    )


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "two-rows"])
def test_kto(shared: bool) -> None:
    rows, policy, reference = made_up_rows(3), tiny(3), tiny(4)
    labels = [1.0, 0.0, 1.0, 1.0, 0.0]
    settings = {"loss": "kto", "beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    # In these rows the second answer belongs to another prompt.
    rows = [(p, a, rows[(i + 1) % len(rows)][1]) for i, (p, a, _) in enumerate(rows)]
    zero = torch.zeros((), dtype=torch.float64)

    def ratio(prompt: list[int], answer: list[int]) -> Tensor:
        with torch.no_grad():
            ref = sum(log_prob(reference, prompt, answer), zero)
        return sum(log_prob(policy, prompt, answer), zero) - ref

    divergence = max(0.0, sum(ratio(p, other).item() for p, _, other in rows) / len(rows))
    total = zero
    for (p, a, _), label in zip(rows, labels, strict=True):
        v = sigmoid(0.3 * (ratio(p, a) - divergence)) if label else sigmoid(0.3 * (divergence - ratio(p, a)))
        total = total + (1.2 if label else 0.8) * (1 - v)
    wanted_loss = total / len(rows)
    wanted = gradients(wanted_loss, policy)
    trainer = DPOTrainer(policy, reference=reference, shared_prompt=shared, **settings)
    extra = [{"desirable": labels[:2]}, {"desirable": labels[2:]}]
    found_loss = one_batch(trainer, [pairs(rows[:2], extra[0]), pairs(rows[2:], extra[1])])
    assert found_loss.item() == pytest.approx(wanted_loss.item(), abs=1e-8)
    assert_close(gradients(found_loss, policy), wanted)


@pytest.mark.parametrize("shared", [True, False], ids=["shared-prompt", "two-rows"])
@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_reward_model(shared: bool, centering: float) -> None:
    rows, model = made_up_rows(5), tiny(5, "reward_model")
    margins = [0.0, 0.5, 1.0, 0.0, 0.25]
    total = torch.zeros((), dtype=torch.float64)
    differences = []
    for (p, c, r), margin in zip(rows, margins, strict=True):
        score_c, score_r = (
            model.model.score(model.model.base_model(torch.tensor([p + a]), use_cache=False).last_hidden_state[0, -1])[
                0
            ]
            for a in (c, r)
        )
        total = total - torch.log(sigmoid(score_c - score_r - margin)) + centering * (score_c + score_r) ** 2
        differences.append((score_c - score_r).item())
    wanted = gradients(total / len(rows), model)
    trainer = RewardTrainer(model, shared_prompt=shared, centering=centering)
    micros = [
        pairs(rows[:3], {"margins": margins[:3]}),
        pairs([*rows[3:], ([], [], [])], {"margins": [*margins[3:], 0.0]}),
    ]
    found_loss = one_batch(trainer, micros)
    assert found_loss.item() == pytest.approx(total.item() / len(rows), abs=1e-8)
    assert_close(gradients(found_loss, model), wanted)
    outputs = [trainer.train_step(m).metrics for m in micros]
    summed = {name: sum(float(o[name][0]) for o in outputs) / 5 for name in outputs[0]}
    assert summed["accuracy"] == sum(d > 0 for d in differences) / 5
    confidence = [1 / (1 + math.exp(-abs(d))) for d in differences]
    gaps: dict[int, float] = {}
    for c, d in zip(confidence, differences, strict=True):
        number = min(9, int((c - 0.5) * 20))
        gaps[number] = gaps.get(number, 0.0) + (c - (d > 0)) / 5
    assert trainer.derived_metrics(summed)["calibration_error"] == pytest.approx(sum(map(abs, gaps.values())), abs=1e-6)


def test_the_answers_of_a_row_do_not_see_each_other() -> None:
    """Another rejected answer leaves the log-probability of the chosen answer unchanged, bit for bit."""
    policy = tiny(6)
    trainer = DPOTrainer(policy, loss="simpo", shared_prompt=True)
    prompt, chosen = [3, 4, 5], [6, 7, 8]
    with torch.no_grad():
        values = [
            trainer.log_probs(pairs([(prompt, chosen, rejected)]))[0][0, 0] for rejected in ([9, 10, 11], [12, 13, 14])
        ]
    assert torch.equal(*values)
