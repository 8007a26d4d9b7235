"""The output of a command: the format, the terminal, and how values are written."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

from rich.console import Console

from myllm_ray.common.logs import format_with
from myllm_ray.common.secrets import mask_text
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.reporting.events import Event, make_event

Format = Literal["panel", "plain", "json"]
FORMATS = ("auto", "panel", "plain", "json")
VARIABLE = "MYLLM_RAY_LOG_FORMAT"
"""Environment variable with the default of `--log-format`."""
console = Console(highlight=False, soft_wrap=True)
_chosen: str | None = None
streams_warnings = False
"""Whether a display prints the warnings of this process as events, so that the log does not print them again."""


def choose_format(name: str | None) -> None:
    """Sets the format of this process, for the command line.

    Args:
        name: one of `FORMATS`; None: the default.

    Raises:
        ConfigError: there is no such format.
    """
    global _chosen
    if name is not None and name not in FORMATS:
        raise ConfigError(f"--log-format: unknown format {name!r}; choose from {', '.join(FORMATS)}")
    _chosen = name
    format_with(_as_json if log_format() == "json" else None)


def log_format(wanted: str = "auto") -> Format:
    """Returns the format of the output.

    Args:
        wanted: the format that the config names. One that the command line names has priority, then the environment
            variable `MYLLM_RAY_LOG_FORMAT`.
    """
    name = next((n for n in (_chosen, os.environ.get(VARIABLE), wanted) if n in FORMATS and n != "auto"), "auto")
    if name == "json" or name == "plain":
        return name  # type: ignore[return-value]
    # A terminal without cursor movement (TERM=dumb) can't redraw the panel. Output to a file gets lines.
    can_redraw = console.is_terminal and not console.is_dumb_terminal and not console.is_jupyter
    return "panel" if can_redraw else "plain"


def print_line(text: str) -> None:
    """Prints a line that code of the user has printed in another process."""
    if log_format() == "json":
        print_json(make_event("output", text=text))
    else:
        print(text, flush=True)


def print_json(event: Event) -> None:
    """Prints an event as one line."""
    file = getattr(console.file, "under", console.file)  # `console.py` replaces sys.stdout in this format
    file.write(mask_text(json.dumps(event, ensure_ascii=False, default=str)) + "\n")
    file.flush()


def _as_json(record: logging.LogRecord) -> None:
    if record.levelno < logging.WARNING:
        name = "message"
    elif streams_warnings:
        return
    else:
        name = "warning"
    fields: dict[str, Any] = {"level": record.levelname.lower(), "logger": record.name, "text": record.getMessage()}
    print_json(make_event(name, **fields))


def duration(seconds: float) -> str:
    """Formats a duration as `0:01:05`, or as `2d 03:04:05`."""
    days, rest = divmod(int(max(0.0, seconds)), 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}d {hours:02d}:{clock}" if days else f"{hours}:{clock}"


def memory(size: float) -> str:
    """Formats a number of bytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def number(value: Any) -> str:
    """Formats a metric with a constant number of significant digits; `–` for a missing one."""
    if not isinstance(value, (int, float)):
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = min(4, 3 - math.floor(math.log10(abs(value)))) if value else 4
    return f"{value:.{max(0, digits)}f}"


_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws values as a line of at most `width` block characters; several values share a character as their mean."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite or width < 1:
        return ""
    count = min(width, len(finite))
    edges = [round(i * len(finite) / count) for i in range(count + 1)]
    means = [math.fsum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        return _BLOCKS[3] * count
    return "".join(_BLOCKS[min(7, int(8 * (v - low) / (high - low)))] for v in means)
