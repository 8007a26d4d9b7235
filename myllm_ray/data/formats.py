"""Formats: what a row of the data means, as parts of text that are trained on or not.

A format is a function `row -> Conversation`; one of your own is named by import path in `data.train.format` and may
return a list of `(text, trained_on)` pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from myllm_ray.config.errors import DataError

Part = tuple[str, bool]
"""A piece of text, and whether the loss stands on it."""


class BadRow(DataError):
    """One row can't be used; `data.on_bad_row` decides whether that ends the run or the row is skipped and counted."""


class Messages(list[dict[str, Any]]):
    """A chat, to be rendered by the tokenizer's chat template."""


Formatted = list[Part] | Messages
Format = Callable[[Mapping[str, Any]], Formatted]


def field(row: Mapping[str, Any], name: str, required: bool = True) -> str:
    """A text field of a row.

    Raises:
        BadRow: it is missing, or not a string.
    """
    value = row.get(name)
    if value is None:
        if not required:
            return ""
        raise BadRow(f"no field {name!r}; the row has {', '.join(sorted(map(str, row))) or 'no fields'} "
                     "(data.*.fields renames columns)")
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is {type(value).__name__}, not text")
    return value


def text(row: Mapping[str, Any]) -> Formatted:
    """`text`: trained on whole."""
    value = field(row, "text")
    if not value:
        raise BadRow("field 'text' is empty")
    return [(value, True)]


def prompt_completion(row: Mapping[str, Any]) -> Formatted:
    """`prompt` and `completion`: the loss stands on the completion."""
    completion = field(row, "completion")
    if not completion:
        raise BadRow("field 'completion' is empty: there is nothing to train on")
    return [(field(row, "prompt"), False), (completion, True)]


def instruction(row: Mapping[str, Any]) -> Formatted:
    """`instruction`, optional `input`, `output`, in the layout of Alpaca (Taori et al., 2023) without its preamble."""
    output = field(row, "output")
    if not output:
        raise BadRow("field 'output' is empty: there is nothing to train on")
    given = field(row, "input", required=False)
    prompt = f"### Instruction:\n{field(row, 'instruction')}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return [(prompt + "### Response:\n", False), (output, True)]


def chat(row: Mapping[str, Any]) -> Formatted:
    """`messages`: a list of {role, content}; the loss stands on the assistant's turns."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' must be a non-empty list of {role, content}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(f"messages[{i}] has no role")
        if not isinstance(message.get("content"), str):
            raise BadRow(f"messages[{i}] has no text content")
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("no message of the assistant: there is nothing to train on")
    return Messages(dict(m) for m in messages)
