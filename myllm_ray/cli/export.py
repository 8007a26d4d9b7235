"""The command `export`: a trained model in a form that other programs read, and its upload to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run's folder, or a checkpoint in it")],
    folder: Annotated[Path, typer.Argument(help="where to write")],
    to: Annotated[
        str,
        typer.Option(
            help="hf: a Hugging Face folder, adapters merged; merged: the same, for runs with adapters only; adapter: "
            "a PEFT folder; gguf: one file for llama.cpp; ema: hf with the averaged weights"
        ),
    ] = "hf",
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; default: that of the weights from which training started")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="largest size of a file of weights, such as 5GB; default: that of transformers")
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            help="logits: load the export and compare its logits; tensors: compare each tensor, with less memory; "
            "none; default: logits for models of up to 2 billion parameters, tensors for larger ones"
        ),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="license in the model card, such as apache-2.0; default: that of the base model")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="upload the folder to this repository of the Hugging Face hub")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="with --push: create a private repository")] = False,
) -> None:
    """Write the trained model in a form that other programs read, with a model card.

    The written model is loaded again and compared with the run's; if they differ, nothing is kept.
    """
    from myllm_ray.engine.reporting.console import progress_shown
    from myllm_ray.runs.export import ExportOptions, export_run
    from myllm_ray.runs.hub import check_adapter_base, check_push, push_folder

    if private and push is None:
        raise ConfigError("--private applies to --push REPO")
    options = ExportOptions(to, dtype, verify, max_shard_size, license)
    options.check()
    if push is not None:
        check_push(push)
        if to == "adapter":
            check_adapter_base(run)
    with progress_shown():
        done = export_run(run, folder, options)
    ends = ", ".join(done.opened.tokenizer.convert_ids_to_tokens(list(done.opened.end_tokens)))
    out.print(f"wrote {folder}: weights in {done.dtype}; answers end at {ends}", markup=False)
    out.print(
        "not verified (--verify none)" if done.verified == "none" else f"verified: the same {done.verified} as the run",
        style="dim",
    )
    if push is not None:
        with progress_shown():
            url = push_folder(folder, push, private)
        out.print(f"pushed to {url}", markup=False)
