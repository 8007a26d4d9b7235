"""PPO and GRPO against references written token by token from the papers, fp64; GAE by hand; invariance to the cut of a batch."""

from __future__ import annotations

import copy
import itertools
import math
import random
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from rl_helpers import END, VOCAB, Given, Scripted, assert_close, gradients, log_prob, prompts, tiny
from torch import Tensor

from myllm_ray.common.types import Batch, Micro, Position
from myllm_ray.config.errors import TrainingError
from myllm_ray.config.schema import Section
from myllm_ray.config.trainers import GRPOKnobs, PPOKnobs
from myllm_ray.ops.advantages import gae, kl_estimate, token_mask, whiten
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.ppo import PPOTrainer

LONGEST = 6
TEMPERATURE = Scripted.temperature
ZERO = torch.zeros((), dtype=torch.float64)


def test_gae_against_a_table_worked_by_hand() -> None:
    """γ = 0.9, λ = 0.5. First answer, three tokens: r = 1, 0, 2; V = 0.5, 1, -1. Second: one token, r = 3, V = 1.

    δ: 1 + 0.9·1 - 0.5 = 1.4;  0 + 0.9·(-1) - 1 = -1.9;  2 + 0 + 1 = 3
    A: 3;  -1.9 + 0.45·3 = -0.55;  1.4 + 0.45·(-0.55) = 1.1525
    G: A + V = 1.6525, 0.45, 2
    """
    nan = math.nan  # behind the end of the second answer
    found = gae(torch.tensor([[1.0, 0, 2], [3, nan, nan]]), torch.tensor([[0.5, 1, -1], [1, nan, nan]]), torch.tensor([3, 1]), 0.9, 0.5)
    assert found.advantages.tolist() == [pytest.approx([1.1525, -0.55, 3]), pytest.approx([2, 0, 0])]
    assert found.returns.tolist() == [pytest.approx([1.6525, 0.45, 2]), pytest.approx([3, 0, 0])]


def test_whitening_does_not_depend_on_the_cut() -> None:
    grid, lengths = torch.randn(6, 5, dtype=torch.float64) * 3 + 1, torch.tensor([5, 1, 3, 2, 4, 5])
    mask = token_mask(lengths, 5)
    (whole,) = whiten([grid], [mask])
    assert float(whole[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whole[mask].var()) == pytest.approx(1, abs=1e-6)
    for cut in (1, 2, 4):
        parts = whiten([grid[:cut], grid[cut:]], [mask[:cut], mask[cut:]])
        assert torch.allclose(torch.cat(parts), whole, atol=1e-12)


def test_kl_estimates() -> None:
    policy, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    assert kl_estimate(policy, reference, "k1").tolist() == [0.5, -1.0]
    assert kl_estimate(policy, reference, "k2").tolist() == [0.125, 0.5]
    assert kl_estimate(policy, reference, "k3").tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1])


