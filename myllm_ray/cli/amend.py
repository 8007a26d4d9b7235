"""The command that changes the config of a run within the run: amend."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import apply_override


@app.command()
def amend(
    run: Annotated[Path, typer.Argument(help="the folder of a run, active or not")],
    values: Annotated[
        list[str] | None, typer.Argument(help="new values, such as optimizer.lr=1e-4", metavar="[KEY=VALUE]...")
    ] = None,
    at: Annotated[
        str, typer.Option(help="number of completed steps after which they take effect; now: after the present step")
    ] = "now",
    list_: Annotated[bool, typer.Option("--list", help="show the amendments of the run")] = False,
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait for an active run")] = 600,
) -> None:
    """Change the config of a run from a step on; a run with the amended config has the same losses.

    An active run saves a checkpoint and resumes with the new values. Any other run uses them when it resumes. Exit code
    1: an active run has not answered in time.
    """
    from myllm_ray.engine import amendments

    if list_:
        if values:
            raise ConfigError("give new values or --list, not both")
        config = amendments.opened(run)
        for entry in config.run.amendments:
            out.print(f"step {entry.at}: {json.dumps(entry.set)}: {amendments.described(config, entry.at)}")
        if not config.run.amendments:
            out.print("no amendments")
        return
    if not values:
        raise ConfigError("give at least one new value, such as optimizer.lr=1e-4, or --list")
    if at != "now" and not (at.isascii() and at.isdecimal()):
        raise ConfigError(f"--at {at}: give a step or now")
    given: dict[str, Any] = {}
    for value in values:
        apply_override(given, value)
    step = amendments.amend(run, "now" if at == "now" else int(at), given, wait)
    if step is None:
        out.print(f"the run has not answered within {wait:g} s: myllm-ray amend {run} --list shows whether it does")
        sys.exit(1)
    out.print(f"amended after step {step}: {amendments.described(amendments.opened(run), step)}")
