"""Commands that use a trained model: sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError


@app.command()
def sample(
    run: Annotated[Path, typer.Argument(help="a run's folder, a checkpoint in it, or a folder in Hugging Face format")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text to answer or to continue; repeatable")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0)] = 0.8,
    seed: int = 0,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="continue the prompt without the chat template; the names of special tokens in it are encoded as such",
        ),
    ] = False,
) -> None:
    """Sample from a trained model: answers from a chat model, continuations from any other model."""
    from myllm_ray.data.chat import tokenize_prompt
    from myllm_ray.data.messages import Messages
    from myllm_ray.data.special_tokens import continued
    from myllm_ray.models.causal_lm import CausalLM
    from myllm_ray.models.generate import sample as generate
    from myllm_ray.trained_model import open_trained

    opened = open_trained(run)
    model, tokenizer, chat = opened.model, opened.tokenizer, opened.on_chats and not raw
    if not isinstance(model, CausalLM):
        raise ConfigError(f"sample needs a causal language model of transformers; this one is {type(model).__name__}")
    if chat and not prompt:
        raise ConfigError("this is a chat model: give it a --prompt (-p), or --raw to sample without one")
    prompts = prompt or [tokenizer.eos_token]
    ids = [
        tokenize_prompt(Messages([{"role": "user", "content": given}]), tokenizer)[0]
        if chat
        else continued(tokenizer, given)
        for given in prompts
    ]
    out.print(
        Text(
            "each prompt is a turn of the user in the chat template (--raw: without the template)"
            if chat
            else "prompts are continued without a chat template",
            "dim",
        )
    )
    for given, text in zip(
        prompts, generate(model, tokenizer, ids, opened.end_tokens, max_new_tokens, temperature, seed=seed), strict=True
    ):
        out.rule(align="left", title="answer" if chat else "completion")
        out.print(Text.assemble((given, "dim"), "\n" if chat else "", (text, "bold")))
