"""Evaluates one model after another, as `myllm-ray evaluate` does."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from myllm_ray.common.progress import Task, track
from myllm_ray.common.types import Isolation
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.cache import DataCache
from myllm_ray.data.evaluation_rows import Batches, digest, rows_of
from myllm_ray.data.examples import PROMPTS, TOKENS, LengthLimits
from myllm_ray.data.packing import Row
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.prepare import packing_of, packs, pad_token_id, save_in_cache, token_store
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import TokenizeOptions
from myllm_ray.data.tokenizer import TRAINED, bytes_per_token, fingerprint
from myllm_ray.evaluate import harness, results
from myllm_ray.evaluate.answers import Answer, Scorer, interval, sample_answers, sampling
from myllm_ray.evaluate.losses import loss_metrics, loss_sums
from myllm_ray.evaluate.subjects import Subject
from myllm_ray.evaluate.win_rate import Judge, WinRate, compare
from myllm_ray.models.generate import HFSampler
from myllm_ray.trained_model import TrainedModel, open_trained

log = logging.getLogger(__name__)
_LONGEST = 2048
"""The default length of a row in tokens, for a model without a run."""


@dataclass(frozen=True)
class Settings:
    """What to evaluate, and how.

    Attributes:
        data: the documents or prompts; None: only tasks of the harness.
        tasks: tasks of lm-evaluation-harness.
        metrics: names of the metrics of answers.
        judge, against: the reward model and the other model of the win rate.
        max_new_tokens, temperature, top_p, seed: settings of the answers.
        sequence_length: length of a row in tokens; None: that of the run, or the model's maximum, at most 2048.
        packing: pack documents into rows as the run does.
        score_prompts: include the tokens of prompts in the loss; None: as the run does.
        precision: fp32, or bf16 for forward passes under autocast.
        batch_size: rows or requests per forward pass.
        device: auto, cpu or cuda.
        output: folder of the results; None: beside the model.
        again: compute results that exist already.
        scorers: the metrics of `metrics`, opened.
    """

    data: SourceSection | None = None
    tasks: tuple[harness.HarnessTask, ...] = ()
    metrics: tuple[str, ...] = ()
    judge: Subject | None = None
    against: Subject | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    sequence_length: int | None = None
    packing: bool = False
    score_prompts: bool | None = None
    precision: str = "fp32"
    batch_size: int = 8
    device: str = "auto"
    output: Path | None = None
    again: bool = False
    scorers: tuple[Scorer, ...] = field(default=(), compare=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """Returns the context of the forward passes."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    @cached_property
    def torch_device(self) -> torch.device:
        """The device of the model."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass
class Evaluation:
    """An evaluation of several models with the same settings.

    Args:
        settings: what to evaluate.
        cache: folder for tokenized data.
    """

    settings: Settings
    cache: Path

    @cached_property
    def loaded(self) -> list[Any]:
        """The tasks of the harness."""
        return [harness.load_tasks(task) for task in self.settings.tasks]

    @cached_property
    def described(self) -> dict[str, Any]:
        """The settings that determine the result, and the hashes of the data, as JSON values."""
        s = self.settings
        found: dict[str, Any] = {"precision": s.precision}
        if s.data is not None:
            source = s.data.model_dump(exclude={"path", "name", "weight", "share", "source"})
            names = ("sequence_length", "packing", "score_prompts")
            found |= {"data": {"sha256": digest(s.data, "--data"), **source, **{n: getattr(s, n) for n in names}}}
        if s.metrics or s.judge is not None:
            found["answers"] = {n: getattr(s, n) for n in ("max_new_tokens", "temperature", "top_p", "seed")}
            found["metrics"] = list(s.metrics)
        if s.judge is not None and s.against is not None:
            found["win_rate"] = {"judge": s.judge.identity, "against": s.against.identity}
        if s.tasks:
            hashes = zip(s.tasks, self.loaded, strict=True)
            found["tasks"] = [{**task._asdict(), "sha256": harness.digest(loaded)} for task, loaded in hashes]
            for entry in found["tasks"]:
                del entry["folder"]
            found["lm_eval"] = importlib.metadata.version("lm_eval")
        return found

    @cached_property
    def judge(self) -> Judge:
        """The reward model of the win rate."""
        s = self.settings
        assert s.judge is not None
        with Task(f"loading the reward model {s.judge.name}"):
            opened = self.opened(s.judge)
        return Judge(opened.model, opened.tokenizer, s.torch_device, s.autocast, s.batch_size)

    @cached_property
    def others(self) -> tuple[list[Answer], TokenStore]:
        """The answers of the model that the others are compared with, and its prompts."""
        assert self.settings.against is not None
        with Task(f"loading {self.settings.against.name}"):
            opened = self.opened(self.settings.against)
        plan = self.rows(self.settings.against, opened)
        return self.answers(opened, plan), plan.store

    def opened(self, subject: Subject) -> TrainedModel:
        """Returns a model on the device, in evaluation mode."""
        opened = open_trained(subject.path)
        opened.model.requires_grad_(False).eval().to(self.settings.torch_device)
        return opened

    def of(self, subject: Subject) -> dict[str, Any]:
        """Returns the result of a model, from its file if it exists.

        Returns:
            A JSON object: `model`, `step`, `identity`, `metrics` (numbers by name), `intervals` (95 % confidence
            intervals), `counts`, `settings`, and `file`, where the result is kept, or None.
        """
        s = self.settings
        path = results.path_of(subject, results.key_of(subject, self.described), s.output)
        found = None if s.again else results.read(path)
        if found is not None:
            log.info("%s: read from %s (--again computes it again)", subject.name, path)
            return {**found, "model": subject.name, "file": str(path)}
        started = time.monotonic()
        with Task(f"loading {subject.name}"):
            opened = self.opened(subject)
        measured: dict[str, Any] = {"metrics": {}, "intervals": {}, "counts": {}}
        if s.data is not None:
            plan = self.rows(subject, opened)
            part = self.losses(opened, plan) if plan.store.kind == TOKENS else self.answered(opened, plan)
            for name, values in part.items():
                measured[name] |= values
        for task, loaded in zip(s.tasks, self.loaded, strict=True):
            with Task(f"evaluating {task.name}"):
                measured["metrics"] |= harness.evaluate_tasks(
                    opened.model, opened.tokenizer, loaded, s.batch_size, task.limit, s.autocast
                )
        result = {
            "version": results.VERSION,
            "model": subject.name,
            "step": subject.step,
            "identity": subject.identity,
            **results.finite(measured),
            "settings": {**self.described, "path": s.data.path if s.data else None, "batch_size": s.batch_size},
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            "time": time.time(),
            "seconds": round(time.monotonic() - started, 3),
        }
        kept = path is not None and results.write(path, result)
        return {**result, "file": str(path) if kept else None}

    def rows(self, subject: Subject, opened: TrainedModel) -> RowPlan:
        """Returns the rows of the data, tokenized for a model.

        Raises:
            DataError: the data has a format that can't be evaluated, or lacks what a metric needs.
            ConfigError: the settings do not fit the model or the data.
        """
        s, config = self.settings, subject.config
        assert s.data is not None
        tokenizer = opened.tokenizer
        if tokenizer.chat_template is not None:  # as in training, where the default template has no prefix
            tokenizer.chat_template = tokenizer.chat_template.removeprefix(TRAINED)
        most = _positions(opened.model)
        if s.sequence_length is not None and s.sequence_length > most:
            raise ConfigError(
                f"--sequence-length={s.sequence_length} exceeds the maximum of {subject.name}, {most} positions"
            )
        folder = self.cache / f"tokenizer-{fingerprint(tokenizer)}"
        save_in_cache(tokenizer, folder)
        room = (s.sequence_length or most) - s.max_new_tokens
        if room < 1 and (s.metrics or s.judge is not None):
            raise ConfigError(
                f"--max-new-tokens={s.max_new_tokens} leaves no tokens for a prompt in {s.sequence_length or most}: "
                "give fewer, or a larger --sequence-length"
            )
        scored = config is not None and config.trainer_section.trains_on_prompt
        options = TokenizeOptions(
            {}, "error", scored if s.score_prompts is None else s.score_prompts, LengthLimits(max(1, room))
        )
        store = token_store(DataCache(self.cache), folder, [(s.data, "--data")], options)
        self._check_kind(store)
        return rows_of(store, self._packing(subject, min(most, _LONGEST)))

    def _packing(self, subject: Subject, default: int) -> Packing:
        """Returns the packing of documents: one per row, or as in the run."""
        s, config = self.settings, subject.config
        size = s.sequence_length or (config.data.sequence_length if config is not None else default)
        if config is None:
            if s.packing:
                raise ConfigError(f"--packing: {subject.name} is not a run or a checkpoint, which record their packing")
            return Packing("none", size, "truncate")
        own = packing_of(config, subject.isolation)
        if s.packing and not packs(config, subject.isolation or Isolation(None, "not recorded")):
            raise ConfigError(f"--packing: {subject.name} does not pack documents: leave it out")
        return Packing(own.kind if s.packing else "none", size, own.overflow)

    def _check_kind(self, store: TokenStore) -> None:
        s = self.settings
        if store.kind not in (TOKENS, PROMPTS):
            raise DataError(
                f"--format {s.data and s.data.format}: evaluate measures the loss on documents (text, instruction, "
                "chat, prompt_completion) and answers to prompts (prompt), not preferences"
            )
        wanted = bool(s.metrics) or s.judge is not None
        if store.kind == TOKENS and wanted:
            raise DataError(
                f"--format {s.data and s.data.format}: --metric and --win-rate need prompts to answer: give data "
                "with the field prompt, and --format prompt"
            )
        if store.kind == PROMPTS and not wanted:
            raise DataError("--format prompt: prompts have no answers to score: give --metric or --win-rate")
        for scorer in s.scorers if store.kind == PROMPTS else ():
            scorer.check(store)

    def _batches(self, plan: RowPlan, name: str) -> Iterator[list[Row]]:
        batches = Batches(plan, self.settings.batch_size)
        return track(batches, name, len(batches))

    def losses(self, opened: TrainedModel, plan: RowPlan) -> dict[str, dict[str, Any]]:
        """Returns the metrics of documents."""
        s, pad = self.settings, pad_token_id(opened.tokenizer)
        sizes = torch.tensor(bytes_per_token(opened.tokenizer))
        batches = self._batches(plan, "scoring documents")
        sums = loss_sums(opened.model, plan.store, batches, pad, sizes, s.torch_device, s.autocast)
        if not sums[1]:
            raise DataError("--data contains no token that the loss includes: nothing to score")
        counts = {"documents": len(plan.store), "tokens": int(sums[1]), "bytes": int(sums[3])}
        cut = plan.store.longer_than(plan.packing.size) if plan.packing.overflow == "truncate" else 0
        return {"metrics": loss_metrics(sums), "counts": {**counts, **({"cut": cut} if cut else {})}}

    def answers(self, opened: TrainedModel, plan: RowPlan) -> list[Answer]:
        """Returns the answers of a model to all prompts."""
        s = self.settings
        sampler = HFSampler(opened.tokenizer, sampling(s.max_new_tokens, s.temperature, s.top_p), opened.end_tokens)
        pad, batches = pad_token_id(opened.tokenizer), self._batches(plan, "answering prompts")
        return sample_answers(opened.model, sampler, plan.store, batches, pad, s.seed, s.torch_device, s.autocast)

    def answered(self, opened: TrainedModel, plan: RowPlan) -> dict[str, dict[str, Any]]:
        """Returns the metrics of the answers to prompts."""
        s = self.settings
        answers = self.answers(opened, plan)
        count = len(answers)
        values = {scorer.name: scorer(answers, plan.store) for scorer in s.scorers}
        measured: dict[str, dict[str, Any]] = {
            "metrics": {
                "answer_length": sum(len(a.ids) for a in answers) / count,
                "ended": sum(a.ended for a in answers) / count,
            },
            "counts": {"prompts": count},
        }
        if s.judge is not None:
            others, store = self.others
            won: WinRate = compare(self.judge, answers, others, plan.store, store)
            values["win_rate"] = won.outcomes
            measured["counts"] |= won.counts
            for name, number in (("reward", 0), ("reward_of_other", 1)):
                measured["metrics"][name] = sum(pair[number] for pair in won.rewards) / count
        measured["metrics"] = {n: sum(v) / count for n, v in values.items()} | measured["metrics"]
        measured["intervals"] = {name: list(interval(v)) for name, v in values.items()}
        return measured


def check_device(name: str) -> None:
    """Checks that there is such a device.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device: unknown device {name!r}; choose from auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device on this machine; use --device cpu")


def _positions(model: torch.nn.Module) -> int:
    """Returns the largest number of positions of a model; 2**20 if its config does not state it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or 2**20)
