"""The tasks of `evaluation.tasks`, which a run evaluates together with its validation data.

Tasks on documents run with sharded parameters: every rank scores the same number of batches. Answers and tasks of
lm-evaluation-harness need complete parameters on every rank, in the context that sampling uses (`generation`); the
prompts and requests are divided over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common import distributed
from myllm_ray.common.progress import Task
from myllm_ray.common.seeds import preserved_random_state
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.evaluation_section import EvaluationTask
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.evaluation_rows import Batches
from myllm_ray.data.examples import PROMPTS, TOKENS
from myllm_ray.data.packing import Row
from myllm_ray.data.plan import RowPlan
from myllm_ray.data.prepare import PreparedData, pad_token_id
from myllm_ray.data.tokenizer import bytes_per_token
from myllm_ray.dependencies import kind_of_model, stop_tokens
from myllm_ray.evaluate import harness
from myllm_ray.evaluate.answers import Scorer, sample_answers, sampling
from myllm_ray.evaluate.losses import loss_metrics, loss_sums
from myllm_ray.models.generate import HFSampler
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.causal_lm import token_losses


def check_tasks(config: TrainerConfig, prepared: PreparedData) -> None:
    """Checks the tasks before a run starts: names, files, metrics, the data of the harness, and the backend.

    Raises:
        UserError: a task can't be evaluated in this run.
    """
    tasks = config.evaluation.tasks
    if not tasks:
        return
    if kind_of_model(config) == "reward_model":
        raise ConfigError(
            f"evaluation.tasks: trainer {config.trainer} trains a reward model, which predicts no tokens; remove them"
        )
    generates = []
    for number, (task, plan) in enumerate(zip(tasks, prepared.tasks, strict=True)):
        key = f"evaluation.tasks.{number}"
        if plan is None:
            harness.check_installed()
            harness.load_tasks(_harness_task(task), f"{key}.task")
        else:
            _check_data(task, plan, key)
        if plan is None or plan.store.kind == PROMPTS:
            generates.append(key)
    if generates and config.model.factory is not None:
        raise ConfigError(f"{generates[0]} needs a model of transformers: it can't be used with model.factory")
    if generates:
        accelerator: Accelerator = resolve("accelerators", config.accelerator.name, "accelerator.name")(config)
        accelerator.generation()  # raises an error if the backend can't gather its parameters


def _check_data(task: EvaluationTask, plan: RowPlan, key: str) -> None:
    kind, format = plan.store.kind, task.data and task.data.format
    if kind not in (TOKENS, PROMPTS):
        raise DataError(f"{key}.data: format {format} gives {kind}; a task needs documents or prompts")
    if kind == TOKENS and task.metrics:
        raise DataError(f"{key}.metrics: they score answers to prompts; data has format {format}, not prompt")
    if kind == PROMPTS and not task.metrics:
        raise DataError(f"{key}: prompts have no answers to score: give metrics, such as [exact_match]")
    for name in task.metrics:
        Scorer(name, f"{key}.metrics").check(plan.store)


def _harness_task(task: EvaluationTask) -> harness.HarnessTask:
    return harness.HarnessTask(task.task or "", task.task_folder, task.few_shot, task.limit)


def build_tasks(config: TrainerConfig, prepared: PreparedData, tokenizer: Any) -> TrainingTasks | None:
    """Returns the tasks of a run, or None if it has no tasks."""
    return TrainingTasks(config, prepared, tokenizer) if prepared.tasks else None


class _Context(NamedTuple):
    """What an evaluation of a task uses: the trained model on its backend, and `on_batch`, called before each batch."""

    trainer: BaseTrainer
    accelerator: Accelerator
    on_batch: Callable[[], None]

    def batches(self, plan: RowPlan, size: int, padded: bool) -> Iterator[list[Row]]:
        """Yields this rank's batches. `padded`: every rank gets the same number, at the end an empty row."""
        batches, rank, world = Batches(plan, size), distributed.rank(), distributed.world_size()
        for first in range(0, len(batches), world):
            self.on_batch()
            if first + rank < len(batches):
                yield batches[first + rank]
            elif padded:
                yield [[]]


