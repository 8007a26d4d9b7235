"""Pools of Ray actors that compute rewards or sample completions for a training worker.

Actors end with the worker that created them. They are not shared between workers, so the order of an actor's calls
depends on one worker only.
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
from myllm_ray.data.prepare import PreparedData
from myllm_ray.dependencies import Services
from myllm_ray.trainers.rewards import FunctionReward, RewardFailure


class _Judge:
    """Actor that calls one reward function."""

    def __init__(self, settings: FunctionReward.Config):
        self._reward = FunctionReward(settings)

    def judge(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        return self._reward.checked(self._reward.call(prompts, completions, columns), len(completions))


class RewardActors(FunctionReward):
    """A reward function that runs in `settings.workers` actors, each with a share of the completions.

    An actor that exceeds `settings.timeout` is ended and replaced.
    """

    def __init__(self, settings: FunctionReward.Config):
        super().__init__(settings)
        self._starting: list[Any] = []
        self._actors = [self._start() for _ in range(settings.workers)]

    def _start(self) -> Any:
        # The caller applies the timeout: an actor whose function hangs cannot interrupt itself.
        actor: Any = ray.remote(num_cpus=0)(_Judge).remote(self.config.model_copy(update={"timeout": None}))
        self._starting.append(actor.__ray_ready__.remote())
        return actor

    def within_time(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
        count = len(self._actors)
        edges = [len(prompts) * i // count for i in range(count + 1)]
        # The timeout must not include the start of the process, its imports and its models. An actor that fails to
        # start is reported by its first call below.
        if self._starting:
            ray.wait(self._starting, num_returns=len(self._starting))
            self._starting.clear()
        asked = {}
        for number, (first, last) in enumerate(itertools.pairwise(edges)):
            share = {name: values[first:last] for name, values in self.accepted(columns).items()}
            asked[self._actors[number].judge.remote(prompts[first:last], completions[first:last], share)] = number
        _done, late = ray.wait(list(asked), num_returns=len(asked), timeout=self.config.timeout)
        # Ray cannot cancel a running call of an actor, so the actor is replaced.
        for reference in late:
            self._replace(asked[reference])
        if late:
            raise RewardFailure(f"returned nothing within {self.config.timeout:g} s (timeout)")
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
    """Actor that samples completions with the weights of the last `load`, and scores them."""

    def __init__(self, raw: Mapping[str, Any], prepared: PreparedData):
        from myllm_ray.accelerators.single import SingleGPUAccelerator
        from myllm_ray.common.materialize import materialize
        from myllm_ray.data.tokenizer import open_tokenizer
        from myllm_ray.dependencies import model_section, stop_tokens
        from myllm_ray.models.generate import HFSampler
        from myllm_ray.models.load import build_deferred

        config: Any = validate(raw)
        torch.set_num_threads(max(1, int(config.scaling.cpus_per_worker)))
        self.accelerator = SingleGPUAccelerator.like(config.accelerator)
        self.accelerator.setup()
        tokenizer = open_tokenizer(prepared.tokenizer_folder)
        # Nothing is trained here, and patterns of `freeze` may name the critic.
        section = model_section(config).model_copy(update={"freeze": []})
        model = build_deferred(section, tokenizer, config.data.sequence_length, config.run.seed)
        self.sampler = HFSampler(tokenizer, config.rollout, stop_tokens(config.model, tokenizer))
        self.model = materialize(model, self.accelerator.device).requires_grad_(False).eval()

    def load(self, weights: dict[str, Tensor]) -> None:
        named = dict(self.model.named_parameters())
        for name, value in weights.items():
            if name in named:  # the weights may include a critic, which a sampling model does not have
                named[name].copy_(value)

    # The actor computes the log-probabilities, because the weights of the worker may be newer than those that sampled.
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
    """The rollout actors of one training worker.

    Args:
        config: the run's config.
        prepared: the run's prepared data.
        count: number of actors. Each reserves the CPUs and GPUs of a worker.
    """

    def __init__(self, config: TrainerConfig, prepared: PreparedData, count: int):
        scaling = config.scaling
        remote: Any = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=scaling.gpus_per_worker)(_Generator)
        self._actors: list[Any] = [remote.remote(config.model_dump(mode="json"), prepared) for _ in range(count)]
        self._next = 0

    def load(self, weights: dict[str, Tensor]) -> None:
        """Sets the weights for all completions that are requested after this call."""
        # An actor runs its calls in the order of submission, so earlier calls use the previous weights and no wait is
        # needed. The object store contains one copy of the weights for all actors.
        reference = ray.put(weights)
        for actor in self._actors:
            actor.load.remote(reference)

    def submit(self, job: RolloutJob) -> Any:
        """Requests completions for a micro-batch of prompts. Returns a reference, for `result`."""
        # Round robin, not the next free actor: the assignment must not depend on timing.
        actor = self._actors[self._next % len(self._actors)]
        self._next += 1
        return actor.answer.remote(job)

    def result(self, asked: Any) -> Sampled:
        """Waits for the completions of a reference from `submit`."""
        sampled: Sampled = ray.get(asked)
        return sampled


def services(config: TrainerConfig, prepared: PreparedData) -> Services:
    """Returns the constructors of the objects that a training worker has only on Ray."""
    return Services(RewardActors, lambda count: RolloutActors(config, prepared, count))
