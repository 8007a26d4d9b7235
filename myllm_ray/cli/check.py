"""Commands that check a config, a checkpoint or this machine, or describe them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from myllm_ray.cli.app import Config, Overrides, app
from myllm_ray.cli.tables import out, print_certificate, print_report, print_rows
from myllm_ray.common.files import write_json
from myllm_ray.config.amendments import segments
from myllm_ray.config.errors import CheckpointError
from myllm_ray.config.json_schema import json_schema
from myllm_ray.config.load import load_config


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
    from myllm_ray.engine.reporting.console import progress_shown
    from myllm_ray.preparation import absolute, prepare_data

    loaded = absolute(load_config(config, overrides or []))
    with progress_shown():
        prepared = prepare_data(loaded)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    if step is None:
        batches = -(-(loaded.run.max_steps or 0) // loaded.steps_per_batch)
        print_report(describe(prepared, tokenizer, batches), prepared.train.plan.packing.size)
        out.print(Text(f"packing: {prepared.packing}; {prepared.isolation}"))
        print_rows(prepared.train, prepared.train.plan.rows(0, 0, 2 if rows is None else rows), tokenizer)
        return
    sizes = [(at, amended.batch.global_size) for at, amended in segments(loaded)]
    position, batch, fingerprint = rows_of_step(prepared.train, step, loaded.steps_per_batch, sizes)
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


@app.command("verify-checkpoint")
def verify_checkpoint(
    path: Annotated[Path, typer.Argument(help="a checkpoint (step-...), or the folder of a run: all its checkpoints")],
) -> None:
    """Verify the checksums of all files of a checkpoint, or of every checkpoint of a run.

    Exit code 1: a file is damaged. The damaged files are listed.
    """
    from myllm_ray.engine.checkpointing.manager import CheckpointManager
    from myllm_ray.engine.checkpointing.verification import all_damage, read_manifest

    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a checkpoint (step-...) or the folder of a run")
    run = CheckpointManager(folder=path / "checkpoints")
    checkpoints = run.all() if run.folder.is_dir() else [path]
    if not checkpoints:
        raise CheckpointError(f"{path} has no checkpoint")
    damaged = False
    for checkpoint in checkpoints:
        found = all_damage(checkpoint)
        for line in found:
            print(line)
        if not found:
            files = read_manifest(checkpoint)["files"].values()
            count = f"{len(files)} file{'s' if len(files) != 1 else ''}"
            print(f"{checkpoint}: {count}, {sum(f['bytes'] for f in files):,} bytes, verified")
        damaged = damaged or bool(found)
    sys.exit(1 if damaged else 0)


@app.command()
def schema(
    trainer: Annotated[list[str] | None, typer.Option(help="import path of a custom trainer; repeatable")] = None,
    accelerator: Annotated[list[str] | None, typer.Option(help="of a custom accelerator; repeatable")] = None,
    callback: Annotated[list[str] | None, typer.Option(help="of a custom callback; repeatable")] = None,
    format: Annotated[list[str] | None, typer.Option(help="of a custom data format; repeatable")] = None,
    tracker: Annotated[list[str] | None, typer.Option(help="of a custom tracker; repeatable")] = None,
) -> None:
    """Print the JSON schema of a config, for editors, with the settings of custom components."""
    found = json_schema(trainer or [], accelerator or [], callback or [], format or [], tracker or [])
    print(json.dumps(found, indent=2, ensure_ascii=False))
