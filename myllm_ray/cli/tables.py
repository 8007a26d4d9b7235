"""The tables and rows that commands print."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)


def print_report(report: Any, size: int) -> None:
    """Prints the sources, the histogram of document lengths and the statistics of packing. `size`: tokens per row."""
    table = Table(title="training data", title_justify="left")
    used = ("share", "passes") if report.mixed else ()
    for column in ("source", "documents", "tokens", "rows skipped", "duplicates", *used):
        table.add_column(column, justify="left" if column == "source" else "right")
    for source in report.sources:
        use = source.use
        table.add_row(
            source.name,
            *(f"{count:,}" for count in (source.documents, source.tokens, source.skipped, source.duplicates)),
            *((f"{use.share:.1%}", f"{use.passes:.3g}") if use is not None else ()),
        )
    out.print(table)
    most = max(count for *_, count in report.histogram)
    out.print("tokens per document:")
    for low, high, count in report.histogram:
        out.print(f"  {low:>7,} – {high:<7,} {count:>9,} {'█' * round(40 * count / most)}")
    out.print(
        f"rows of {size} tokens {'of the run' if report.mixed else 'per epoch'}: {report.rows:,} "
        f"({report.steps:,} steps); packing fills "
        f"{report.efficiency:.1%}; loss on {report.trained_share:.1%} of the tokens; validation rows: "
        f"{report.validation_rows:,}"
    )
    if report.longer_than_row:
        out.print(
            f"{report.longer_than_row:,} documents are longer than a row (data.overflow: truncate, split or error)"
        )
    for source in report.sources:
        if source.skipped:
            out.print(
                f"[yellow]{source.name}: {source.skipped} rows skipped, the first: {source.first_skipped}[/yellow]"
            )
    for warning in report.warnings:
        out.print(Text(f"warning: {warning}", style="yellow"))


def print_rows(spec: Any, rows: list[Any], tokenizer: Any, first: int = 0) -> None:
    """Prints rows as text, with trained tokens marked. `first`: number of the first row."""
    from myllm_ray.data.inspect import label_of, part_names, pieces

    names = part_names(spec.plan.store.kind)
    if not out.is_terminal and rows:
        out.print("(trained on: ⟦…⟧)")
    for number, row in enumerate(rows, first):
        filled = sum(s.length for s in row)
        out.rule(
            f"row {number}: {filled} tokens, documents {', '.join(str(s.document) for s in row) or 'none (filling)'}",
            align="left",
        )
        text, shown = Text(), 0
        for number_of_part, piece, trained in pieces(spec, row, tokenizer):
            for name in names[shown : number_of_part + 1]:
                text.append(f"{name}: " if not shown else f"\n{name}: ", style="bold")
                shown += 1
            text.append(piece if out.is_terminal or not trained else f"⟦{piece}⟧", style="green" if trained else "dim")
        if label := label_of(spec, row):
            text.append(f"\n({label})", style="bold")
        out.print(text)


def print_certificate(certificate: Any) -> None:
    """Prints the certificate of `verify`."""
    table = Table(title=f"shrunk: {certificate.shrunk}", title_justify="left")
    for column in ("backend", "workers", "micro", "loss", "grad norm", "lr", "weights", "packing", "kB/rank", ""):
        table.add_column(column, justify="left" if column in ("backend", "") else "right", no_wrap=True)
    bad = {f.variant for f in certificate.findings}
    for variant, apart in certificate.rows:
        shown = [f"{apart[name]:.1e}" for name in ("loss", "grad_norm", "learning_rate", "weights")]
        shown.append(f"{apart['packing']:.1e}" if "packing" in apart else "–")
        table.add_row(
            variant.backend,
            str(variant.workers),
            str(variant.micro_size),
            *shown,
            f"{apart['bytes_per_rank'] / 1000:.0f}",
            "[red]differs[/red]" if variant in bad else "same",
        )
    out.print(table)
    out.print(
        "(largest relative differences from one process with the global batch as one micro-batch; "
        f"loss and gradient norm may differ by {certificate.tolerance:g}; packing: of the first step from the "
        "same documents in separate rows; kB/rank: largest size of the parameters on one rank)"
    )
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
        out.print(
            f"not certified: {differ} of {len(certificate.rows)} runs differ"
            + "".join(others[k] for k in kinds if k in others)
        )
