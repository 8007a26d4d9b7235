"""The section `evaluation`: when a run is evaluated on held-out data, and the tasks that are evaluated with it."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from myllm_ray.config.mixture_section import refuse_share
from myllm_ray.config.sections import Section, SourceSection


class EvaluationTask(Section):
    """A task that a run evaluates during training: a file in a format of this package, or a task of lm-eval."""

    name: str | None = Field(
        None, description="its metrics are named evaluation/<name>/<metric>; default: the stem of the file"
    )
    data: SourceSection | None = Field(
        None, description="documents, whose loss is measured, or prompts (format prompt), which are answered"
    )
    metrics: list[str] = Field(
        default_factory=list,
        description="for prompts: exact_match (compares with the field `answer`), or import paths of functions as for "
        "rewards: my_pkg.my_mod:fn",
    )
    max_new_tokens: PositiveInt = Field(256, description="for prompts: the largest number of tokens of an answer")
    temperature: NonNegativeFloat = Field(0.0, description="for prompts: 0 selects the most likely token at every step")
    task: str | None = Field(
        None, description="a task or group of lm-evaluation-harness, or a YAML file (requires the extra `eval`)"
    )
    task_folder: str | None = Field(None, description="folder with YAML files of further tasks")
    few_shot: int | None = Field(
        None, ge=0, description="for `task`: number of examples in the prompt; default: the task's"
    )
    limit: PositiveInt | None = Field(None, description="use at most this many documents; for groups: of each task")
    batch_size: PositiveInt | None = Field(None, description="rows of a forward pass; default: batch.micro_size")

    @property
    def title(self) -> str:
        """The name in the metrics of the run."""
        if self.name is not None or self.data is None:
            return self.name or self.task or ""
        path = self.data.path[0] if isinstance(self.data.path, list) else self.data.path
        return self.data.name or self.data.source or PurePosixPath(path or "").stem

    @model_validator(mode="after")
    def _one(self) -> EvaluationTask:
        if (self.data is None) == (self.task is None):
            raise ValueError("give exactly one of data (a file) and task (a task of lm-evaluation-harness)")
        if self.data is not None:
            refuse_share(self.data)
        if self.task is not None and (self.metrics or self.name):
            raise ValueError("name and metrics belong to data; a task of lm-evaluation-harness has its own")
        if self.data is not None and (self.few_shot is not None or self.task_folder is not None):
            raise ValueError("few_shot and task_folder belong to task (lm-evaluation-harness), not to data")
        if self.data is not None and not self.title:
            raise ValueError("give the task a name: its file has none")
        return self


class EvaluationSection(Section):
    """When to evaluate, on the validation data and on tasks."""

    every_steps: PositiveInt | None = None
    at_start: bool = False
    at_end: bool = True
    max_batches: PositiveInt | None = Field(None, description="number of global batches per evaluation; default: all")
    tasks: list[EvaluationTask] = Field(
        default_factory=list,
        description="evaluated together with the validation data: files, such as {name: math, data: {path: math.jsonl, "
        "format: prompt}, metrics: [exact_match]}, and names of tasks of lm-evaluation-harness",
    )

    @field_validator("tasks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """Accepts the name of a task of lm-evaluation-harness for {task: name}."""
        return [{"task": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @model_validator(mode="after")
    def _unique(self) -> EvaluationSection:
        seen: set[str] = set()
        for task in self.tasks:
            if task.title in seen:
                raise ValueError(f"two tasks have the name {task.title!r}: set name of one of them")
            seen.add(task.title)
        return self
