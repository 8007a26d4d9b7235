"""PPO and GRPO against references that are written token by token from the papers, in fp64.

Also GAE against values worked by hand, and the invariance to the micro-batch size.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from rl_helpers import (
    END,
    LONGEST,
    TEMPERATURE,
    ZERO,
    Given,
    Scripted,
    assert_close,
    cut,
    entropies,
    gradients,
    log_prob,
    loss_of,
    made_up,
    shaken,
    tiny,
)
from torch import Tensor

from myllm_ray.config.sections import Section
from myllm_ray.ops.advantages import gae, kl_estimate, token_mask, whiten
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.ppo import PPOTrainer


def test_gae_against_a_table_worked_by_hand() -> None:
    """γ = 0.9, λ = 0.5. First answer, three tokens: r = 1, 0, 2; V = 0.5, 1, -1. Second: one token, r = 3, V = 1.

    δ: 1 + 0.9·1 - 0.5 = 1.4;  0 + 0.9·(-1) - 1 = -1.9;  2 + 0 + 1 = 3
    A: 3;  -1.9 + 0.45·3 = -0.55;  1.4 + 0.45·(-0.55) = 1.1525
    G: A + V = 1.6525, 0.45, 2
    """
    nan = math.nan  # after the end of the second answer
    found = gae(
        torch.tensor([[1.0, 0, 2], [3, nan, nan]]),
        torch.tensor([[0.5, 1, -1], [1, nan, nan]]),
        torch.tensor([3, 1]),
        0.9,
        0.5,
    )
    assert found.advantages.tolist() == [pytest.approx([1.1525, -0.55, 3]), pytest.approx([2, 0, 0])]
    assert found.returns.tolist() == [pytest.approx([1.6525, 0.45, 2]), pytest.approx([3, 0, 0])]


def test_whitening_does_not_depend_on_the_micro_batch_size() -> None:
    grid, lengths = torch.randn(6, 5, dtype=torch.float64) * 3 + 1, torch.tensor([5, 1, 3, 2, 4, 5])
    mask = token_mask(lengths, 5)
    (whole,) = whiten([grid], [mask])
    assert float(whole[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whole[mask].var()) == pytest.approx(1, abs=1e-6)
    for at in (1, 2, 4):
        parts = whiten([grid[:at], grid[at:]], [mask[:at], mask[at:]])
        assert torch.allclose(torch.cat(parts), whole, atol=1e-12)


def test_kl_estimates() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_estimate(policy, reference, "k1").tolist() == [0.5, -1.0]
    assert kl_estimate(policy, reference, "k2").tolist() == [0.125, 0.5]
    assert kl_estimate(policy, reference, "k3").tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1])


GRPO_CASES: list[dict[str, Any]] = [
    {},
    {"loss": "dr_grpo", "scale_rewards": "none"},
    {"loss": "dapo", "clip_high": 0.05, "mask_truncated": True, "clip": 0.01},
    {"importance": "sequence", "clip": 0.003, "clip_high": 0.004},
    {"kl_weight": 0.1},
    {"kl_weight": 0.2, "kl_estimator": "k2"},
    {"scale_rewards": "batch", "kl_weight": 0.1, "kl_estimator": "k1"},
    {"entropy_weight": 0.3},
]


@pytest.mark.parametrize("size", [1, 4], ids=["cut", "whole"])
@pytest.mark.parametrize("settings", GRPO_CASES, ids=lambda k: "-".join(str(v) for v in k.values()) or "default")
def test_grpo(settings: dict[str, Any], size: int) -> None:
    check_grpo(settings, size)


def combinations(section: type[Section], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns every combination of a section's settings with finitely many values, read from the schema."""
    finite = {}
    for name, field in section.model_fields.items():
        if field.annotation is bool or get_origin(field.annotation) is Literal:
            finite[name] = [False, True] if field.annotation is bool else list(get_args(field.annotation))
    finite.pop("critic", None)  # a separate critic is another model: tests/contracts/test_enumeration.py
    return [{**fixed, **dict(zip(finite, parts, strict=True))} for parts in itertools.product(*finite.values())]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4], ids=["cut", "whole"])
def test_every_combination_of_grpo(size: int) -> None:
    for settings in combinations(GRPOTrainer.Config, {"kl_weight": 0.1, "clip": 0.01, "entropy_weight": 0.1}):
        check_grpo(settings, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6], ids=["cut", "whole"])
