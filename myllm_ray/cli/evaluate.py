"""The command that measures trained models: evaluate."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError

if TYPE_CHECKING:
    from myllm_ray.evaluate.command import Settings

_SHARES = ("token_accuracy", "exact_match", "win_rate", "ended")


@app.command()
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(help="runs, checkpoints, folders in Hugging Face format, or hub ids", metavar="MODEL..."),
    ],
    data: Annotated[
        str | None, typer.Option(help="file, folder, glob or URL with documents, whose loss is measured, or prompts")
    ] = None,
    format: Annotated[
        str, typer.Option("--format", help="text, instruction, chat, prompt_completion, prompt, or my_pkg.my_mod:fn")
    ] = "text",
    field: Annotated[list[str] | None, typer.Option(help="NAME=COLUMN: renames a column; repeatable")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="number of documents; of each task, for --task")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="for prompts: exact_match, or my_pkg.my_mod:fn as for rewards; repeatable"),
    ] = None,
    win_rate: Annotated[
        str | None, typer.Option("--win-rate", help="a reward model that compares answers with those of --against")
    ] = None,
    against: Annotated[str | None, typer.Option(help="the other model of the win rate")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="a task of lm-evaluation-harness, or its YAML file; repeatable")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="folder with YAML files of further tasks")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="examples in the prompt of a task")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="largest number of tokens of an answer")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token at every step")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    seed: Annotated[int, typer.Option(help="seed of the answers")] = 0,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="tokens of a row; default: the run's, or at most 2048")
    ] = None,
    packing: Annotated[bool, typer.Option("--packing", help="pack documents into rows as the run does")] = False,
    score_prompts: Annotated[
        bool | None,
        typer.Option("--score-prompts/--no-score-prompts", help="include prompts in the loss; default: as the run"),
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16 (autocast)")] = "fp32",
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a forward pass")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, or cuda")] = "auto",
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="every checkpoint of a run, not only the newest")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="folder of the results; default: evaluations/ in the run or model folder")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="compute results again that exist already")] = False,
    cache: Annotated[Path | None, typer.Option(help="folder that keeps tokenized data; default: none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of the results, and nothing else")] = False,
) -> None:
    """Measure models: loss on documents, metrics of answers to prompts, win rates, tasks of lm-evaluation-harness."""
    given = dict(locals())
    with _only_json() if as_json else nullcontext():
        found = _evaluated(given)
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)


def _evaluated(given: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the results of all models, in the order of the command line."""
    from myllm_ray.engine.reporting.console import progress_shown
    from myllm_ray.evaluate.command import Evaluation
    from myllm_ray.evaluate.subjects import find_subjects

    settings = _settings(given)
    subjects = find_subjects(given["models"], given["all_checkpoints"])
    for subject in subjects:
        subject.check("causal_lm", "MODEL")
    with tempfile.TemporaryDirectory(prefix="myllm-ray-") as folder, progress_shown():
        evaluation = Evaluation(settings, given["cache"] or Path(folder))
        return [evaluation.of(subject) for subject in subjects]


