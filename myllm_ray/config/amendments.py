"""Amendments: changes of a config within a run, each at a given optimizer step.

    run:
      amendments:
        - {at: 40, set: {optimizer.lr: 1.0e-4}}
        - {at: 90, set: {scheduler.name: linear, run.max_steps: 100}}

Let a_1 < a_2 < ... be the steps of the amendments. Steps 1 to a_1 train with the config as it is given, steps a_1 + 1
to a_2 with the first amendment applied, and so on. `effective` computes the config of a step; it is a pure function of
the config and of the step. A run is trained in one segment per amendment. It saves a checkpoint after the last step of
a segment, and the next segment resumes from it with its own config, like any run that resumes.

An amendment that sets a key of `scheduler` restarts the schedule: step a_i becomes its step 0 (`scheduler.start_step`).
The length of the warm-up and the end of the decay belong to the earlier schedule and are dropped, unless the amendment
sets them. All other amendments leave the schedule a function of the step within the whole run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.run_section import AmendmentSection, flat
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import rollout_of
from myllm_ray.config.validation import explain

CHANGEABLE = frozenset(
    {
        "batch.global_size",
        "batch.micro_size",
        "checkpoint.async",
        "checkpoint.at_end",
        "checkpoint.every_steps",
        "checkpoint.keep_best",
        "checkpoint.keep_every",
        "checkpoint.keep_last",
        "evaluation.at_end",
        "evaluation.every_steps",
        "evaluation.max_batches",
        "gradient_clip",
        "logging.every_steps",
        "logging.samples_every_steps",
        "optimizer.betas",
        "optimizer.eps",
        "optimizer.lr",
        "optimizer.weight_decay",
        "run.epochs",
        "run.max_steps",
        "scheduler.cycles",
        "scheduler.decay_ratio",
        "scheduler.decay_steps",
        "scheduler.min_lr_ratio",
        "scheduler.name",
        "scheduler.power",
        "scheduler.warmup_ratio",
        "scheduler.warmup_steps",
        "stability.hang_seconds",
        "stability.history",
        "stability.max_interventions",
        "stability.min_history",
        "stability.on_spike",
        "stability.window",
        "stability.zscore",
    }
)
"""The keys that an amendment can set."""

_STATE = "the optimizer's state in a checkpoint belongs to it"
_ON_RESUME = "it does not change the run's results: change it in the config when the run resumes"
REFUSED = {
    "trainer": "it determines what is trained: start a new run",
    "model": "the weights of a checkpoint belong to it: start a new run",
    "tokenizer": "the tokens of the data belong to it: start a new run",
    "data": "a position in the data, (epoch, row), belongs to one set of rows: to train the weights on other data, "
    "start a new run with model.name=RUN",
    "accelerator": "it is not a property of a step: change it in the config when the run resumes",
    "scaling": _ON_RESUME,
    "callbacks": _ON_RESUME,
    "tracking": _ON_RESUME,
    "options": "the settings of a trainer define its loss: start a new run",
    "batch.find_micro_size": "it applies before the first step",
    "optimizer.name": _STATE,
    "optimizer.momentum": _STATE,
    "optimizer.options": _STATE,
    "optimizer.groups": _STATE,
    "optimizer.fused": "it is not a property of a step: change it in the config when the run resumes",
    "ema": "the average in a checkpoint belongs to it: change it in the config when the run resumes",
    "scheduler.start_step": "an amendment of the schedule sets it to its own step",
    "logging.profile": _ON_RESUME,
    "run.budget": _ON_RESUME,
    "run.name": "it is the run's folder",
    "run.storage": "it is the run's folder",
    "run.seed": "order of the data and dropout are functions of it: start a new run",
    "run.determinism": "it selects kernels for the whole run: change it in the config when the run resumes",
    "run.overwrite": "it applies when the run starts",
    "run.amendments": "give its entries instead",
    "checkpoint.mirror": _ON_RESUME,
    "checkpoint.resume": "it applies when the run starts",
    "evaluation.at_start": "it applies before the first step",
    "evaluation.tasks": _ON_RESUME,
}
"""{key or section: why an amendment cannot set it}. A key that is in neither table is unknown."""


def value_of(raw: Mapping[str, Any], key: str) -> Any:
    """Returns the value of a dotted key, or None if it is missing."""
    value: Any = raw
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def refusal(cls: type[TrainerConfig], key: str) -> str | None:
    """Returns why an amendment cannot set a key, or None for a key that it can set and for an unknown key.

    Args:
        cls: the class of the run's config.
        key: the dotted key.
    """
    section = key.partition(".")[0]
    if section in cls.model_fields and section not in TrainerConfig.model_fields:
        return REFUSED["options"]  # the sections of the trainer
    parts = key.split(".")
    return next((REFUSED[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in REFUSED), None)


def applied(raw: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Returns a config, as plain data, with the amendments of the first `step` steps applied.

    Args:
        raw: the config as a mapping; it is not changed.
        step: number of completed optimizer steps.
    """
    changed = copy.deepcopy(dict(raw))
    for amendment in (raw.get("run") or {}).get("amendments") or []:
        if amendment["at"] > step:
            break
        given = flat(amendment["set"])
        if any(key.startswith("scheduler.") for key in given):
            given = {
                "scheduler.warmup_steps": None,
                "scheduler.warmup_ratio": None,
                "scheduler.decay_steps": None,
            } | given
            given["scheduler.start_step"] = amendment["at"]
        for key, value in given.items():
            *sections, last = key.split(".")
            target = changed
            for name in sections:
                if not isinstance(target.get(name), dict):
                    target[name] = {}
                target = target[name]
            target[last] = value
    return changed