def test_every_combination_of_ppo(size: int) -> None:
    for settings in combinations(
        PPOTrainer.Config, {"kl_weight": 0.1, "clip": 0.01, "entropy_weight": 0.1, "missing_eos_penalty": 0.5}
    ):
        check_ppo(settings, size)


def check_grpo(settings: dict[str, Any], size: int) -> None:
    """Compares loss and gradients of the second step on a batch with the equations."""
    group = 3
    questions, answers, rewards = made_up(11, 4, group)
    policy, reference = tiny(7), tiny(8)
    old_policy = copy.deepcopy(policy)
    trainer = GRPOTrainer(
        policy,
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards)],
        group_size=group,
        epochs=2,
        reference=reference if settings.get("kl_weight") else None,
        **settings,
    )
    steps = trainer.optimizer_steps(cut(questions, size))
    next(steps)
    shaken(policy, 1)
    found_loss = loss_of(trainer, next(steps))
    found = gradients(found_loss, policy)

    low, high = 1 - settings.get("clip", 0.2), 1 + settings.get("clip_high", settings.get("clip", 0.2))
    loss_kind = settings.get("loss", "grpo")
    overall = torch.tensor(rewards, dtype=torch.float64).std().item()
    total, tokens = ZERO, 0
    for i, answer in enumerate(answers):
        prompt, own = questions[i // group], rewards[i // group * group : i // group * group + group]
        mean = sum(own) / group
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / (group - 1))
        scale = {"group": deviation + 1e-4, "batch": overall + 1e-4, "none": 1.0}[
            settings.get("scale_rewards", "group")
        ]
        advantage = (rewards[i] - mean) / scale
        if settings.get("mask_truncated") and answer[-1] != END:
            continue
        new = log_prob(policy, prompt, answer, TEMPERATURE)
        with torch.no_grad():
            old, ref = (
                log_prob(old_policy, prompt, answer, TEMPERATURE),
                log_prob(reference, prompt, answer, TEMPERATURE),
            )
        entropy = entropies(policy, prompt, answer)
        mean_ratio = sum((n - o for n, o in zip(new, old, strict=True)), ZERO) / len(answer)
        own_total = ZERO
        for t in range(len(answer)):
            rho = torch.exp(mean_ratio if settings.get("importance") == "sequence" else new[t] - old[t])
            term = -torch.min(rho * advantage, torch.clamp(rho, low, high) * advantage)
            log_ratio = new[t] - ref[t]
            kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[
                settings.get("kl_estimator", "k3")
            ]
            own_total = (
                own_total
                + term
                + settings.get("kl_weight", 0.0) * kl
                - settings.get("entropy_weight", 0.0) * entropy[t]
            )
        total = total + (own_total / len(answer) if loss_kind == "grpo" else own_total)
        tokens += len(answer)
    wanted_loss = total / {"grpo": len(answers), "dapo": max(1, tokens), "dr_grpo": len(answers) * LONGEST}[loss_kind]
    wanted = gradients(wanted_loss, policy)
    assert found_loss.item() == pytest.approx(wanted_loss.item(), abs=1e-8)
    assert_close(found, wanted)


def test_grpo_with_one_step_has_ratio_one_and_its_gradient() -> None:
    questions, answers, rewards = made_up(12, 2, 3)
    losses = []
    for epochs in (1, 2):
        policy = tiny(9)
        trainer = GRPOTrainer(
            policy, sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], group_size=3, epochs=epochs
        )
        micros = next(trainer.optimizer_steps(cut(questions, 2)))
        assert ("old_log_probs" in micros[0]) == (epochs == 2)
        losses.append(gradients(loss_of(trainer, micros), policy))
    assert_close(losses[0], losses[1])


PPO_CASES: list[dict[str, Any]] = [
    {},
    {"kl_weight": 0.3, "kl_estimator": "k3"},
    {"kl_weight": 0.2, "kl_in": "loss", "kl_estimator": "k2"},
    {"kl_weight": 0.0, "whiten": False, "discount": 0.9, "gae_lambda": 0.5, "value_clip": None},
    {"clip": 0.01, "value_clip": 0.01, "entropy_weight": 0.2, "value_weight": 0.7, "missing_eos_penalty": 0.5},
]


