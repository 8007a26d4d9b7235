"""Pools of Ray actors that a training worker keeps: they judge answers, or sample the answers to the next batches.

A worker owns its actors: they end with it, and none is shared between workers, so the calls of one worker are all that decides what
an actor does, in which order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import ray
import torch
from torch import Tensor

from myllm_ray.common.types import RolloutJob, Sampled
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import RewardFunction
from myllm_ray.data.prepare import PreparedData
from myllm_ray.trainers.rewards import FunctionReward, RewardFailure


class _Judge:
    """In an actor: calls one reward function."""

    def __init__(self, settings: RewardFunction):
        self._reward = FunctionReward(settings)

    def judge(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return self._reward.checked(self._reward.call(prompts, completions, columns), len(completions))


class PooledReward(FunctionReward):
    """A reward function in `settings.workers` actors, each with a share of the answers. One that hangs is ended and replaced."""

    def __init__(self, settings: RewardFunction):
        super().__init__(settings)
        self._starting: list[Any] = []
        self._actors = [self._start() for _ in range(settings.workers)]

    def _start(self) -> Any:
        actor: Any = ray.remote(num_cpus=0)(_Judge).remote(self.settings.model_copy(update={"timeout": None}))
        self._starting.append(actor.__ray_ready__.remote())
        return actor

    def within_time(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        count = len(self._actors)
        edges = [len(prompts) * i // count for i in range(count + 1)]
        if self._starting:  # processes, imports and models that take their time are not the function's; one that fails is reported below
            ray.wait(self._starting, num_returns=len(self._starting))
            self._starting.clear()
        asked = {}
        for number, (first, last) in enumerate(itertools.pairwise(edges)):
            share = {name: values[first:last] for name, values in self.accepted(columns).items()}
            asked[self._actors[number].judge.remote(prompts[first:last], completions[first:last], share)] = number
        _done, late = ray.wait(list(asked), num_returns=len(asked), timeout=self.settings.timeout)
        for reference in late:
            self._replace(asked[reference])
        if late:
            raise RewardFailure(f"gave no answer within {self.settings.timeout:g} s (timeout)")
        found: list[float] = []
        for reference in asked:
            try:
                found += ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise RewardFailure(str(error.cause)) from error.cause
            except ray.exceptions.RayActorError:
                self._replace(asked[reference])
                raise RewardFailure("the actor that ran it died") from None
        return found

    def _replace(self, number: int) -> None:
        ray.kill(self._actors[number])
        self._actors[number] = self._start()


class _Generator:
    """In an actor: samples answers with the weights that it was last given, and scores them."""

    def __init__(self, raw: Mapping[str, Any], prepared: PreparedData):
        from myllm_ray.accelerators.single import SingleGPUAccelerator
        from myllm_ray.common.materialize import materialize
        from myllm_ray.data.tokenizer import open_tokenizer
        from myllm_ray.models.generate import HFSampler
        from myllm_ray.models.load import build_deferred
        from myllm_ray.roles import model_section, stop_tokens

        config: Any = validate(raw)
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
        self.accelerator = SingleGPUAccelerator.like(config.accelerator)
        self.accelerator.setup()
        tokenizer = open_tokenizer(prepared.tokenizer_folder)
        model = build_deferred(model_section(config), tokenizer, config.data.sequence_length, config.run.seed)
        self.sampler = HFSampler(tokenizer, config.rollout, stop_tokens(config.model, tokenizer))
        self.model = materialize(model, self.accelerator.device).requires_grad_(False).eval()

    def load(self, weights: dict[str, Tensor]) -> None:
        named = dict(self.model.named_parameters())
        for name, value in weights.items():
            if name in named:  # a critic's weights are not for the policy
                named[name].copy_(value)

    @torch.no_grad()
    def answer(self, job: RolloutJob) -> Sampled:
        from myllm_ray.ops.rollouts import answer_tokens, to_grid, training_rows
        from myllm_ray.trainers.preference import score_tokens

        device = self.accelerator.device
        ids, mask = job.prompts.to(device), job.mask.to(device)
        with self.accelerator.autocast():
            samples = self.sampler(self.model, ids, mask, job.group, job.seeds)
            rows = training_rows(ids, mask, samples)
            scored = answer_tokens(rows)
            scores = score_tokens(self.model, rows, scored.predictors, scored.targets, self.sampler.temperature)
        grid = to_grid(scores.log_probs, scored, samples.lengths)
        return Sampled(samples.tokens.cpu(), samples.lengths.cpu(), samples.ended.cpu(), grid.float().cpu())


class RolloutActors:
    """The actors of one training worker."""

    def __init__(self, config: TrainerConfig, prepared: PreparedData, count: int):
        scaling = config.scaling
        remote: Any = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=scaling.gpus_per_worker)(_Generator)
        self._actors: list[Any] = [remote.remote(config.model_dump(mode="json"), prepared) for _ in range(count)]
        self._next = 0

    def load(self, weights: dict[str, Tensor]) -> None:
        """Every answer that is asked for from now on is sampled with these."""
        reference = ray.put(weights)
        for actor in self._actors:
            actor.load.remote(reference)

    def submit(self, job: RolloutJob) -> Any:
        """Ask for the answers to a micro-batch of prompts; give what comes back to `result`."""
        actor = self._actors[self._next % len(self._actors)]
        self._next += 1
        return actor.answer.remote(job)

    def result(self, asked: Any) -> Sampled:
        """The answers, when they are there."""
        sampled: Sampled = ray.get(asked)
        return sampled


def services(config: TrainerConfig, prepared: PreparedData) -> dict[str, Any]:
    """What a training worker on Ray can have besides (`roles.py`)."""
    return {"reward": PooledReward, "rollouts": lambda count: RolloutActors(config, prepared, count)}
