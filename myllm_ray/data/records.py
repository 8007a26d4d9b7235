"""Records: documents of several parts, a prompt and its answers. From what a format gives to tokens and back.

A record is one document of the store: its parts end to end, with `PART` between them. What the parts are, its kind says:

    pairs     prompt | chosen | rejected | margin           preference pairs (reward model, DPO)
    labelled  prompt | completion | 1 or 0                  unpaired preferences (KTO)
    prompts   prompt | JSON, see `PromptRow`                what rollouts begin with (PPO, GRPO)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from myllm_ray.data.chat import tokenize_answer, tokenize_prompt
from myllm_ray.data.formats import BadRow, Labelled, Messages, Preference, Prompt, Text
from myllm_ray.data.special_tokens import SpecialTokens
from myllm_ray.data.store import TokenStore

PART = -(2**31)
"""Stands between the parts of a record. No token: `~PART` would be an id of 2**31 - 1."""
TOKENS, PAIRS, LABELLED, PROMPTS = "tokens", "pairs", "labelled", "prompts"


@dataclass(frozen=True)
class Room:
    """`length`: tokens that prompt and one answer may have together. `overflow`: truncate (the answer's end) or error."""

    length: int
    overflow: str = "truncate"


@dataclass(frozen=True)
class PromptRow:
    """The data row behind a record of prompts, for reward functions.

    `prompt`: as the row has it, a text or a list of messages. `text`: what was tokenised, with the chat template's special
    tokens where the prompt is a list of messages. `tools`: the tool definitions of the row, if any. `columns`: its other fields.
    """

    prompt: str | list[dict[str, Any]]
    text: str
    tools: list[dict[str, Any]] | None
    columns: dict[str, Any]


def kind_of(formatted: Any) -> str:
    """Which kind of document a format gave."""
    return {Preference: PAIRS, Labelled: LABELLED, Prompt: PROMPTS}.get(type(formatted), TOKENS)


def tokenize_record(record: Preference | Labelled | Prompt, tokenizer: Any, room: Room) -> tuple[np.ndarray, bool]:
    """One record as (n,) int32 with `PART` between its parts; and whether an answer was cut off.

    Raises:
        BadRow: the prompt leaves no room for an answer, or an answer is too long and `room.overflow` is "error".
    """
    if isinstance(record, Prompt):
        prompt, text = _prompt(record.prompt, tokenizer)
        _check_prompt(prompt, room.length)
        return join([np.asarray(prompt), _encoded_row(record, text)]), False
    answers = [record.chosen, record.rejected] if isinstance(record, Preference) else [record.completion]
    prompt, _ = _prompt(record.prompt, tokenizer)
    _check_prompt(prompt, room.length - 1)
    parts, cut = [np.asarray(prompt)], False
    for answer in answers:
        ids = _answer(record.prompt, answer, tokenizer)
        if len(prompt) + len(ids) > room.length:
            if room.overflow == "error":
                raise BadRow(f"prompt and answer have {len(prompt) + len(ids)} tokens, more than data.sequence_length={room.length}")
            ids, cut = ids[: room.length - len(prompt)], True
        parts.append(np.asarray(ids))
    if isinstance(record, Labelled):
        parts.append(np.asarray([int(record.desirable)]))
    elif np.array_equal(parts[1], parts[2]):
        raise BadRow("chosen and rejected are the same" + (" up to the length to which they are cut off" if cut else ""))
    else:
        parts.append(np.asarray([record.margin + 0.0], np.float32).view(np.int32))
    return join(parts), cut


def _encoded_row(record: Prompt, text: str) -> np.ndarray:
    """The `PromptRow` of a record as the bytes of its JSON."""
    row = {"prompt": record.prompt, "text": text, "tools": getattr(record.prompt, "tools", None), "columns": record.columns}
    return np.frombuffer(json.dumps(row, ensure_ascii=False, default=str).encode(), np.uint8)


def _check_prompt(prompt: Sequence[int], most: int) -> None:
    if not prompt:
        raise BadRow("the prompt is empty: there is nothing to answer")
    if len(prompt) > most:
        raise BadRow(f"the prompt has {len(prompt)} tokens, at most {most} leave room for an answer (data.sequence_length)")


def _prompt(prompt: Text, tokenizer: Any) -> tuple[list[int], str]:
    """The ids and the text of a prompt."""
    if isinstance(prompt, Messages):
        return tokenize_prompt(prompt, tokenizer)
    bos = tokenizer.bos_token_id
    first = [] if bos is None or bos == tokenizer.eos_token_id else [bos]
    return first + SpecialTokens.of(tokenizer).text(prompt), prompt


def _answer(prompt: Text, answer: Text, tokenizer: Any) -> list[int]:
    """The tokens of an answer, with what ends it. Apart from the prompt's: their boundary falls where it does at generation."""
    if isinstance(prompt, Messages) and isinstance(answer, Messages):
        return tokenize_answer(prompt, answer, tokenizer)
    return [*SpecialTokens.of(tokenizer).text(str(answer)), tokenizer.eos_token_id]


def join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts end to end, `PART` between them: (n,) int32."""
    pieces = [parts[0].astype(np.int32)]
    for part in parts[1:]:
        pieces += [np.asarray([PART], np.int32), part.astype(np.int32)]
    return np.concatenate(pieces)


def split(document: np.ndarray) -> list[np.ndarray]:
    """The inverse of `join`."""
    edges = np.flatnonzero(document == PART)
    return [part[1:] if i else part for i, part in enumerate(np.split(document, edges))]


def prompt_row(store: TokenStore, document: int) -> PromptRow:
    """The data row that a record of prompts was made from."""
    return PromptRow(**json.loads(split(store.read(document))[1].astype(np.uint8).tobytes()))


def columns_of(store: TokenStore, document: int) -> dict[str, Any]:
    """The row's fields other than `prompt`."""
    return prompt_row(store, document).columns


def prompt_of(store: TokenStore, document: int) -> str | list[dict[str, Any]]:
    """The prompt as the row has it: a text, or a list of messages."""
    return prompt_row(store, document).prompt
