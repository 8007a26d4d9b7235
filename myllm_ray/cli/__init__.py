"""The command line: `myllm-ray COMMAND`, one function per command.

An error that the user can fix is printed as one line on standard error, with exit code 2.
"""

from __future__ import annotations

import sys

# The modules register their commands at `app`, in the order in which `--help` lists them.
from myllm_ray.cli import train  # noqa: F401

# isort: split
from myllm_ray.cli import amend  # noqa: F401

# isort: split
from myllm_ray.cli import chat, check, evaluate, figures, models, serve  # noqa: F401

# isort: split
from myllm_ray.cli import export, replay, report, runs  # noqa: F401
from myllm_ray.cli.app import app
from myllm_ray.common.logs import show_progress
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import UserError

__all__ = ["app", "main"]


def main() -> None:
    """Runs the command line and exits with its exit code."""
    show_progress()
    try:
        app()
    except UserError as error:
        print(mask_text(f"error: {error}"), file=sys.stderr)
        sys.exit(error.exit_code)
