"""The command `replay`: makes one step of a run again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out, print_rows
from myllm_ray.common.files import write_json

if TYPE_CHECKING:
    from myllm_ray.runs.decomposition import RowShare
    from myllm_ray.runs.replay import Replay


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="the folder of a run; it is only read")],
    step: Annotated[int, typer.Option(min=1, help="the optimizer step, as in the log")],
    drop: Annotated[
        list[int] | None, typer.Option(help="show the step without this row (number as in the table); repeatable")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="where to compute")] = "auto",
    precision: Annotated[Literal["fp32", "bf16", "fp16"] | None, typer.Option(help="default: the run's")] = None,
    gradients: Annotated[
        bool, typer.Option(help="compute gradient norms and shares, which needs two backward passes of the batch")
    ] = True,
    rows: Annotated[int, typer.Option(min=0, help="number of rows and documents in the tables")] = 10,
    texts: Annotated[int, typer.Option(min=0, help="number of rows that are shown as text, with the loss mask")] = 2,
    output: Annotated[Path | None, typer.Option(help="write everything as JSON")] = None,
) -> None:
    """Make a step of a run again and show which rows determine its loss and its gradient."""
    from myllm_ray.runs.replay import replay as make

    found = make(run, step, drop or (), device, precision, gradients)
    _print_head(found)
    ranked = found.parts.ranked
    _print_ranking(ranked[:rows], len(ranked))
    _print_documents(found, rows)
    _print_sources(found)
    if found.parts.layers:
        table = _table("gradient norm per layer", "layer", "norm")
        for name, norm in found.parts.layers:
            table.add_row(name, f"{norm:.4g}")
        out.print(table)
    _print_texts(found, ranked[:texts])
    if (without := found.parts.without) is not None:
        numbers = ", ".join(map(str, without.rows))
        out.print(
            f"without row {numbers}: loss {found.loss:.6g} -> {without.loss:.6g}, gradient norm "
            f"{found.grad_norm:.6g} -> {without.grad_norm:.6g}"
        )
    if output is not None:
        write_json(output, found.as_json())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "layer") else "right", no_wrap=True)
    return table


def _print_head(found: Replay) -> None:
    logged = found.logged
    out.print(
        f"step {found.step}: epoch {found.epoch}, rows from {found.first_row}, tokens_hash {found.tokens_hash}; "
        f"repeated from step {found.start}"
    )
    for name, here in (("loss", found.loss), ("grad_norm", found.grad_norm)):
        if name in logged:
            out.print(f"{name}: {here:.7g}; the run logged {logged[name]:.7g} (difference {here - logged[name]:.1e})")
        else:
            out.print(f"{name}: {here:.7g}; the run did not log this step")
    if found.left_out:
        out.print(Text(f"the step changed no weight in the run: {found.left_out}", "yellow"))
    if found.deviations:
        first, there, here = found.deviations[0]
        out.print(
            Text(
                f"the losses differ from step {first} on: {there:.7g} in the run, {here:.7g} here: another device, "
                "precision or version of a library; shares and ranks are those of the step here",
                "yellow",
            )
        )


def _print_ranking(rows: list[RowShare], count: int) -> None:
    title = f"rows by their shares of the loss and the gradient ({len(rows)} of {count})"
    table = _table(title, "row", "source", "weight", "loss", "loss share", "grad norm", "grad share")
    for row in rows:
        known = math.isfinite(row.grad_share)
        table.add_row(
            str(row.row),
            ", ".join(row.sources),
            f"{row.weight:g}",
            f"{row.loss:.4g}",
            f"{row.share:.1%}",
            f"{row.grad_norm:.4g}" if known else "",
            f"{row.grad_share:.1%}" if known else "",
        )
    out.print(table)


def _print_documents(found: Replay, most: int) -> None:
    pairs = [(row.row, document) for row in found.parts.rows for document in row.documents]
    if not pairs:
        return
    pairs.sort(key=lambda pair: pair[1].loss_sum, reverse=True)
    total = sum(document.loss_sum for _, document in pairs)
    title = f"documents by their share of the loss ({len(pairs[:most])} of {len(pairs)})"
    table = _table(title, "document", "source", "row", "targets", "loss", "loss share")
    for number, document in pairs[:most]:
        share = f"{document.loss_sum / total:.1%}" if total else ""
        row = [str(document.document), document.source, str(number), str(document.targets)]
        table.add_row(*row, f"{document.loss:.4g}", share)
    out.print(table)


def _print_sources(found: Replay) -> None:
    sources = found.parts.sources()
    if not sources:
        return
    table = _table("loss per source", "source", "targets", "loss")
    for name, (targets, loss) in sorted(sources.items()):
        table.add_row(name, f"{targets:,}", f"{loss:.4g}")
    out.print(table)


def _print_texts(found: Replay, rows: list[RowShare]) -> None:
    from myllm_ray.data.tokenizer import open_tokenizer

    spec = found.prepared.train
    for row in rows:
        if row.sources:  # the answers of a policy are not in the data
            text = spec.plan.rows(found.epoch, row.row, row.row + 1)
            print_rows(spec, text, open_tokenizer(found.prepared.tokenizer_folder), row.row)
