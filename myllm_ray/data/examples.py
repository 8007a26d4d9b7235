"""Records: documents that consist of several parts, such as a prompt and its answers.

An example is stored as one document: its parts are concatenated, with `PART` between them. The kind of the store
determines the parts:

    pairs     prompt | chosen | rejected | margin           preference pairs (reward model, DPO)
    labelled  prompt | completion | 1 or 0                  unpaired preferences (KTO)
    prompts   prompt | JSON, see `PromptRow`                prompts of rollouts (PPO, GRPO)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from myllm_ray.data.chat import tokenize_answer, tokenize_prompt
from myllm_ray.data.formats import BadRow, Labelled, Messages, Preference, Prompt, Text
from myllm_ray.data.special_tokens import SpecialTokens, start_of_text
from myllm_ray.data.store import TokenStore

PART = -(2**31)
"""Separator between the parts of an example. It is not a token: as an encoded token, its id would be 2**31 - 1."""
TOKENS, PAIRS, LABELLED, PROMPTS = "tokens", "pairs", "labelled", "prompts"


@dataclass(frozen=True)
class LengthLimits:
    """Length limits of examples.

    `length`: maximum number of tokens of the prompt and one answer together. `overflow`: "truncate" (cuts off the end
    of the answer) or "error".
    """

    length: int
    overflow: str = "truncate"


@dataclass(frozen=True)
class PromptRow:
    """The data row of a prompt example, for reward functions.

    `prompt`: the prompt as in the row, a text or a list of messages. `text`: the text that was tokenised; for a list of
    messages, the rendered chat with the template's special tokens. `tools`: the tool definitions, or None.
    `columns`: the fields of the row other than `prompt`.
    """

    prompt: str | list[dict[str, Any]]
    text: str
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]


def kind_of(formatted: Any) -> str:
    """Returns the kind of document of a format's result."""
    return {Preference: PAIRS, Labelled: LABELLED, Prompt: PROMPTS}.get(type(formatted), TOKENS)


def tokenize_example(
    example: Preference | Labelled | Prompt, tokenizer: Any, limits: LengthLimits
) -> tuple[np.ndarray, bool]:
    """Tokenises one example.

    Returns:
        The example as (n,) int32 with `PART` between its parts, and whether an answer was truncated.

    Raises:
        BadRow: the prompt is empty, or too long for an answer to fit; an answer is too long and `limits.overflow` is
            "error"; or the two answers of a pair have the same tokens.
    """
    if isinstance(example, Prompt):
        prompt, text = _prompt(example.prompt, tokenizer)
        _check_prompt(prompt, limits.length)
        return join([np.asarray(prompt), _encoded_row(example, text)]), False
    answers = [example.chosen, example.rejected] if isinstance(example, Preference) else [example.completion]
    prompt, _ = _prompt(example.prompt, tokenizer)
    _check_prompt(prompt, limits.length - 1)  # at least one token of each answer must fit
    parts, cut = [np.asarray(prompt)], False
    for answer in answers:
        ids = _answer(example.prompt, answer, tokenizer)
        if len(prompt) + len(ids) > limits.length:
            if limits.overflow == "error":
                raise BadRow(
                    f"prompt and answer have {len(prompt) + len(ids)} tokens, "
                    f"more than data.sequence_length={limits.length}"
                )
            ids, cut = ids[: limits.length - len(prompt)], True
        parts.append(np.asarray(ids))
    if isinstance(example, Labelled):
        parts.append(np.asarray([int(example.desirable)]))
    elif np.array_equal(parts[1], parts[2]):
        raise BadRow(
            "chosen and rejected are the same" + (" up to the length to which they are cut off" if cut else "")
        )
    else:
        # Parts are int32, so the bits of the float32 margin are stored. Adding 0.0 replaces -0.0 by 0.0, because the
        # bits of -0.0 equal `PART`.
        parts.append(np.asarray([example.margin + 0.0], np.float32).view(np.int32))
    return join(parts), cut


def _encoded_row(example: Prompt, text: str) -> np.ndarray:
    """Returns the `PromptRow` of an example as the bytes of its JSON, (n,) uint8."""
    row = {
        "prompt": example.prompt,
        "text": text,
        "tools": getattr(example.prompt, "tools", None),
        "columns": example.columns,
    }
    return np.frombuffer(json.dumps(row, ensure_ascii=False, default=str).encode(), np.uint8)


def _check_prompt(prompt: Sequence[int], most: int) -> None:
    """Raises BadRow if a prompt is empty or has more than `most` tokens."""
    if not prompt:
        raise BadRow("the prompt is empty: there is nothing to answer")
    if len(prompt) > most:
        raise BadRow(
            f"the prompt has {len(prompt)} tokens, at most {most} are allowed so that an answer fits "
            "(data.sequence_length)"
        )


def _prompt(prompt: Text, tokenizer: Any) -> tuple[list[int], str]:
    """Returns the ids and the text of a prompt."""
    if isinstance(prompt, Messages):
        return tokenize_prompt(prompt, tokenizer)
    return start_of_text(tokenizer) + SpecialTokens.of(tokenizer).text(prompt), prompt


def _answer(prompt: Text, answer: Text, tokenizer: Any) -> list[int]:
    """Returns the ids of an answer, including the token that ends it.

    The answer is tokenised separately from the prompt, so that the token boundary is the same as at generation.
    """
    if isinstance(prompt, Messages) and isinstance(answer, Messages):
        return tokenize_answer(prompt, answer, tokenizer)
    return [*SpecialTokens.of(tokenizer).text(str(answer)), tokenizer.eos_token_id]


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates parts with `PART` between them; returns (n,) int32."""
    pieces = [parts[0].astype(np.int32)]
    for part in parts[1:]:
        pieces += [np.asarray([PART], np.int32), part.astype(np.int32)]
    return np.concatenate(pieces)


def split(document: np.ndarray) -> list[np.ndarray]:
    """Splits a document into its parts, the inverse of `join`."""
    edges = np.flatnonzero(document == PART)
    return [part[1:] if i else part for i, part in enumerate(np.split(document, edges))]


def prompt_row(store: TokenStore, document: int) -> PromptRow:
    """Returns the data row of a prompt example."""
    return PromptRow(**json.loads(split(store.read(document))[1].astype(np.uint8).tobytes()))


def columns_of(store: TokenStore, document: int) -> dict[str, Any]:
    """Returns the fields other than `prompt` of a prompt record's data row."""
    return prompt_row(store, document).columns


def prompt_of(store: TokenStore, document: int) -> str | list[dict[str, Any]]:
    """Returns the prompt as in the data row: a text, or a list of messages."""
    return prompt_row(store, document).prompt