class TrainingTasks:
    """Evaluates the tasks of a run. It changes neither the model nor the generators of random numbers.

    Args:
        config: the config of the run.
        prepared: the prepared data, with the rows of the tasks.
        tokenizer: the tokenizer of the run, which is not modified.
    """

    def __init__(self, config: TrainerConfig, prepared: PreparedData, tokenizer: Any):
        self.tokenizer, self.pad_id, self.seed = tokenizer, pad_token_id(tokenizer), config.run.seed
        self.sizes = torch.tensor(bytes_per_token(tokenizer))
        self.tasks = list(zip(config.evaluation.tasks, prepared.tasks, strict=True))
        self.micro_size = config.batch.micro_size
        self.end_tokens = stop_tokens(config.model, tokenizer)
        self._loaded: dict[int, Any] = {}

    def __call__(
        self, trainer: BaseTrainer, accelerator: Accelerator, on_batch: Callable[[], None]
    ) -> dict[str, float]:
        """Returns the metrics of all tasks, named `evaluation/<task>/<metric>`. Every rank calls this method.

        Args:
            trainer: the trainer, whose model is evaluated. The model is in training mode afterwards.
            accelerator: the backend.
            on_batch: called before each batch.
        """
        context, found = _Context(trainer, accelerator, on_batch), {}
        trainer.model.eval()
        with preserved_random_state():
            for number, (task, plan) in enumerate(self.tasks):
                with Task(f"evaluating {task.title}"):
                    if plan is None:
                        values = self._harness(number, task, context)
                    elif plan.store.kind == TOKENS:
                        values = {f"{task.title}/{k}": v for k, v in self._losses(task, plan, context).items()}
                    else:
                        values = {f"{task.title}/{k}": v for k, v in self._answers(task, plan, context).items()}
                found.update({f"evaluation/{name}": value for name, value in values.items()})
        trainer.model.train()
        return found

    def _losses(self, task: EvaluationTask, plan: RowPlan, context: _Context) -> dict[str, float]:
        trainer, accelerator, _ = context
        batches = context.batches(plan, task.batch_size or self.micro_size, padded=True)
        sums = loss_sums(
            trainer.model, plan.store, batches, self.pad_id, self.sizes, accelerator.device, accelerator.autocast
        )
        total = accelerator.all_reduce([sums])
        return loss_metrics(total) if total[1] else {}

    def _answers(self, task: EvaluationTask, plan: RowPlan, context: _Context) -> dict[str, float]:
        trainer, accelerator, _ = context
        sampler = HFSampler(self.tokenizer, sampling(task.max_new_tokens, task.temperature), self.end_tokens)
        batches = context.batches(plan, task.batch_size or self.micro_size, padded=False)
        with accelerator.generation():
            answers = sample_answers(
                trainer.model,
                sampler,
                plan.store,
                batches,
                self.pad_id,
                self.seed,
                accelerator.device,
                accelerator.autocast,
            )
        scorers = [Scorer(name, "evaluation.tasks") for name in task.metrics]
        sums = {scorer.name: sum(scorer(answers, plan.store)) for scorer in scorers}
        sums |= {
            "answer_length": float(sum(len(a.ids) for a in answers)),
            "ended": float(sum(a.ended for a in answers)),
        }
        *totals, count = accelerator.all_reduce([*sums.values(), float(len(answers))]).tolist()
        return {name: total / count for name, total in zip(sums, totals, strict=True)}

    def _harness(self, number: int, task: EvaluationTask, context: _Context) -> dict[str, float]:
        trainer, accelerator, on_batch = context
        on_batch()
        if number not in self._loaded:  # kept: the data is read once
            self._loaded[number] = harness.load_tasks(_harness_task(task), f"evaluation.tasks.{number}.task")
        with accelerator.generation():
            # The harness calls the wrapped model. FSDP needs that the outermost module runs before any other does.
            ids = torch.full((1, 8), self.pad_id, device=accelerator.device)
            token_losses(trainer.model, {"input_ids": ids, "labels": ids})
            metrics = harness.evaluate_tasks(
                trainer.model,
                self.tokenizer,
                self._loaded[number],
                task.batch_size or self.micro_size,
                task.limit,
                accelerator.autocast,
                several_ranks=distributed.world_size() > 1,
                errors=False,
                on_batch=on_batch,
            )
        found: dict[str, float] = distributed.from_main(metrics)
        return found