@pytest.mark.parametrize("size", [1, 6], ids=["cut", "whole"])
@pytest.mark.parametrize("settings", PPO_CASES, ids=lambda k: "-".join(str(v) for v in k.values()) or "default")
def test_ppo(settings: dict[str, Any], size: int) -> None:
    check_ppo(settings, size)


def check_ppo(settings: dict[str, Any], size: int) -> None:
    """Compares loss and gradients of the second step on a batch with the equations."""
    questions, answers, rewards = made_up(13, 6, 1)
    policy, reference = tiny(14, "actor_critic"), tiny(15)
    with torch.no_grad():
        policy.value.weight.normal_(0, 0.3)
    old_policy, weight = copy.deepcopy(policy), settings.get("kl_weight", 0.05)
    trainer = PPOTrainer(
        policy,
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards)],
        epochs=2,
        reference=reference if weight else None,
        **settings,
    )
    steps = trainer.optimizer_steps(cut(questions, size))
    next(steps)
    shaken(policy, 2)
    found_loss = loss_of(trainer, next(steps))
    found = gradients(found_loss, policy)

    def values(model: Any, prompt: list[int], answer: list[int]) -> list[Tensor]:
        hidden = model.model.base_model(input_ids=torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
        return [model.value(hidden[len(prompt) - 1 + t])[0] for t in range(len(answer))]

    def kl(log_ratio: Any) -> Any:
        return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[
            settings.get("kl_estimator", "k1")
        ]

    discount, decay = settings.get("discount", 1.0), settings.get("gae_lambda", 0.95)
    episodes = []
    for prompt, answer, reward in zip(questions, answers, rewards, strict=True):
        with torch.no_grad():
            old, ref = (
                log_prob(old_policy, prompt, answer, TEMPERATURE),
                log_prob(reference, prompt, answer, TEMPERATURE),
            )
            old_values = values(old_policy, prompt, answer)
        score = reward - (settings.get("missing_eos_penalty", 0.0) if answer[-1] != END else 0.0)
        in_reward = weight if settings.get("kl_in", "reward") == "reward" else 0.0
        r = [-in_reward * float(kl(o - f)) for o, f in zip(old, ref, strict=True)]
        r[-1] += score
        advantages, following = [0.0] * len(answer), 0.0
        for t in reversed(range(len(answer))):
            after = float(old_values[t + 1]) if t + 1 < len(answer) else 0.0
            following = r[t] + discount * after - float(old_values[t]) + discount * decay * following
            advantages[t] = following
        returns = [a + float(v) for a, v in zip(advantages, old_values, strict=True)]
        episodes.append((prompt, answer, old, ref, old_values, advantages, returns))
    flat = torch.tensor([a for *_, advantages, _ in episodes for a in advantages], dtype=torch.float64)
    mean, deviation = (flat.mean().item(), flat.std().item() + 1e-8) if settings.get("whiten", True) else (0.0, 1.0)
    total = ZERO
    for prompt, answer, old, ref, old_values, advantages, returns in episodes:
        new, now, entropy = (
            log_prob(policy, prompt, answer, TEMPERATURE),
            values(policy, prompt, answer),
            entropies(policy, prompt, answer),
        )
        for t in range(len(answer)):
            rho, advantage, c = (
                torch.exp(new[t] - old[t]),
                (advantages[t] - mean) / deviation,
                settings.get("clip", 0.2),
            )
            term = -torch.min(rho * advantage, torch.clamp(rho, 1 - c, 1 + c) * advantage)
            error, v_clip = (now[t] - returns[t]) ** 2, settings.get("value_clip", 0.2)
            if v_clip is not None:
                error = torch.max(
                    error, (old_values[t] + torch.clamp(now[t] - old_values[t], -v_clip, v_clip) - returns[t]) ** 2
                )
            term = (
                term + settings.get("value_weight", 0.1) * error / 2 - settings.get("entropy_weight", 0.0) * entropy[t]
            )
            if weight and settings.get("kl_in") == "loss":
                term = term + weight * kl(new[t] - ref[t])
            total = total + term
    wanted_loss = total / len(flat)
    wanted = gradients(wanted_loss, policy)
    assert found_loss.item() == pytest.approx(wanted_loss.item(), abs=1e-8)
    assert_close(found, wanted)
