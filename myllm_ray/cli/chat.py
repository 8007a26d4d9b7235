"""The command that talks to a trained model in the terminal: chat."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from myllm_ray.cli.app import app

ModelName = Annotated[
    str, typer.Argument(help="a run's folder, a checkpoint, a folder in Hugging Face format, or a hub id")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one")]
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters except tab and line break. In a terminal, an answer could otherwise execute escape sequences."""


@app.command()
def chat(
    model: ModelName,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="default: the model's own, else 0.8")] = None,
    top_p: Annotated[float | None, typer.Option(help="default: the model's own, else 0.95")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="default: 512")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = None,
) -> None:
    """Talk to a trained model: answers appear while they are sampled.

    Lines are read from standard input, answers are written to standard output, and everything else to standard error.
    """
    from myllm_ray.engine.reporting.console import progress_shown
    from myllm_ray.serving.chat import Chat, run_chat
    from myllm_ray.serving.served_model import LoadedModel, chosen_device

    place = chosen_device(device)

    def opened(name: str) -> LoadedModel:
        with progress_shown():
            return LoadedModel.open(name, "chat", place)

    # Bytes that are not valid in the locale are replaced instead of raising an exception.
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")
    terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if terminal else text)
        sys.stdout.flush()

    params = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    talk = Chat(
        opened(model), params, seed, system, opened, write, lambda text: print(text, file=sys.stderr, flush=True)
    )
    run_chat(talk, sys.stdin.isatty() and terminal)
