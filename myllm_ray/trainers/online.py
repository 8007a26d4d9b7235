"""Base class of trainers that sample the answers that they train on.

It samples answers to prompts, computes their rewards, and builds the rows to train on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from myllm_ray.common.distributed import gather_objects
from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.types import (
    Batch,
    MetricPairs,
    Micro,
    Position,
    Reward,
    RolloutJob,
    RolloutPool,
    Sampled,
    Sampler,
    Samples,
    StepOutput,
    TokenScores,
)
from myllm_ray.config.sections import Section
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.ops.rollouts import Scored, packed_answers, padded_answers, training_rows
from myllm_ray.trainers import self_checks
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.online_config import OnlineConfig
from myllm_ray.trainers.rewards import Columns, gather_columns
from myllm_ray.trainers.routing import routing_inputs
from myllm_ray.trainers.scoring import filled_rows, score_tokens

_SHOWN = 8
"""Largest number of answers per batch in the table of samples."""


def _place(batch: Batch, micro: Micro) -> str:
    """Returns a key of a micro-batch of prompts: its position in the data, which is the same after a restart."""
    return f"{batch.position.epoch}/{batch.position.row}/{int(micro['places'][0, 0])}"


class OnlineTrainer(BaseTrainer):
    """Base class of PPO and GRPO.

    Args:
        model: The policy.
        dataset: See `BaseTrainer`.
        sampler: Samples the answers.
        rewards: Functions that return rewards.
        columns: Fields of the data; default: no fields.
        validation_columns: Fields of the held-out data; default: `columns`.
        reference: The frozen model from which the divergence is measured; None: it is not measured.
        starts_at_reference: The policy equals its reference before the first step. The first rollouts verify this.
        seed: The seed of the run.
        micro_size: Number of answers per forward pass; None: the answers to one micro-batch of prompts.
        pool: Samples in other processes while this process trains; None: this process samples.
        max_lag: With a pool, the answers to a batch are sampled with the weights from exactly this many batches
            earlier, or with the initial weights if the run has made fewer batches. The fixed lag makes the run
            independent of the speed of its processes.
        packs_rows: Whether answers share rows in training, without padding. Used only if the model computes token
            scores itself.
        config: See `BaseTrainer`.
        others: See `BaseTrainer`.
    """

    Config = OnlineConfig
    config: OnlineConfig
    sections: ClassVar[Mapping[str, type[Section]]] = {"rollout": RolloutSection}
    reads: ClassVar[tuple[str, ...]] = ("prompts",)
    trains_routers = True
    layout: ClassVar[str] = "rollouts"
    dependencies: ClassVar[tuple[str, ...]] = (
        "sampler",
        "rewards",
        "columns",
        "validation_columns",
        "reference",
        "starts_at_reference",
        "seed",
        "micro_size",
        "pool",
        "max_lag",
        "packs_rows",
    )

    def __init__(
        self,
        model: nn.Module,
        dataset: Any = None,
        *,
        sampler: Sampler,
        rewards: Sequence[Reward] = (),
        columns: Columns | None = None,
        validation_columns: Columns | None = None,
        reference: nn.Module | None = None,
        starts_at_reference: bool = False,
        seed: int = 0,
        micro_size: int | None = None,
        pool: RolloutPool | None = None,
        max_lag: int = 1,
        packs_rows: bool = True,
        config: Any = None,
        **others: Any,
    ):
        # In manually constructed trainers the rewards are objects. The config section still needs their names.
        if config is None and "reward" not in others:
            others["reward"] = [{"function": reward.name} for reward in rewards]
        super().__init__(model, dataset, config=config, **others)
        self.sampler, self.rewards, self.columns, self.seed = sampler, list(rewards), columns or (lambda _: {}), seed
        self.validation_columns = validation_columns or self.columns
        self.reference, self.starts_at_reference, self.micro_size = reference, starts_at_reference, micro_size
        self.epochs, self.minibatches, self.group = (
            self.config.epochs,
            self.config.minibatches,
            self.config.answers_per_prompt,
        )
        self.steps_per_batch = self.config.steps_per_batch
        self._to_check = False
        self.pool, self.max_lag, self.packs_rows = pool, max_lag, packs_rows
        self._pending: dict[str, Any] = {}
        """Answers that other processes sample, or handles of them, by the key of their micro-batch (`_place`)."""
        self._saved: dict[str, Sampled] = {}
        """Answers from a checkpoint that were sampled before it was saved, by the key of their micro-batch."""

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    def check(self, batch: Batch) -> None:
        """Schedules the checks of trainers/self_checks.py for the first rollouts."""
        # The checks need answers, which `optimizer_steps` samples later.
        self._to_check = True

    def prefetch_rollouts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches in the order of training.

        With a pool, the answers to a batch are requested `max_lag` batches before it is trained on.
        """
        if self.pool is None:
            yield from batches
            return
        # Weights are loaded only in this generator, after a fixed number of batches, so the weights that sample a batch
        # do not depend on the speed of the pool.
        waiting: deque[Batch] = deque()
        self.pool.load(self._weights())
        for batch in batches:
            waiting.append(batch)
            for micro in batch.micros:
                key = _place(batch, micro)
                self._pending[key] = self._saved.pop(key, None) or self.pool.submit(self._job(micro, batch))
            if len(waiting) > self.max_lag:
                yield waiting.popleft()
                # The generator resumes after the engine has trained on the batch, so these weights are the new ones.
                self.pool.load(self._weights())
        yield from waiting

    def _weights(self) -> dict[str, Tensor]:
        """Returns a copy of all parameters on the CPU, in fp32.

        Sharded parameters are gathered by a collective, so all ranks must call this method.
        """
        inner = getattr(self.model, "module", self.model)
        # copy=True: an fp32 parameter on the CPU would otherwise be returned itself, and the optimizer changes it in
        # place.
        with self.generation(), torch.no_grad():
            return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in inner.named_parameters()}

    def _job(self, micro: Micro, batch: Batch) -> RolloutJob:
        mask = micro["segment_ids"] >= 0
        mask[:, 0] = True  # empty rows get a prompt of one token; see `_answered`
        # One seed per answer, from its position in the data: the answers do not depend on how the batch is split.
        seeds = [
            derive_seed("rollout", self.seed, batch.position.epoch, batch.position.row, int(place), number)
            for place in micro["places"][:, 0]
            for number in range(self.group)
        ]
        return RolloutJob(micro["input_ids"], mask, self.group, seeds)

    def _sample(self, micro: Micro, batch: Batch) -> tuple[Samples, Tensor | None]:
        """Returns the answers to a micro-batch, and their log-probabilities (N, L) if the pool sampled them."""
        # Nothing is pending without a pool, and for held-out prompts: this process samples these answers.
        asked = self._pending.pop(_place(batch, micro), None)
        if asked is not None:
            found = self._result(asked)
            tokens, lengths, ended, log_probs = (t.to(self.device) for t in found)
            return Samples(tokens, lengths, ended), log_probs
        job = self._job(micro, batch)
        with self.generation():
            return self.sampler(self.model, job.prompts, job.mask, job.group, job.seeds), None

    def _result(self, asked: Any) -> Sampled:
        # `_pending` also contains answers that a checkpoint restored, or for which `state_dict` has waited.
        assert self.pool is not None
        return asked if isinstance(asked, Sampled) else self.pool.result(asked)

    def state_dict(self) -> dict[str, Any]:
        """Returns the answers of all ranks that the pool has already sampled for the next batches.

        Without a pool it is empty. With a pool it contains a collective, so all ranks must call this method.
        """
        if self.pool is None:
            return {}
        # A resumed run must not sample these answers again: its weights are newer than those that sampled.
        self._pending = {key: self._result(asked) for key, asked in self._pending.items()}
        own = {key: [t.tolist() for t in sampled] for key, sampled in self._pending.items()}
        return {"sampled": {key: value for part in gather_objects(own) for key, value in part.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        # Every rank keeps the answers of all ranks and later takes those of its own micro-batches, so a resumed run may
        # have a different number of ranks.
        types = (torch.long, torch.long, torch.bool, torch.float32)
        self._saved = {
            key: Sampled(*(torch.tensor(v, dtype=t) for v, t in zip(value, types, strict=True)))
            for key, value in saved.get("sampled", {}).items()
        }

    def rollouts(self, batch: Batch) -> list[Micro]:
        """Samples answers to this rank's prompts and computes their rewards.

        Returns:
            One training micro-batch per micro-batch of prompts. In addition to `training_rows` it contains
            `function_rewards` (N, F); `reward` (N, 1), their weighted sum plus that of the reward model; `counted`
            (N, 1), false for the answers of empty rows; `model_rewards` (N, 1) with a reward model; and
            `old_log_probs` (N, L) with a pool.
        """
        self.samples = []
        return [
            self._answered({name: tensor.to(self.device) for name, tensor in micro.items()}, batch)
            for micro in batch.micros
        ]

    def _answered(self, micro: Micro, batch: Batch, columns_of: Columns | None = None) -> Micro:
        """Returns the answers to one micro-batch of prompts as training rows; see `rollouts`.

        Empty rows, which fill up the last batch of an epoch, have no prompt. They are answered like the other rows,
        because all ranks must make the same collectives under FSDP. Their answers are then given length 0, so they
        count neither in the loss nor in the metrics.

        Args:
            micro: The prompts, on the device.
            batch: The batch of the prompts; its position seeds the answers.
            columns_of: Fields of the data; default: those of training.
        """
        real = filled_rows(micro)
        mask = micro["segment_ids"] >= 0
        mask[:, 0] = True
        samples, log_probs = self._sample(micro, batch)
        counted = real.repeat_interleave(self.group)
        samples = samples._replace(lengths=samples.lengths * counted, ended=samples.ended & counted)
        rows = training_rows(micro["input_ids"], mask, samples)
        # In float64, like the Python numbers that the functions return.
        given = torch.zeros(len(counted), len(self.rewards), dtype=torch.float64, device=self.device)
        chosen = counted.nonzero().squeeze(1).tolist()
        # Reward functions receive only answers to real prompts, and are not called if there are no such answers.
        if chosen:
            ids = [micro["input_ids"][i // self.group][mask[i // self.group]].tolist() for i in chosen]
            answers = [samples.tokens[i, : samples.lengths[i]].tolist() for i in chosen]
            texts = [self.sampler.decode(answer) for answer in answers]
            columns = gather_columns(
                columns_of or self.columns, [int(micro["documents"][i // self.group]) for i in chosen]
            )
            if "prompts" not in columns:  # manually constructed data contains only tokens
                columns["prompts"] = [self.sampler.decode(prompt) for prompt in ids]
            columns.setdefault("prompt_texts", columns["prompts"])
            columns.update(prompt_ids=ids, completion_ids=answers)
            prompts = columns.pop("prompts")
            values = [reward(prompts, texts, columns) for reward in self.rewards]
            given[chosen] = (
                torch.tensor(values, dtype=torch.float64, device=self.device).view(len(values), len(chosen)).T
            )
        weights = torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64, device=self.device)
        rows.update(function_rewards=given, reward=(given @ weights)[:, None], counted=counted[:, None])
        model_rewards = self.model_rewards(rows)
        if model_rewards is not None:
            rows.update(model_rewards=model_rewards[:, None], reward=rows["reward"] + model_rewards[:, None])
        if log_probs is not None:
            rows["old_log_probs"] = log_probs
        if chosen:
            self._show(columns["prompt_texts"], texts, {name: tensor[chosen] for name, tensor in rows.items()})
        return rows

    def model_rewards(self, rows: Micro) -> Tensor | None:
        """Returns (N,) the rewards of a reward model for training rows, or None if there is no reward model."""
        return None

    def _show(self, prompts: list[str], texts: list[str], rows: Micro) -> None:
        """Keeps the first answers of the first micro-batch for the table of samples.

        Rank 0 has the first micro-batch for any number of ranks, so the table does not depend on that number.
        """
        for i in range(min(len(texts), 0 if self.samples else _SHOWN)):
            parts = {r.name: float(v) for r, v in zip(self.rewards, rows["function_rewards"][i], strict=True)}
            if "model_rewards" in rows:
                parts["reward_model"] = float(rows["model_rewards"][i])
            self.samples.append(
                {
                    "prompt": prompts[i],
                    "response": texts[i],
                    "reward": float(rows["reward"][i]),
                    "tokens": int(rows["lengths"][i]),
                    "ended": bool(rows["ended"][i]),
                    **(parts if len(parts) > 1 else {}),
                }
            )

    def score(
        self,
        model: nn.Module,
        rows: Micro,
        entropy: bool = False,
        weights: Tensor | None = None,
        packs_rows: bool | None = None,
    ) -> tuple[TokenScores, Scored]:
        """Returns the scores of the answer tokens under a model, and their indices.

        The distribution is that of the temperature with which the answers were sampled.

        Args:
            model: The policy, the reference, or another model with token scores.
            rows: Training rows.
            entropy: Whether to compute entropies.
            weights: (N,) the part of `batch_weight` of each answer. If given, the scores include the loss of the
                routers, for a model that has routers.
            packs_rows: Whether to pack the rows without their padding, several into one row; default: the trainer's
                setting.
        """
        routing, computes = None, getattr(getattr(model, "module", model), "computes_token_losses", False)
        packs_rows = computes and (self.packs_rows if packs_rows is None else packs_rows)
        inputs, scored = packed_answers(rows) if packs_rows else padded_answers(rows)
        if computes and weights is not None:
            routing = routing_inputs(model, inputs["sequences"], weights)
        temperature, documents = self.sampler.temperature, self.documents_of(inputs)
        return score_tokens(
            model, inputs, scored.predictors, scored.targets, temperature, entropy, routing, documents=documents
        ), scored

    def minibatches_of(self, micros: list[Micro]) -> Iterator[list[Micro]]:
        """Yields the optimizer steps on the rollouts of a batch, each as a list of micro-batches.

        In each of `epochs` passes, the micro-batches are divided into `minibatches` parts of equal size. Micro-batches
        of more than `micro_size` answers are split.
        """
        if self._to_check:
            self._to_check = False
            self_checks.check_rollouts(self, self._pieces(micros[0])[0])
        for _ in range(self.epochs):
            for number in range(self.minibatches):
                part = micros[number * len(micros) // self.minibatches : (number + 1) * len(micros) // self.minibatches]
                yield [piece for micro in part for piece in self._pieces(micro)]

    def _pieces(self, micro: Micro) -> list[Micro]:
        """Splits training rows into micro-batches of at most `micro_size` answers, each small enough for one pass."""
        count = len(micro["input_ids"])
        size = self.micro_size or count
        return [
            {name: tensor[first : first + size] for name, tensor in micro.items()} for first in range(0, count, size)
        ]

    def rollout_metrics(self, micro: Micro) -> MetricPairs:
        """Returns the metrics of the answers of a micro-batch; means are over answers to real prompts."""
        n = micro["counted"].sum()
        named: MetricPairs = {
            f"rewards/{reward.name}": (micro["function_rewards"][:, i].sum(), n)
            for i, reward in enumerate(self.rewards)
        }
        if "model_rewards" in micro:
            named["rewards/reward_model"] = (micro["model_rewards"].sum(), n)
        if self.pool is not None:
            named["rollout_lag"] = (float(self.max_lag), 1.0)
        return {
            **named,
            "reward": (micro["reward"].sum(), n),
            # With `grpo.mask_truncated`, `lengths` is 0 for truncated answers; `sampled_lengths` has their real length.
            "length": (micro.get("sampled_lengths", micro["lengths"]).sum(), n),
            "ended": (micro["ended"].sum(), n),
            "tokens": (micro["lengths"].sum(), 1.0),
            "reward_failures": (float(sum(reward.failures for reward in self.rewards)), 1.0),
        }

    def evaluation_weight(self, micro: Micro) -> Tensor:
        """Returns the number of prompts."""
        return filled_rows(micro).sum()

    def evaluation_step(self, micro: Micro) -> StepOutput:
        """Returns the negative sum over prompts of the mean reward of their answers as the loss, and the metrics."""
        # The position is fixed, so the seeds of the answers are the same in every evaluation.
        rows = self._answered(micro, Batch([], Position(), Position(), 0), self.validation_columns)
        metrics = self.rollout_metrics(rows)
        return StepOutput(-rows["reward"].sum().double() / self.group, metrics)