def made_up(seed: int, count: int, group: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """(prompts, `group` answers to each, their rewards); some answers end by themselves."""
    made = random.Random(seed)
    questions = [[made.randrange(3, VOCAB) for _ in range(made.randint(1, 4))] for _ in range(count)]
    answers = []
    for i in range(count * group):
        long = i % 3 == 2
        length = LONGEST if long else made.randint(1, LONGEST - 1)
        answers.append([made.randrange(3, VOCAB) for _ in range(length - (not long))] + ([] if long else [END]))
    return questions, answers, [made.uniform(-1, 1) for _ in answers]


def shaken(model: torch.nn.Module, seed: int) -> None:
    """Another policy, not far away."""
    with torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def loss_of(trainer: Any, micros: list[Micro]) -> Tensor:
    """Of one optimizer step, as the engine makes it."""
    weight = sum(trainer.batch_weight(m) for m in micros)
    return sum((trainer.train_step(m).loss_sum for m in micros), ZERO) / weight


def cut(rows: list[list[int]], size: int) -> Batch:
    made = [prompts(rows[i : i + size]) for i in range(0, len(rows), size)]
    for number, micro in enumerate(made):
        micro["places"] = micro["places"] + number * size
    return Batch(made, Position(), Position(), 0)


def entropies(model: Any, prompt: list[int], answer: list[int]) -> list[Tensor]:
    logits = model.model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    log_p = [torch.log_softmax(logits[len(prompt) - 1 + t] / TEMPERATURE, -1) for t in range(len(answer))]
    return [-(lp.exp() * lp).sum() for lp in log_p]


GRPO_CASES: list[dict[str, Any]] = [
    {}, {"loss": "dr_grpo", "scale_rewards": "none"}, {"loss": "dapo", "clip_high": 0.05, "mask_truncated": True, "clip": 0.01},
    {"importance": "sequence", "clip": 0.003, "clip_high": 0.004}, {"kl_weight": 0.1}, {"kl_weight": 0.2, "kl_estimator": "k2"},
    {"scale_rewards": "batch", "kl_weight": 0.1, "kl_estimator": "k1"}, {"entropy_weight": 0.3}]


@pytest.mark.parametrize("size", [1, 4], ids=["cut", "whole"])
@pytest.mark.parametrize("knobs", GRPO_CASES, ids=lambda k: "-".join(str(v) for v in k.values()) or "default")
def test_grpo(knobs: dict[str, Any], size: int) -> None:
    check_grpo(knobs, size)


def combinations(section: type[Section], fixed: dict[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the settings of a section that have finitely many values, read from the schema."""
    finite = {}
    for name, field in section.model_fields.items():
        if field.annotation is bool or get_origin(field.annotation) is Literal:
            finite[name] = [False, True] if field.annotation is bool else list(get_args(field.annotation))
    finite.pop("critic", None)  # one of its own is another model: tests/contracts/test_enumeration.py
    return [{**fixed, **dict(zip(finite, parts, strict=True))} for parts in itertools.product(*finite.values())]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4], ids=["cut", "whole"])
def test_every_combination_of_grpo(size: int) -> None:
    for knobs in combinations(GRPOKnobs, {"kl_weight": 0.1, "clip": 0.01, "entropy_weight": 0.1}):
        check_grpo(knobs, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 6], ids=["cut", "whole"])
def test_every_combination_of_ppo(size: int) -> None:
    for knobs in combinations(PPOKnobs, {"kl_weight": 0.1, "clip": 0.01, "entropy_weight": 0.1, "missing_eos_penalty": 0.5}):
        check_ppo(knobs, size)


def check_grpo(knobs: dict[str, Any], size: int) -> None:
    """Loss and gradients of the second step on a batch against the equations."""
    group = 3
    questions, answers, rewards = made_up(11, 4, group)
    policy, reference = tiny(7), tiny(8)
    old_policy = copy.deepcopy(policy)
    trainer = GRPOTrainer(policy, sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], group_size=group, epochs=2,
                          reference=reference if knobs.get("kl_weight") else None, **knobs)
    steps = trainer.expand(cut(questions, size))
    next(steps)
    shaken(policy, 1)
    found_loss = loss_of(trainer, next(steps))
    found = gradients(found_loss, policy)

    low, high = 1 - knobs.get("clip", 0.2), 1 + knobs.get("clip_high", knobs.get("clip", 0.2))
    loss_kind = knobs.get("loss", "grpo")
    overall = torch.tensor(rewards, dtype=torch.float64).std().item()
    total, tokens = ZERO, 0
    for i, answer in enumerate(answers):
        prompt, own = questions[i // group], rewards[i // group * group : i // group * group + group]
        mean = sum(own) / group
        deviation = math.sqrt(sum((r - mean) ** 2 for r in own) / (group - 1))
        scale = {"group": deviation + 1e-4, "batch": overall + 1e-4, "none": 1.0}[knobs.get("scale_rewards", "group")]
        advantage = (rewards[i] - mean) / scale
        if knobs.get("mask_truncated") and answer[-1] != END:
            continue
        new = log_prob(policy, prompt, answer, TEMPERATURE)
        with torch.no_grad():
            old, ref = log_prob(old_policy, prompt, answer, TEMPERATURE), log_prob(reference, prompt, answer, TEMPERATURE)
        entropy = entropies(policy, prompt, answer)
        mean_ratio = sum((n - o for n, o in zip(new, old, strict=True)), ZERO) / len(answer)
        own_total = ZERO
        for t in range(len(answer)):
            rho = torch.exp(mean_ratio if knobs.get("importance") == "sequence" else new[t] - old[t])
            term = -torch.min(rho * advantage, torch.clamp(rho, low, high) * advantage)
            log_ratio = new[t] - ref[t]
            kl = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[knobs.get("kl_estimator", "k3")]
            own_total = own_total + term + knobs.get("kl_weight", 0.0) * kl - knobs.get("entropy_weight", 0.0) * entropy[t]
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
        trainer = GRPOTrainer(policy, sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], group_size=3, epochs=epochs)
        micros = next(trainer.expand(cut(questions, 2)))
        assert ("old_log_probs" in micros[0]) == (epochs == 2)
        losses.append(gradients(loss_of(trainer, micros), policy))
    assert_close(losses[0], losses[1])


PPO_CASES: list[dict[str, Any]] = [
    {}, {"kl_weight": 0.3, "kl_estimator": "k3"}, {"kl_weight": 0.2, "kl_in": "loss", "kl_estimator": "k2"},
    {"kl_weight": 0.0, "whiten": False, "discount": 0.9, "gae_lambda": 0.5, "value_clip": None},
    {"clip": 0.01, "value_clip": 0.01, "entropy_weight": 0.2, "value_weight": 0.7, "missing_eos_penalty": 0.5}]


@pytest.mark.parametrize("size", [1, 6], ids=["cut", "whole"])
@pytest.mark.parametrize("knobs", PPO_CASES, ids=lambda k: "-".join(str(v) for v in k.values()) or "default")
def test_ppo(knobs: dict[str, Any], size: int) -> None:
    check_ppo(knobs, size)


def check_ppo(knobs: dict[str, Any], size: int) -> None:
    """Loss and gradients of the second step on a batch against the equations."""
    questions, answers, rewards = made_up(13, 6, 1)
    policy, reference = tiny(14, "actor_critic"), tiny(15)
    with torch.no_grad():
        policy.value.weight.normal_(0, 0.3)
    old_policy, weight = copy.deepcopy(policy), knobs.get("kl_weight", 0.05)
    trainer = PPOTrainer(policy, sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], epochs=2,
                         reference=reference if weight else None, **knobs)
    steps = trainer.expand(cut(questions, size))
    next(steps)
    shaken(policy, 2)
    found_loss = loss_of(trainer, next(steps))
    found = gradients(found_loss, policy)

    def values(model: Any, prompt: list[int], answer: list[int]) -> list[Tensor]:
        hidden = model.model.base_model(input_ids=torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
        return [model.value(hidden[len(prompt) - 1 + t])[0] for t in range(len(answer))]

    def kl(log_ratio: Any) -> Any:
        return {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": torch.exp(-log_ratio) - 1 + log_ratio}[knobs.get("kl_estimator", "k1")]

    discount, decay = knobs.get("discount", 1.0), knobs.get("gae_lambda", 0.95)
    episodes = []
    for prompt, answer, reward in zip(questions, answers, rewards, strict=True):
        with torch.no_grad():
            old, ref = log_prob(old_policy, prompt, answer, TEMPERATURE), log_prob(reference, prompt, answer, TEMPERATURE)
            old_values = values(old_policy, prompt, answer)
        score = reward - (knobs.get("missing_eos_penalty", 0.0) if answer[-1] != END else 0.0)
        in_reward = weight if knobs.get("kl_in", "reward") == "reward" else 0.0
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
    mean, deviation = (flat.mean().item(), flat.std().item() + 1e-8) if knobs.get("whiten", True) else (0.0, 1.0)
    total = ZERO
    for prompt, answer, old, ref, old_values, advantages, returns in episodes:
        new, now, entropy = log_prob(policy, prompt, answer, TEMPERATURE), values(policy, prompt, answer), entropies(policy, prompt, answer)
        for t in range(len(answer)):
            rho, advantage, c = torch.exp(new[t] - old[t]), (advantages[t] - mean) / deviation, knobs.get("clip", 0.2)
            term = -torch.min(rho * advantage, torch.clamp(rho, 1 - c, 1 + c) * advantage)
            error, v_clip = (now[t] - returns[t]) ** 2, knobs.get("value_clip", 0.2)
            if v_clip is not None:
                error = torch.max(error, (old_values[t] + torch.clamp(now[t] - old_values[t], -v_clip, v_clip) - returns[t]) ** 2)
            term = term + knobs.get("value_weight", 0.1) * error / 2 - knobs.get("entropy_weight", 0.0) * entropy[t]
            if weight and knobs.get("kl_in") == "loss":
                term = term + weight * kl(new[t] - ref[t])
            total = total + term
    wanted_loss = total / len(flat)
    wanted = gradients(wanted_loss, policy)
    assert found_loss.item() == pytest.approx(wanted_loss.item(), abs=1e-8)
    assert_close(found, wanted)


def test_the_divergence_is_steered_to_its_target() -> None:
    """Ziegler et al., 2019, §2.2: more divergence than wanted raises the weight, by no more than 20 % a horizon."""
    questions, answers, rewards = made_up(16, 4, 1)
    trainer = PPOTrainer(tiny(17, "actor_critic"), sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], epochs=1,
                         reference=tiny(18), kl_target=1e-3, kl_horizon=40, kl_estimator="k3")
    list(trainer.expand(cut(questions, 4)))
    assert trainer.kl_weight == pytest.approx(0.05 * (1 + 0.2 * 4 / 40))
    other = PPOTrainer(tiny(17, "actor_critic"), sampler=Scripted([], LONGEST), rewards=[Given([])])
    other.load_state_dict(trainer.state_dict())
    assert other.kl_weight == trainer.kl_weight


def test_rewards_are_weighted_and_told_apart() -> None:
    questions, answers, rewards = made_up(24, 2, 2)
    trainer = GRPOTrainer(tiny(24), sampler=Scripted(answers, LONGEST), rewards=[Given(rewards, "a", 2.0), Given([1.0, 0, 0, 1.0], "b", -0.5)],
                          group_size=2)
    (micro,) = next(trainer.expand(cut(questions, 2)))
    assert micro["reward"][:, 0].tolist() == pytest.approx([2 * r - 0.5 * b for r, b in zip(rewards, [1, 0, 0, 1], strict=True)])
    metrics = trainer.train_step(micro).metrics
    assert float(metrics["rewards/a"][0]) == pytest.approx(sum(rewards))
    assert (float(metrics["rewards/b"][0]), int(metrics["rewards/b"][1])) == (2.0, 4)
    assert [s["a"] for s in trainer.samples] == pytest.approx(rewards)


class Scorer(torch.nn.Module):
    """A reward model whose score of an answer is its last token."""

    def forward(self, input_ids: Tensor, ends: Tensor, position_ids: Tensor) -> Tensor:
        return input_ids.flatten()[ends].double()


@pytest.mark.parametrize("functions", [0, 1])
def test_the_reward_is_that_of_functions_and_reward_model_together(functions: int) -> None:
    """In training, in the samples, and on held-out prompts; `score` is what is left of it after the penalty."""
    questions, answers, rewards = made_up(25, 4, 1)
    given = [Given(rewards, "f", 2.0)][:functions]
    lasts = [float(answer[-1]) for answer in answers]
    wanted = [2.0 * r * functions + last for r, last in zip(rewards, lasts, strict=True)]
    penalised = [w - 0.5 * (answer[-1] != END) for w, answer in zip(wanted, answers, strict=True)]

    def trainer() -> PPOTrainer:
        return PPOTrainer(tiny(25, "actor_critic"), sampler=Scripted(answers, LONGEST), rewards=given, reward_model=Scorer(), micro_size=2,
                          knobs=PPOKnobs(reward_model="x", epochs=1, missing_eos_penalty=0.5, kl_weight=0.0))

    made = trainer()
    micros = next(made.expand(cut(questions, 4)))
    metrics = [made.train_step(micro).metrics for micro in micros]
    assert sum(float(m["reward"][0]) for m in metrics) == pytest.approx(sum(wanted))
    assert sum(float(m["rewards/reward_model"][0]) for m in metrics) == pytest.approx(sum(lasts))
    assert sum(float(m["score"][0]) for m in metrics) == pytest.approx(sum(penalised))
    assert [s["reward"] for s in made.samples] == pytest.approx(wanted)
    assert ("reward_model" in made.samples[0]) == bool(functions)
    for reward in given:
        reward.values = list(rewards)
    output = trainer().evaluation_step(cut(questions, 4).micros[0])
    assert float(output.loss_sum) == pytest.approx(-sum(wanted))
    assert float(output.metrics["reward"][0]) == pytest.approx(sum(wanted))


def test_tokens_are_those_that_are_trained_on() -> None:
    questions, answers, rewards = made_up(26, 4, 2)
    made: Any = GRPOTrainer(tiny(26), sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], group_size=2, mask_truncated=True)
    micros = next(made.expand(cut(questions, 2)))
    metrics = [made.train_step(micro).metrics for micro in micros]
    assert sum(int(m["tokens"][0]) for m in metrics) == sum(len(a) for a in answers if a[-1] == END)
    assert sum(int(m["length"][0]) for m in metrics) == sum(map(len, answers)), "the length of what was sampled"
    made = PPOTrainer(tiny(26, "actor_critic"), sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], kl_weight=0.0, minibatches=2)
    counts = [sum(int(made.train_step(m).metrics["tokens"][0]) for m in micros) for micros in made.expand(cut(questions, 2))]
    assert sum(counts[:2]) == sum(map(len, answers[:4]))


def test_rows_that_fill_up_count_for_nothing() -> None:
    questions, answers, rewards = made_up(19, 3, 2)
    results = []
    for filling in ([], [[]]):
        policy = tiny(20)
        given = [*answers, *([[2, END]] * 2 if filling else [])]
        trainer = GRPOTrainer(policy, sampler=Scripted(given, LONGEST), rewards=[Given(rewards)], group_size=2)
        results.append(gradients(loss_of(trainer, next(trainer.expand(cut([*questions, *filling], 4)))), policy))
    assert_close(*results)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_self_checks(kind: str) -> None:
    """Before the first step: what is right passes; dropout, another reference, and a mask that lets padding in are told."""
    questions, answers, rewards = made_up(21, 4, 1)

    def trainer(**named: Any) -> Any:
        common = {"sampler": Scripted(answers * 2, LONGEST), "rewards": [Given(rewards * 2)], **named}
        if kind == "ppo":
            made: Any = PPOTrainer(tiny(22, "actor_critic"), **common)
        else:
            made = GRPOTrainer(tiny(22), group_size=2, epochs=2, kl_weight=0.1, **common)
        made.starts_at_reference = True
        made.check(cut(questions, 4))
        return made

    list(trainer(reference=tiny(22)).expand(cut(questions, 4)))
    with pytest.raises(TrainingError, match="away from its reference"):
        list(trainer(reference=tiny(23)).expand(cut(questions, 4)))
    noisy = trainer(reference=None)
    noisy.model.model.base_model.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", output.last_hidden_state + torch.randn_like(output.last_hidden_state)))
    with pytest.raises(TrainingError, match=r"importance ratio is not 1.*dropout"):
        list(noisy.expand(cut(questions, 4)))
    leaking = trainer(reference=None)
    honest = leaking.train_step

    def train_step(micro: Micro) -> Any:
        output = honest(micro)
        output.loss_sum = output.loss_sum + micro["old_log_probs"].sum()
        return output

    leaking.train_step = train_step
    with pytest.raises(TrainingError, match="a mask is wrong"):
        list(leaking.expand(cut(questions, 4)))
