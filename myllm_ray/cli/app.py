"""The application object that the commands are registered at, and what they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
