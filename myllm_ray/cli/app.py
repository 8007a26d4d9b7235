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

LogFormat = Annotated[
    str | None,
    typer.Option(
        "--log-format",
        envvar="MYLLM_RAY_LOG_FORMAT",
        help="auto: a live panel in a terminal, plain lines elsewhere; panel; plain; json: one JSON object per event",
    ),
]
Plain = Annotated[bool, typer.Option("--plain", help="print plain lines, also in a terminal")]


def set_format(log_format: str | None, plain: bool) -> bool:
    """Sets the format of the output and returns whether it is JSON lines.

    Raises:
        ConfigError: there is no such format, or it contradicts `--plain`.
    """
    from myllm_ray.config.errors import ConfigError
    from myllm_ray.engine.reporting import terminal

    if plain and log_format == "json":
        raise ConfigError("--plain contradicts --log-format json: give one of them")
    terminal.choose_format("plain" if plain else log_format)
    return terminal.log_format() == "json"


Config = Annotated[Path, typer.Argument(help="a YAML or JSON file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="overrides, such as optimizer.lr=1e-3", metavar="[KEY=VALUE]...")
]
