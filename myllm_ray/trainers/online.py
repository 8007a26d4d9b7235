"""What trainers share that sample answers themselves: prompts to answers, rewards, and rows to train on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from myllm_ray.ops.rollouts import Scored, packed_answers, padded_answers, training_rows
from myllm_ray.trainers import self_checks
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.preference import filled, score_tokens
from myllm_ray.trainers.routing import routing_inputs

Columns = Callable[[int], dict[str, Any]]
"""Fields of the data row that a prompt came from, by the number of its document; `prompts` and `prompt_texts` may be among them
(see `Reward`)."""
_SHOWN = 8


def _gathered(columns_of: Columns, documents: list[int]) -> dict[str, list[Any]]:
    """The fields of the documents by name, one value a document; None where a document lacks one."""
    fields = {document: columns_of(document) for document in dict.fromkeys(documents)}
    names = list(dict.fromkeys(name for document in documents for name in fields[document]))
    return {name: [fields[document].get(name) for document in documents] for name in names}


def _place(batch: Batch, micro: Micro) -> str:
    """Where a micro-batch of prompts stands in the data."""
    return f"{batch.position.epoch}/{batch.position.row}/{int(micro['places'][0, 0])}"


class OnlineTrainer(BaseTrainer):
    """Base of PPO and GRPO.

    Args:
        sampler: samples the answers.
        rewards: functions that give rewards.
        columns: see `Columns`; by default none.
        validation_columns: the same for held-out data, whose documents may be of another store; default: `columns`.
        reference: the frozen model whose distance is measured; None: it is not.
        seed: of the run.
        micro_size: answers in one forward pass; None: those to one micro-batch of prompts.
        epochs, minibatches: passes over a batch of rollouts, and optimizer steps in each.
        group: answers to each prompt.
        pool: samples elsewhere, while this process trains; None: this process samples.
        max_lag: with a pool: the answers to a batch are sampled with the weights of so many batches before it. Always of exactly
            as many, so that a run is the same however fast its parts are.
        packs_rows: answers share rows in training, without padding: for models that keep packed documents apart. Only models that
            compute token scores themselves are packed.
    """

    reads: ClassVar[tuple[str, ...]] = ("prompts",)
    trains_routers = True
    layout: ClassVar[str] = "rollouts"
    uses: ClassVar[tuple[str, ...]] = ("knobs", "sampler", "rewards", "columns", "reference", "seed", "micro_size", "pool", "max_lag",
                                     "validation_columns", "packs_rows")

    def __init__(self, model: nn.Module, dataset: Any = None, *, sampler: Sampler, rewards: Sequence[Reward] = (),
                 columns: Columns | None = None, reference: nn.Module | None = None, seed: int = 0, micro_size: int | None = None,
                 epochs: int = 1, minibatches: int = 1, group: int = 1, pool: RolloutPool | None = None, max_lag: int = 1,
                 validation_columns: Columns | None = None, packs_rows: bool = True, **named: Any):
        super().__init__(model, dataset, **named)
        self.sampler, self.rewards, self.columns, self.seed = sampler, list(rewards), columns or (lambda _: {}), seed
        self.validation_columns = validation_columns or self.columns
        self.reference, self.micro_size, self.group = reference, micro_size, group
        self.epochs, self.minibatches = epochs, minibatches
        self.steps_per_batch = epochs * minibatches
        self._to_check = False
        self.pool, self.max_lag, self.packs_rows = pool, max_lag, packs_rows
        self._asked: dict[str, Any] = {}
        """What is being sampled elsewhere, by the place of its micro-batch in the data."""
        self._saved: dict[str, Sampled] = {}
        """Answers that a checkpoint brought: sampled before it, trained on after it."""

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        return {} if self.reference is None else {"reference": self.reference}

    starts_at_reference = False
    """Whether the reference is the policy's own starting point; said by who builds both."""

    def check(self, batch: Batch) -> None:
        """Has the first rollouts looked at (trainers/self_checks.py)."""
        self._to_check = True

    @torch.no_grad()
    def _self_check(self, micro: Micro) -> None:
        piece = self._pieces(micro)[0]
        with self.autocast():
            (first, scored), (second, _) = self.score(self.model, piece), self.score(self.model, piece)
            self_checks.ratio_is_one(first.log_probs, second.log_probs)
            if self.packs_rows:
                self_checks.packing_has_no_influence(first, self.score(self.model, piece, packs_rows=False)[0])
            if "old_log_probs" in piece:
                self_checks.ratio_is_one(first.log_probs, piece["old_log_probs"][scored.rows, scored.steps])
            if self.reference is not None and self.starts_at_reference:
                self_checks.reference_is_near(first.log_probs, self.score(self.reference, piece)[0].log_probs)
            self_checks.answers_end_once(piece, self.sampler.end_tokens)
            self_checks.padding_has_no_influence(piece, self.train_step)

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """With a pool: batches are asked for `max_lag` batches before they are trained on."""
        if self.pool is None:
            yield from batches
            return
        waiting: deque[Batch] = deque()
        self.pool.load(self._weights())
        for batch in batches:
            waiting.append(batch)
            for micro in batch.micros:
                key = _place(batch, micro)
                self._asked[key] = self._saved.pop(key, None) or self.pool.submit(self._job(micro, batch))
            if len(waiting) > self.max_lag:
                yield waiting.popleft()
                self.pool.load(self._weights())
        yield from waiting

    def _weights(self) -> dict[str, Tensor]:
        inner = getattr(self.model, "module", self.model)
        with self.generation(), torch.no_grad():
            return {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in inner.named_parameters()}

    def _job(self, micro: Micro, batch: Batch) -> RolloutJob:
        mask = micro["segment_ids"] >= 0
        mask[:, 0] = True  # rows that fill up: see `_answered`
        seeds = [derive_seed("rollout", self.seed, batch.position.epoch, batch.position.row, int(place), number)
                 for place in micro["places"][:, 0] for number in range(self.group)]
        return RolloutJob(micro["input_ids"], mask, self.group, seeds)

    def _sample(self, micro: Micro, batch: Batch) -> tuple[Samples, Tensor | None]:
        """Answers to a micro-batch, here or from the pool; from there with their log-probabilities, (N, L)."""
        asked = self._asked.pop(_place(batch, micro), None)
        if asked is not None:
            found = self._result(asked)
            tokens, lengths, ended, log_probs = (t.to(self.device) for t in found)
            return Samples(tokens, lengths, ended), log_probs
        job = self._job(micro, batch)
        with self.generation():
            return self.sampler(self.model, job.prompts, job.mask, job.group, job.seeds), None

    def _result(self, asked: Any) -> Sampled:
        assert self.pool is not None
        return asked if isinstance(asked, Sampled) else self.pool.result(asked)

    def state_dict(self) -> dict[str, Any]:
        """With a pool: the answers that were sampled for the next batches already, of all ranks."""
        if self.pool is None:
            return {}
        self._asked = {key: self._result(asked) for key, asked in self._asked.items()}
        own = {key: [t.tolist() for t in sampled] for key, sampled in self._asked.items()}
        return {"sampled": {key: value for part in gather_objects(own) for key, value in part.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        types = (torch.long, torch.long, torch.bool, torch.float32)
        self._saved = {key: Sampled(*(torch.tensor(v, dtype=t) for v, t in zip(value, types, strict=True)))
                       for key, value in saved.get("sampled", {}).items()}

    def rollouts(self, batch: Batch) -> list[Micro]:
        """Answers to this rank's prompts, with rewards: a list of training micro-batches, one for each of prompts.

        To `training_rows` come `function_rewards` (N, F), `reward` (N, 1), which is their weighted sum plus `model_rewards`, and
        `counted` (N, 1).
        """
        self.samples = []
        return [self._answered({name: tensor.to(self.device) for name, tensor in micro.items()}, batch) for micro in batch.micros]

    def _answered(self, micro: Micro, batch: Batch, columns_of: Columns | None = None) -> Micro:
        """Answers to one micro-batch of prompts.

        Rows that fill up the last batch of an epoch have no prompt. They are sampled from like the others, since all ranks must
        do equally much under FSDP, and their answers have length 0: they count for nothing.
        """
        real = filled(micro)
        mask = micro["segment_ids"] >= 0
        mask[:, 0] = True
        samples, log_probs = self._sample(micro, batch)
        counted = real.repeat_interleave(self.group)
        samples = samples._replace(lengths=samples.lengths * counted, ended=samples.ended & counted)
        rows = training_rows(micro["input_ids"], mask, samples)
        given = torch.zeros(len(counted), len(self.rewards), dtype=torch.float64, device=self.device)
        chosen = counted.nonzero().squeeze(1).tolist()
        if chosen:
            ids = [micro["input_ids"][i // self.group][mask[i // self.group]].tolist() for i in chosen]
            answers = [samples.tokens[i, : samples.lengths[i]].tolist() for i in chosen]
            texts = [self.sampler.decode(answer) for answer in answers]
            columns = _gathered(columns_of or self.columns, [int(micro["documents"][i // self.group]) for i in chosen])
            if "prompts" not in columns:  # wired by hand: there are only tokens
                columns["prompts"] = [self.sampler.decode(prompt) for prompt in ids]
            columns.setdefault("prompt_texts", columns["prompts"])
            columns.update(prompt_ids=ids, completion_ids=answers)
            prompts = columns.pop("prompts")
            values = [reward(prompts, texts, columns) for reward in self.rewards]
            given[chosen] = torch.tensor(values, dtype=torch.float64, device=self.device).view(len(values), len(chosen)).T
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
        """(N,) what a reward model adds to the rewards of training rows; None: there is no reward model."""
        return None

    def _show(self, prompts: list[str], texts: list[str], rows: Micro) -> None:
        """The first answers of the first micro-batch, which rank 0 has whatever the number of ranks."""
        for i in range(min(len(texts), 0 if self.samples else _SHOWN)):
            parts = {r.name: float(v) for r, v in zip(self.rewards, rows["function_rewards"][i], strict=True)}
            if "model_rewards" in rows:
                parts["reward_model"] = float(rows["model_rewards"][i])
            self.samples.append({
                "prompt": prompts[i], "response": texts[i], "reward": float(rows["reward"][i]), "tokens": int(rows["lengths"][i]),
                "ended": bool(rows["ended"][i]), **(parts if len(parts) > 1 else {})})

    def score(self, model: nn.Module, rows: Micro, entropy: bool = False, weights: Tensor | None = None,
              packs_rows: bool | None = None) -> tuple[TokenScores, Scored]:
        """Scores of the answers' tokens under a model, at the temperature that they were sampled at.

        Args:
            weights: (N,) what each answer adds to `batch_weight`: also gives the loss of the routers, of a model that has any.
            packs_rows: compute the rows without their padding, several in one; default: the trainer's.
        """
        routing, computes = None, getattr(getattr(model, "module", model), "computes_token_losses", False)
        packs_rows = computes and (self.packs_rows if packs_rows is None else packs_rows)
        inputs, scored = packed_answers(rows) if packs_rows else padded_answers(rows)
        if computes and weights is not None:
            routing = routing_inputs(model, inputs["sequences"], weights)
        return score_tokens(model, inputs, scored.predictors, scored.targets, self.sampler.temperature, entropy, routing), scored

    def minibatches_of(self, micros: list[Micro]) -> Iterator[list[Micro]]:
        """`epochs` times: the micro-batches in `minibatches` equal parts, those too large for a forward pass cut up."""
        if self._to_check:
            self._to_check = False
            self._self_check(micros[0])
        for _ in range(self.epochs):
            for number in range(self.minibatches):
                part = micros[number * len(micros) // self.minibatches : (number + 1) * len(micros) // self.minibatches]
                yield [piece for micro in part for piece in self._pieces(micro)]

    def _pieces(self, micro: Micro) -> list[Micro]:
        count = len(micro["input_ids"])
        size = self.micro_size or count
        return [{name: tensor[first : first + size] for name, tensor in micro.items()} for first in range(0, count, size)]

    def rollout_metrics(self, micro: Micro) -> MetricPairs:
        """What is told of the answers of a micro-batch."""
        n = micro["counted"].sum()
        named: MetricPairs = {f"rewards/{reward.name}": (micro["function_rewards"][:, i].sum(), n) for i, reward in enumerate(self.rewards)}
        if "model_rewards" in micro:
            named["rewards/reward_model"] = (micro["model_rewards"].sum(), n)
        if self.pool is not None:
            named["rollout_lag"] = (float(self.max_lag), 1.0)
        return {**named, "reward": (micro["reward"].sum(), n), "length": (micro.get("sampled_lengths", micro["lengths"]).sum(), n),
                "ended": (micro["ended"].sum(), n), "tokens": (micro["lengths"].sum(), 1.0),
                "reward_failures": (float(sum(reward.failures for reward in self.rewards)), 1.0)}

    def evaluation_weight(self, micro: Micro) -> Tensor:
        """Prompts."""
        return filled(micro).sum()

    def evaluation_step(self, micro: Micro) -> StepOutput:
        """The mean reward of answers to held-out prompts; as loss, its negative."""
        rows = self._answered(micro, Batch([], Position(), Position(), 0), self.validation_columns)
        metrics = self.rollout_metrics(rows)
        return StepOutput(-rows["reward"].sum().double() / self.group, metrics)