def _settings(given: dict[str, Any]) -> Settings:
    """Returns the settings of the command line.

    Raises:
        ConfigError: options contradict each other, or have a wrong value.
    """
    from myllm_ray.config.sections import SourceSection
    from myllm_ray.config.validation import typed
    from myllm_ray.evaluate.answers import Scorer
    from myllm_ray.evaluate.command import Settings, check_device
    from myllm_ray.evaluate.harness import HarnessTask, check_installed
    from myllm_ray.evaluate.subjects import find_subject

    data, metrics, tasks = given["data"], given["metric"] or (), given["task"] or ()
    if data is None and not tasks:
        raise ConfigError("nothing to evaluate: give --data FILE or --task NAME")
    if data is None and (metrics or given["win_rate"]):
        raise ConfigError("--metric and --win-rate need prompts: give --data FILE --format prompt")
    if (given["win_rate"] is None) != (given["against"] is None):
        raise ConfigError("--win-rate REWARD_MODEL and --against MODEL belong together: give both")
    if not tasks and (given["task_folder"] is not None or given["few_shot"] is not None):
        raise ConfigError("--task-folder and --few-shot belong to --task NAME, which is missing")
    if given["precision"] not in ("fp32", "bf16"):
        raise ConfigError(f"--precision: unknown precision {given['precision']!r}; choose from fp32, bf16")
    if not given["top_p"]:
        raise ConfigError("--top-p must be greater than 0")
    check_device(given["device"])
    if tasks:
        check_installed()
    folder = given["task_folder"]
    source = {"path": data, "format": given["format"], "fields": _fields(given["field"]), "limit": given["limit"]}
    judge, other = given["win_rate"], given["against"]
    found = Settings(
        data=None if data is None else typed(SourceSection, source, "--data"),
        tasks=tuple(HarnessTask(n, folder and str(folder), given["few_shot"], given["limit"]) for n in tasks),
        metrics=tuple(metrics),
        scorers=tuple(Scorer(name) for name in metrics),
        judge=None if judge is None else find_subject(judge, "--win-rate"),
        against=None if other is None else find_subject(other, "--against"),
        **{name: given[name] for name in _SAME},
    )
    if found.judge is not None and found.against is not None:
        found.judge.check("reward_model", "--win-rate")
        found.against.check("causal_lm", "--against")
    return found


_SAME = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "sequence_length",
    "packing",
    "score_prompts",
    "precision",
    "batch_size",
    "device",
    "output",
    "again",
)
"""Options that are settings of the same name."""


def _fields(given: list[str] | None) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in given or ()]
    for name, _, column in pairs:
        if not name or not column:
            raise ConfigError(f"--field {name}: write NAME=COLUMN, such as answer=solution")
    return {name: column for name, _, column in pairs}


@contextmanager
def _only_json() -> Iterator[None]:
    """Sends what is printed in the block to standard error, so that standard output has only the result."""
    with redirect_stdout(sys.stderr):
        yield


def _print(found: list[dict[str, Any]]) -> None:
    """Prints the results as a table: one row per model, or one row per metric of a single model."""
    names = list(dict.fromkeys(name for result in found for name in result["metrics"]))
    if len(found) == 1:
        table = Table(title=str(found[0]["model"]), title_justify="left")
        for column in ("metric", "value"):
            table.add_column(column, justify="left" if column == "metric" else "right")
        for name in names:
            table.add_row(Text(name), _shown(found[0], name))
    else:
        table = Table()
        for column in ("model", "step", *names):
            table.add_column(Text(column), justify="left" if column == "model" else "right")
        for result in found:
            step = "–" if result["step"] is None else f"{result['step']:,}"
            table.add_row(Text(str(result["model"])), step, *(_shown(result, name) for name in names))
    out.print(table)
    for result in found:
        counts = ", ".join(f"{value:,} {name}" for name, value in result["counts"].items())
        kept = f"kept in {result['file']}" if result["file"] else "not kept; --output FOLDER keeps it"
        out.print(Text(f"{result['model']}: {counts + '; ' if counts else ''}{kept}", "dim"))
        if result["counts"].get("cut"):
            out.print(
                Text("documents that are longer than a row were cut: --sequence-length sets the length", "yellow")
            )


def _shown(result: dict[str, Any], name: str) -> Text:
    from myllm_ray.engine.reporting.terminal import number

    value, bounds = result["metrics"].get(name), result["intervals"].get(name)
    if value is None:
        return Text("–" if name not in result["metrics"] else "not finite")
    share = name in _SHARES
    shown = f"{value:.1%}" if share else number(value)
    if bounds is not None:
        low, high = (f"{b:.1%}" if share else number(b) for b in bounds)
        shown += f" ({low} to {high})"
    return Text(shown)
