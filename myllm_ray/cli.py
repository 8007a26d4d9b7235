"""The command line: `myllm-ray train | sweep | lr-find | data | verify | doctor | sample | export | submit | schema`.

Errors that are the user's to fix are one line on standard error and exit code 2.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from myllm_ray.common.files import write_json
from myllm_ray.common.logs import show_progress
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.load import json_schema, load_config

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Train language models from one YAML file.")
EXIT_LEFT = 75
"""A run that was asked to stop, and saved first (sysexits.h: EX_TEMPFAIL, try again later)."""
out = Console(highlight=False, soft_wrap=True)

Config = Annotated[Path, typer.Argument(help="a YAML or JSON file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, such as optimizer.lr=1e-3", metavar="[KEY=VALUE]...")]


def main() -> None:
    """Entry point."""
    show_progress()
    try:
        app()
    except UserError as error:
        print(mask_text(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def train(config: Config, overrides: Overrides = None,
          verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False) -> None:
    """Train to the end of the config."""
    from myllm_ray.orchestration.launch import train as run

    try:
        result = run(config, overrides or [], verbose)
    except KeyboardInterrupt:
        print("stopped at once; the newest checkpoint is kept (checkpoint.resume=auto goes on from it)", file=sys.stderr)
        sys.exit(130)
    out.print(result.summary())
    if result.left is not None:
        out.print(f"stopped before its end ({result.left}); to go on: the same command with checkpoint.resume=auto")
        sys.exit(EXIT_LEFT)


@app.command()
def sweep(file: Annotated[Path, typer.Argument(help="a sweep's YAML or JSON file")], overrides: Overrides = None,
          resume: Annotated[bool, typer.Option("--resume", help="go on with an interrupted sweep; what has ended stays")] = False,
          verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False) -> None:
    """Search for the best values of some keys of a config, many runs at a time."""
    from myllm_ray.config.sweep import load_sweep
    from myllm_ray.orchestration.sweeps.sweep import sweep as run

    try:
        result = run(load_sweep(file, overrides or []), resume=resume, verbose=verbose)
    except KeyboardInterrupt:
        print("stopped at once; trials that have ended are kept (--resume goes on)", file=sys.stderr)
        sys.exit(130)
    out.print(result.summary())
    if result.best_yaml is not None:
        out.print(f"train it again: myllm-ray train {result.best_yaml}; all trials: {result.folder}/report.html")
    if result.left is not None:
        out.print(f"ended early ({result.left}); to go on: the same command with --resume")
        sys.exit(0 if result.left.startswith("budget") else EXIT_LEFT)


@app.command()
def lr_find(config: Config, overrides: Overrides = None,
            low: Annotated[float, typer.Option(help="the learning rate of the first step")] = 1e-6,
            high: Annotated[float, typer.Option(help="of the last step")] = 1.0,
            steps: Annotated[int, typer.Option(help="how many")] = 100) -> None:
    """Find a learning rate by one short run in which it grows (a range test)."""
    from myllm_ray.orchestration.lr_find import find_lr

    loaded = load_config(config, overrides or [])
    found = find_lr(loaded, low, high, steps)
    out.print(found.summary())
    out.print(f"chart: {Path(loaded.run.storage) / loaded.run.name}-lr-find/lr_find.html; it is a start, not an end: a sweep looks more closely")


@app.command()
def data(config: Config, overrides: Overrides = None,
         step: Annotated[int | None, typer.Option(min=1, help="show the batch of this step (counted from 1)")] = None,
         rows: Annotated[int | None, typer.Option(min=0, help="how many rows to show; default: 2, or all of the step's")] = None) -> None:
    """Show what training will see: documents, lengths, packing, and rows with the loss mask coloured."""
    from myllm_ray.data.inspect import describe, rows_of_step
    from myllm_ray.data.tokenizer import open_tokenizer
    from myllm_ray.worker import absolute, prepare_data

    prepared = prepare_data(absolute(load_config(config, overrides or [])))
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    if step is None:
        _print_report(describe(prepared, tokenizer), prepared.train.plan.packing.size)
        out.print(Text(f"packing: {prepared.packing}; {prepared.isolation}"))
        _print_rows(prepared.train, prepared.train.plan.rows(0, 0, 2 if rows is None else rows), tokenizer)
        return
    position, batch, fingerprint = rows_of_step(prepared.train, step)
    out.print(f"step {step}: epoch {position.epoch}, rows {position.row} to {position.row + len(batch) - 1}, "
              f"tokens_hash {fingerprint:016x} (as in ledger.jsonl)")
    _print_rows(prepared.train, batch[:rows], tokenizer, position.row)


def _print_report(report: Any, size: int) -> None:
    table = Table(title="training data", title_justify="left")
    for column in ("source", "documents", "tokens", "rows skipped", "duplicates"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source in report.sources:
        table.add_row(source.name, f"{source.documents:,}", f"{source.tokens:,}", f"{source.skipped:,}", f"{source.duplicates:,}")
    out.print(table)
    most = max(count for *_, count in report.histogram)
    out.print("tokens per document:")
    for low, high, count in report.histogram:
        out.print(f"  {low:>7,} – {high:<7,} {count:>9,} {'█' * round(40 * count / most)}")
    out.print(f"rows of {size} tokens per epoch: {report.rows:,} ({report.steps_per_epoch:,} steps); packing fills "
              f"{report.efficiency:.1%}; loss on {report.trained_share:.1%} of the tokens; validation rows: "
              f"{report.validation_rows:,}")
    if report.longer_than_row:
        out.print(f"{report.longer_than_row:,} documents are longer than a row (data.overflow says what happens to them)")
    for source in report.sources:
        if source.skipped:
            out.print(f"[yellow]{source.name}: {source.skipped} rows skipped, the first: {source.first_skipped}[/yellow]")
    for warning in report.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def _print_rows(spec: Any, rows: list[Any], tokenizer: Any, first: int = 0) -> None:
    from myllm_ray.data.inspect import label_of, part_names, pieces

    names = part_names(spec.plan.store.kind)
    if not out.is_terminal and rows:
        out.print("(trained on: ⟦…⟧)")
    for number, row in enumerate(rows, first):
        filled = sum(s.length for s in row)
        out.rule(f"row {number}: {filled} tokens, documents {', '.join(str(s.document) for s in row) or 'none (filling)'}",
                 align="left")
        text, shown = Text(), 0
        for number_of_part, piece, trained in pieces(spec, row, tokenizer):
            for name in names[shown : number_of_part + 1]:
                text.append(f"{name}: " if not shown else f"\n{name}: ", style="bold")
                shown += 1
            text.append(piece if out.is_terminal or not trained else f"⟦{piece}⟧", style="green" if trained else "dim")
        if label := label_of(spec, row):
            text.append(f"\n({label})", style="bold")
        out.print(text)


@app.command()
def verify(config: Config, overrides: Overrides = None,
           steps: Annotated[int, typer.Option(min=2, help="optimizer steps of each run")] = 5,
           workers: Annotated[int, typer.Option(min=2, help="the larger number of workers")] = 2,
           backend: Annotated[list[str] | None, typer.Option(help="only these; repeatable: ddp, fsdp, deepspeed-2, own, ...")]
           = None, output: Annotated[Path | None, typer.Option(help="write the certificate as JSON")] = None) -> None:
    """Shrink the config, train it many ways, and certify that all train the same run, or name what differs. Exit code 1: it differs."""
    from myllm_ray.verify.certificate import verify as run

    given = load_config(config, overrides or [])
    with out.status("verifying") as status:
        certificate = run(given, steps, backend, workers, tell=lambda line: status.update(f"verifying: {line}"))
    _print_certificate(certificate)
    if output is not None:
        write_json(output, certificate.as_json())
    sys.exit(0 if certificate.holds else 1)


def _print_certificate(certificate: Any) -> None:
    table = Table(title=f"shrunk: {certificate.shrunk}", title_justify="left")
    for column in ("backend", "workers", "micro", "loss", "grad norm", "lr", "weights", "packing", "kB/rank", ""):
        table.add_column(column, justify="left" if column in ("backend", "") else "right", no_wrap=True)
    bad = {f.variant for f in certificate.findings}
    for variant, apart in certificate.rows:
        shown = [f"{apart[name]:.1e}" for name in ("loss", "grad_norm", "learning_rate", "weights")]
        shown.append(f"{apart['packing']:.1e}" if "packing" in apart else "–")
        table.add_row(variant.backend, str(variant.workers), str(variant.micro_size), *shown, f"{apart['bytes_per_rank'] / 1000:.0f}",
                      "[red]differs[/red]" if variant in bad else "same")
    out.print(table)
    out.print("(largest relative differences from one process with the whole batch at once; "
              f"loss and gradient norm may differ by {certificate.tolerance:g}; packing: of the first step from the same documents "
              "each in a row of its own; kB of parameters that the fullest rank holds)")
    out.print(Text(f"packing: {certificate.packing}"))
    out.print(Text(f"end tokens: {certificate.end_tokens}"))
    for variant, reason in certificate.left_out:
        out.print(Text(f"left out: {variant}: {reason}", style="dim"))
    for finding in certificate.findings:
        out.print(Text(str(finding), style="red"))
    if certificate.holds:
        out.print(f"certified: {len(certificate.rows)} ways to train this config are the same run")
    else:
        kinds = [finding.kind for finding in certificate.findings]
        others = {"packing": "; packing changes the loss", "end tokens": "; no end token is trained on"}
        differ = sum(kind not in others for kind in kinds)
        out.print(f"not certified: {differ} of {len(certificate.rows)} runs differ" + "".join(others[k] for k in kinds if k in others))


@app.command()
def doctor(config: Annotated[Path | None, typer.Argument(help="a YAML or JSON file: packing is tried with its model")] = None,
           overrides: Overrides = None) -> None:
    """Tell which backends, precisions and devices work here, by a training step each, which models are packed, and why the others are not."""
    from myllm_ray.verify.doctor import examine

    table = Table(title_justify="left")
    for column in ("", "works", "why not"):
        table.add_column(column)
    for line in examine(None if config is None else load_config(config, overrides or [])):
        table.add_row(line.what, "[green]yes[/green]" if line.works else "[red]no[/red]", Text(line.detail))
    out.print(table)


@app.command()
def sample(run: Annotated[Path, typer.Argument(help="a run's folder, a checkpoint in it, or a folder in Hugging Face format")],
           prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="what to answer or to continue; repeatable")] = None,
           max_new_tokens: Annotated[int, typer.Option(min=1)] = 64, temperature: Annotated[float, typer.Option(min=0)] = 0.8,
           seed: int = 0, raw: Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without the chat template; "
                                                            "special tokens in it are special tokens")] = False) -> None:
    """Sample from a trained model: answers of a chat model, continuations of any other."""
    from myllm_ray.data.chat import tokenize_prompt
    from myllm_ray.data.messages import Messages
    from myllm_ray.models.causal_lm import CausalLM
    from myllm_ray.models.generate import sample as generate
    from myllm_ray.worker import open_trained

    opened = open_trained(run)
    model, tokenizer, chat = opened.model, opened.tokenizer, opened.on_chats and not raw
    if not isinstance(model, CausalLM):
        raise ConfigError(f"sample needs a causal language model of transformers; this one is {type(model).__name__}")
    if chat and not prompt:
        raise ConfigError("this is a chat model: give it a --prompt (-p), or --raw to sample without one")
    prompts = prompt or [tokenizer.eos_token]
    ids = [tokenize_prompt(Messages([{"role": "user", "content": given}]), tokenizer)[0] if chat else
           tokenizer(given, add_special_tokens=False)["input_ids"] for given in prompts]
    out.print(Text("prompts are a user's turns, by the chat template (--raw: as they are)" if chat else "prompts are continued as they are", "dim"))
    for given, text in zip(prompts, generate(model, tokenizer, ids, opened.end_tokens, max_new_tokens, temperature, seed=seed), strict=True):
        out.rule(align="left", title="answer" if chat else "completion")
        out.print(Text.assemble((given, "dim"), "\n" if chat else "", (text, "bold")))


@app.command()
def export(run: Annotated[Path, typer.Argument(help="a run's folder, or a checkpoint in it")],
           folder: Annotated[Path, typer.Argument(help="where to write")]) -> None:
    """Write the trained model as a plain Hugging Face folder, in the dtype of the weights that training began from."""
    from myllm_ray.models.export import save_pretrained
    from myllm_ray.worker import open_trained

    opened = open_trained(run)
    save_pretrained(opened.model, opened.tokenizer, folder, opened.generation, opened.dtype)
    ends = ", ".join(opened.tokenizer.convert_ids_to_tokens(list(opened.end_tokens)))
    out.print(f"wrote {folder}: weights in {str(opened.dtype).removeprefix('torch.')}; answers end at {ends}", markup=False)


@app.command()
def stop(run: Annotated[Path, typer.Argument(help="the folder of a run that is going on")],
         wait: Annotated[float, typer.Option(min=0, help="seconds to wait for its end")] = 600) -> None:
    """Stop a run, wherever it was started: it saves a checkpoint first. Exit code 1: it has not ended in time."""
    from myllm_ray.engine.watch import stop as ask

    left = ask(run, wait)
    out.print(f"stopped; newest checkpoint: {left}" if left else f"it has not ended after {wait:g} s")
    sys.exit(0 if left else 1)


@app.command()
def submit(config: Config, overrides: Overrides = None,
           address: Annotated[str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="of the cluster's dashboard")]
           = "http://127.0.0.1:8265",
           working_dir: Annotated[Path, typer.Option(help="what the cluster gets to see")] = Path()) -> None:
    """Run the config as a job on a Ray cluster and follow its output."""
    from myllm_ray.orchestration.submit import submit as run

    load_config(config, overrides or [])  # a mistake is told here, not after the upload
    sys.exit(run(str(config), overrides or [], address, working_dir))


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's config, for editors."""
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    main()