def effective(config: TrainerConfig, step: int) -> TrainerConfig:
    """Returns the config of optimizer step `step` + 1: the given one with all amendments of earlier steps applied.

    The result contains the same `run.amendments`. Without such amendments it is `config` itself.

    Args:
        config: the config of the run.
        step: number of completed optimizer steps.

    Raises:
        ConfigError: an amendment is not valid.
    """
    due = [amendment.at for amendment in config.run.amendments if amendment.at <= step]
    if not due:
        return config
    raw = applied(config.model_dump(), step)
    try:
        return type(config).model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"run.amendments: at step {due[-1]}: {explain(error, type(config), raw)}") from None


def next_boundary(amendments: Iterable[AmendmentSection], step: int) -> int | None:
    """Returns the step at which the segment of step `step` + 1 ends, or None if it ends with the run."""
    return next((amendment.at for amendment in amendments if amendment.at > step), None)


def segments(config: TrainerConfig) -> Iterator[tuple[int, TrainerConfig]]:
    """Yields the segments of a run: the number of completed steps at which each begins, and its config."""
    steps = [amendment.at for amendment in config.run.amendments]
    for step in [*([] if 0 in steps else [0]), *steps]:
        yield step, effective(config, step)


def check_amendments(config: TrainerConfig) -> None:
    """Checks all amendments of a config, and converts their values to the types of the schema.

    YAML reads 1e-4 as a text, for example.

    Raises:
        ConfigError: an amendment sets a key that is unknown or can't change, or a value that is not valid.
    """
    before = config
    for amendment in config.run.amendments:
        where, given = f"run.amendments: at step {amendment.at}", amendment.set
        for key in given:
            reason = refusal(type(config), key)
            if reason is not None:
                raise ConfigError(f"{where}: {key} can't change within a run: {reason}")
        now = effective(config, amendment.at)
        problem = _problem(before, now, amendment.at, given)
        if problem is not None:
            raise ConfigError(f"{where}: {problem}")
        typed = now.model_dump(mode="json", include={key.partition(".")[0] for key in given})
        amendment.set = {key: value_of(typed, key) for key in given}
        before = now


def _problem(before: TrainerConfig, now: TrainerConfig, at: int, given: Mapping[str, Any]) -> str | None:
    """Returns why a valid amendment contradicts the run, or None.

    Args:
        before, now: the config before and after the amendment.
        at: its step.
        given: its values by dotted key.
    """
    per_batch = now.steps_per_batch
    if at % per_batch:
        return f"each batch makes {per_batch} optimizer steps, so the step must be a multiple of {per_batch}"
    # An amendment after the end of the run has no effect: a shorter run of the same config is valid.
    if now.run.max_steps is not None and now.run.max_steps < at and "run.max_steps" in given:
        return f"run.max_steps={now.run.max_steps} is before this step"
    if given.get("batch.micro_size") == "auto":
        return "batch.micro_size: auto applies before the first step: give a number"
    stages = now.data.mixture or []
    if now.run.max_steps != before.run.max_steps and any(stage.part for stage in stages[:-1]):
        return (
            "run.max_steps can't change: the stages of data.mixture are parts of it; give their ends (until) as steps"
        )
    if now.batch.global_size == before.batch.global_size:
        return None
    if len(stages) > 1:
        return "batch.global_size can't change: the stages of data.mixture end at rows of the run"
    rollout = rollout_of(now)
    if now.run.epochs is not None or before.run.epochs is not None:
        return (
            "batch.global_size can change only in a run with run.max_steps: it changes the number of steps of an epoch"
        )
    if rollout is not None and rollout.placement == "actors":
        return "batch.global_size can't change with rollout.placement=actors: answers are sampled in advance"
    if getattr(now.trainer_section, "reference", None) == "precomputed":
        key = f"{now.section_key}.reference"
        return f"batch.global_size can't change with {key}=precomputed: the table has the rows of the run's batches"
    return None
