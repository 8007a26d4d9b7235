"""The command that writes HTML pages of runs: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs, or the folder of one sweep", metavar="RUN...")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="file to write; default: report.html in RUN, or comparison.html"),
    ] = None,
) -> None:
    """Write the page of a run or a sweep again, or compare several runs: curves over each other, what differs."""
    from myllm_ray.runs.report import write_reports

    sweeps = [run for run in runs if (run / "sweep.yaml").is_file()]
    if sweeps and (len(runs) > 1 or output is not None):
        raise ConfigError(f"{sweeps[0]} is a sweep: give it alone and without --output, or the folders of its trials")
    if sweeps:
        from myllm_ray.orchestration.sweeps.report import rewrite_report

        path = rewrite_report(sweeps[0])
    else:
        path = write_reports(runs, output)
    out.print(f"wrote {path}", markup=False)
