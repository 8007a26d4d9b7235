"""Rewards, self-checks and fill rows of sampling trainers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rl_helpers import END, LONGEST, Given, Scripted, assert_close, cut, gradients, loss_of, made_up, tiny
from torch import Tensor

from myllm_ray.common.types import Micro
from myllm_ray.config.errors import TrainingError
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.ppo import PPOTrainer


def test_the_divergence_is_steered_to_its_target() -> None:
    """Ziegler et al., 2019, §2.2: divergence above the target raises the weight by at most 20 % per horizon."""
    questions, answers, rewards = made_up(16, 4, 1)
    trainer = PPOTrainer(
        tiny(17, "actor_critic"),
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards)],
        epochs=1,
        reference=tiny(18),
        kl_target=1e-3,
        kl_horizon=40,
        kl_estimator="k3",
    )
    list(trainer.optimizer_steps(cut(questions, 4)))
    assert trainer.kl_weight == pytest.approx(0.05 * (1 + 0.2 * 4 / 40))
    other = PPOTrainer(tiny(17, "actor_critic"), sampler=Scripted([], LONGEST), rewards=[Given([])])
    other.load_state_dict(trainer.state_dict())
    assert other.kl_weight == trainer.kl_weight


def test_rewards_are_weighted_and_reported_separately() -> None:
    questions, answers, rewards = made_up(24, 2, 2)
    trainer = GRPOTrainer(
        tiny(24),
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards, "a", 2.0), Given([1.0, 0, 0, 1.0], "b", -0.5)],
        group_size=2,
    )
    (micro,) = next(trainer.optimizer_steps(cut(questions, 2)))
    assert micro["reward"][:, 0].tolist() == pytest.approx(
        [2 * r - 0.5 * b for r, b in zip(rewards, [1, 0, 0, 1], strict=True)]
    )
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
    """Checks training, samples and held-out prompts; `score` is the reward minus the penalty."""
    questions, answers, rewards = made_up(25, 4, 1)
    given = [Given(rewards, "f", 2.0)][:functions]
    lasts = [float(answer[-1]) for answer in answers]
    wanted = [2.0 * r * functions + last for r, last in zip(rewards, lasts, strict=True)]
    penalised = [w - 0.5 * (answer[-1] != END) for w, answer in zip(wanted, answers, strict=True)]

    def trainer() -> PPOTrainer:
        return PPOTrainer(
            tiny(25, "actor_critic"),
            sampler=Scripted(answers, LONGEST),
            rewards=given,
            reward_model=Scorer(),
            micro_size=2,
            config=PPOTrainer.Config(reward_model="x", epochs=1, missing_eos_penalty=0.5, kl_weight=0.0),
        )

    made = trainer()
    micros = next(made.optimizer_steps(cut(questions, 4)))
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
    made: Any = GRPOTrainer(
        tiny(26), sampler=Scripted(answers, LONGEST), rewards=[Given(rewards)], group_size=2, mask_truncated=True
    )
    micros = next(made.optimizer_steps(cut(questions, 2)))
    metrics = [made.train_step(micro).metrics for micro in micros]
    assert sum(int(m["tokens"][0]) for m in metrics) == sum(len(a) for a in answers if a[-1] == END)
    assert sum(int(m["length"][0]) for m in metrics) == sum(map(len, answers)), "the length of what was sampled"
    made = PPOTrainer(
        tiny(26, "actor_critic"),
        sampler=Scripted(answers, LONGEST),
        rewards=[Given(rewards)],
        kl_weight=0.0,
        minibatches=2,
    )
    counts = [
        sum(int(made.train_step(m).metrics["tokens"][0]) for m in micros)
        for micros in made.optimizer_steps(cut(questions, 2))
    ]
    assert sum(counts[:2]) == sum(map(len, answers[:4]))


def test_rows_that_fill_up_count_for_nothing() -> None:
    questions, answers, rewards = made_up(19, 3, 2)
    results = []
    for filling in ([], [[]]):
        policy = tiny(20)
        given = [*answers, *([[2, END]] * 2 if filling else [])]
        trainer = GRPOTrainer(policy, sampler=Scripted(given, LONGEST), rewards=[Given(rewards)], group_size=2)
        results.append(
            gradients(loss_of(trainer, next(trainer.optimizer_steps(cut([*questions, *filling], 4)))), policy)
        )
    assert_close(*results)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_self_checks(kind: str) -> None:
    """Before the first step, a correct trainer passes; dropout, a wrong reference and a wrong mask are reported."""
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

    list(trainer(reference=tiny(22)).optimizer_steps(cut(questions, 4)))
    with pytest.raises(TrainingError, match="away from its reference"):
        list(trainer(reference=tiny(23)).optimizer_steps(cut(questions, 4)))
    noisy = trainer(reference=None)
    noisy.model.model.base_model.register_forward_hook(
        lambda module, inputs, output: setattr(
            output, "last_hidden_state", output.last_hidden_state + torch.randn_like(output.last_hidden_state)
        )
    )
    with pytest.raises(TrainingError, match=r"importance ratio is not 1.*dropout"):
        list(noisy.optimizer_steps(cut(questions, 4)))
    leaking = trainer(reference=None)
    honest = leaking.train_step

    def train_step(micro: Micro) -> Any:
        output = honest(micro)
        output.loss_sum = output.loss_sum + micro["old_log_probs"].sum()
        return output

    leaking.train_step = train_step
    with pytest.raises(TrainingError, match="a mask is wrong"):
        list(leaking.optimizer_steps(cut(questions, 4)))
