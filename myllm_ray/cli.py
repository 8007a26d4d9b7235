"""The command line.

`myllm-ray train | sweep | lr-find | data | verify | doctor | sample | export | stop | submit | schema`.

An error that the user can fix is printed as one line on standard error, with exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from myllm_ray.cli_tables import out, print_certificate, print_report, print_rows
from myllm_ray.common.files import write_json
from myllm_ray.common.logs import show_progress
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.json_schema import json_schema
from myllm_ray.config.load import load_config

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train language models from one YAML file.",
)
EXIT_PREEMPTED = 75
"""Exit code of a run that stopped on request and saved a checkpoint (EX_TEMPFAIL of sysexits.h: try again later)."""

Config = Annotated[Path, typer.Argument(help="a YAML or JSON file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="overrides, such as optimizer.lr=1e-3", metavar="[KEY=VALUE]...")
]


def main() -> None:
    """Runs the command line and exits with its exit code."""
    show_progress()
    try:
        app()
    except UserError as error:
        print(mask_text(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False,
) -> None:
    """Train a model as the config describes."""
    from myllm_ray.orchestration.launch import train as run

    try:
        result = run(config, overrides or [], verbose)
    except KeyboardInterrupt:
        print("stopped without saving; the newest checkpoint is kept (resume: checkpoint.resume=auto)", file=sys.stderr)
        sys.exit(130)
    out.print(result.summary())
    if result.exit is not None:
        out.print(f"stopped early ({result.exit.reason}); to resume: the same command with checkpoint.resume=auto")
        sys.exit(EXIT_PREEMPTED)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="a sweep's YAML or JSON file")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="resume an interrupted sweep; trials that have ended are kept")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False,
) -> None:
    """Search for the best values of some keys of a config, with many runs."""
    from myllm_ray.config.sweep import load_sweep
    from myllm_ray.orchestration.sweeps.sweep import sweep as run

    try:
        result = run(load_sweep(file, overrides or []), resume=resume, verbose=verbose)
    except KeyboardInterrupt:
        print("stopped; trials that have ended are kept (--resume resumes the sweep)", file=sys.stderr)
        sys.exit(130)
    out.print(result.summary())
    if result.best_yaml is not None:
        out.print(f"train the best again: myllm-ray train {result.best_yaml}; all trials: {result.folder}/report.html")
    if result.exit_reason is not None:
        out.print(f"ended early ({result.exit_reason}); to resume: the same command with --resume")
        sys.exit(0 if result.exit_reason.startswith("budget") else EXIT_PREEMPTED)


@app.command()
def lr_find(
    config: Config,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-6,
    high: Annotated[float, typer.Option(help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(help="number of steps")] = 100,
) -> None:
    """Find a learning rate with a range test: one short run in which the learning rate increases."""
    from myllm_ray.orchestration.lr_find import find_lr

    loaded = load_config(config, overrides or [])
    found = find_lr(loaded, low, high, steps)
    out.print(found.summary())
    out.print(
        f"chart: {Path(loaded.run.storage) / loaded.run.name}-lr-find/lr_find.html; "
        "the value is approximate, a sweep refines it"
    )


@app.command()
def data(
    config: Config,
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(min=1, help="show the batch of this step (counted from 1)")] = None,
    rows: Annotated[
        int | None, typer.Option(min=0, help="number of rows to show; default: 2, or all rows of --step")
    ] = None,
) -> None:
    """Show the training data: documents, lengths, packing, and rows with the loss mask in colour."""
    from myllm_ray.data.inspect import describe, rows_of_step
    from myllm_ray.data.tokenizer import open_tokenizer
    from myllm_ray.preparation import absolute, prepare_data

    loaded = absolute(load_config(config, overrides or []))
    prepared = prepare_data(loaded)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    if step is None:
        print_report(describe(prepared, tokenizer), prepared.train.plan.packing.size)
        out.print(Text(f"packing: {prepared.packing}; {prepared.isolation}"))
        print_rows(prepared.train, prepared.train.plan.rows(0, 0, 2 if rows is None else rows), tokenizer)
        return
    position, batch, fingerprint = rows_of_step(prepared.train, step, loaded.steps_per_batch)
    out.print(
        f"step {step}: epoch {position.epoch}, rows {position.row} to {position.row + len(batch) - 1}, "
        f"tokens_hash {fingerprint:016x} (as in ledger.jsonl)"
    )
    print_rows(prepared.train, batch[:rows], tokenizer, position.row)


@app.command()
def verify(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="optimizer steps of each run")] = 5,
    workers: Annotated[int, typer.Option(min=2, help="number of workers of the distributed runs")] = 2,
    backend: Annotated[
        list[str] | None, typer.Option(help="only this backend; repeatable: ddp, fsdp, deepspeed-2, own, ...")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="write the certificate as JSON")] = None,
) -> None:
    """Check that a config trains the same run on every backend and for every split of its batch.

    The config is shrunk and trained several times. The runs are certified to be the same, or the differences are
    printed. Exit code 1: they differ.
    """
    from myllm_ray.verify.certificate import verify as run

    given = load_config(config, overrides or [])
    with out.status("verifying") as status:
        certificate = run(given, steps, backend, workers, tell=lambda line: status.update(f"verifying: {line}"))
    print_certificate(certificate)
    if output is not None:
        write_json(output, certificate.as_json())
    sys.exit(0 if certificate.holds else 1)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(help="a YAML or JSON file: checks packing with its model")] = None,
    overrides: Overrides = None,
) -> None:
    """Check which backends, precisions and devices work on this machine, and which models can be packed.

    Each combination of backend, precision and device runs one training step. The table contains the reasons of
    failures.
    """
    from myllm_ray.verify.doctor import examine

    table = Table(title_justify="left")
    for column in ("", "works", "why not"):
        table.add_column(column)
    for line in examine(None if config is None else load_config(config, overrides or [])):
        table.add_row(line.what, "[green]yes[/green]" if line.works else "[red]no[/red]", Text(line.detail))
    out.print(table)


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="a run's folder, a checkpoint in it, or a folder in Hugging Face format")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text to answer or to continue; repeatable")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    seed: int = 0,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="continue the prompt without the chat template; the names of special tokens in it are encoded as such",
        ),
    ] = False,
) -> None:
    """Sample from a trained model: answers from a chat model, continuations from any other model."""
    from myllm_ray.data.chat import tokenize_prompt
    from myllm_ray.data.messages import Messages
    from myllm_ray.models.causal_lm import CausalLM
    from myllm_ray.models.generate import sample as generate
    from myllm_ray.trained_model import open_trained

    opened = open_trained(run)
    model, tokenizer, chat = opened.model, opened.tokenizer, opened.on_chats and not raw
    if not isinstance(model, CausalLM):
        raise ConfigError(f"sample needs a causal language model of transformers; this one is {type(model).__name__}")
    if chat and not prompt:
        raise ConfigError("this is a chat model: give it a --prompt (-p), or --raw to sample without one")
    prompts = prompt or [tokenizer.eos_token]
    ids = [
        tokenize_prompt(Messages([{"role": "user", "content": given}]), tokenizer)[0]
        if chat
        else tokenizer(given, add_special_tokens=False)["input_ids"]
        for given in prompts
    ]
    out.print(
        Text(
            "each prompt is a turn of the user in the chat template (--raw: without the template)"
            if chat
            else "prompts are continued without a chat template",
            "dim",
        )
    )
    for given, text in zip(
        prompts, generate(model, tokenizer, ids, opened.end_tokens, max_new_tokens, temperature, seed=seed), strict=True
    ):
        out.rule(align="left", title="answer" if chat else "completion")
        out.print(Text.assemble((given, "dim"), "\n" if chat else "", (text, "bold")))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run's folder, or a checkpoint in it")],
    folder: Annotated[Path, typer.Argument(help="where to write")],
) -> None:
    """Write the trained model as a Hugging Face folder.

    The weights have the dtype of the weights from which training started.
    """
    from myllm_ray.models.export import save_pretrained
    from myllm_ray.trained_model import open_trained

    opened = open_trained(run)
    save_pretrained(opened.model, opened.tokenizer, folder, opened.generation, opened.dtype)
    ends = ", ".join(opened.tokenizer.convert_ids_to_tokens(list(opened.end_tokens)))
    out.print(
        f"wrote {folder}: weights in {str(opened.dtype).removeprefix('torch.')}; answers end at {ends}", markup=False
    )


@app.command()
def stop(
    run: Annotated[Path, typer.Argument(help="the folder of an active run")],
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until the run ends")] = 600,
) -> None:
    """Stop a run, which saves a checkpoint first. Exit code 1: it has not ended in time."""
    from myllm_ray.engine.liveness.hang_detector import stop as ask

    left = ask(run, wait)
    out.print(f"stopped; newest checkpoint: {left}" if left else f"the run has not ended after {wait:g} s")
    sys.exit(0 if left else 1)


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="address of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="folder that is uploaded to the cluster")] = Path(),
) -> None:
    """Run the config as a job on a Ray cluster and follow its output."""
    from myllm_ray.orchestration.submit import submit as run

    load_config(config, overrides or [])  # reports a wrong config before the upload
    sys.exit(run(str(config), overrides or [], address, working_dir))


@app.command()
def schema(
    trainer: Annotated[list[str] | None, typer.Option(help="import path of a custom trainer; repeatable")] = None,
    accelerator: Annotated[list[str] | None, typer.Option(help="of a custom accelerator; repeatable")] = None,
    callback: Annotated[list[str] | None, typer.Option(help="of a custom callback; repeatable")] = None,
    format: Annotated[list[str] | None, typer.Option(help="of a custom data format; repeatable")] = None,
) -> None:
    """Print the JSON schema of a config, for editors, with the settings of custom components."""
    found = json_schema(trainer or [], accelerator or [], callback or [], format or [])
    print(json.dumps(found, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
