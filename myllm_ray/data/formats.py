"""Formats: what a row of the data means, as parts of text that are trained on or not.

A format is a function `row -> Conversation`; one of your own is named by import path in `data.train.format` and may
return a list of `(text, trained_on)` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from myllm_ray.config.errors import DataError

Part = tuple[str, bool]
"""A piece of text, and whether the loss stands on it."""


class BadRow(DataError):
    """One row can't be used; `data.on_bad_row` decides whether that ends the run or the row is skipped and counted."""


class Messages(list[dict[str, Any]]):
    """A chat, to be rendered by the tokenizer's chat template."""


Text = str | Messages


@dataclass(frozen=True)
class Preference:
    """Two answers to a prompt, of which one is better, by `margin` where that is known. All three texts, or all messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """An answer that is desirable or not."""

    prompt: Text
    completion: Text
    desirable: bool


@dataclass(frozen=True)
class Prompt:
    """What a rollout begins with; `columns` are handed to reward functions."""

    prompt: Text
    columns: Mapping[str, Any] = dataclass_field(default_factory=dict)


Formatted = list[Part] | Messages | Preference | Labelled | Prompt
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


def _turns(row: Mapping[str, Any], name: str) -> Text:
    """A field that is a text, or a list of {role, content}."""
    value = row.get(name)
    if not isinstance(value, list):
        return field(row, name)
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise BadRow(f"{name}[{i}] is not a message {{role, content}} of text")
    return Messages(dict(m) for m in value)


def _answer(row: Mapping[str, Any], name: str) -> Text:
    answer = _turns(row, name)
    texts = [m["content"] for m in answer] if isinstance(answer, Messages) else [answer]
    if not any(t.strip() for t in texts):
        raise BadRow(f"field {name!r} is empty: there is no answer")
    return answer


def _same_form(prompt: Text, *answers: Text) -> None:
    if len({isinstance(t, Messages) for t in (prompt, *answers)}) > 1:
        raise BadRow("prompt and answers must all be texts, or all lists of messages")


def preference(row: Mapping[str, Any]) -> Formatted:
    """`prompt`, `chosen`, `rejected` (texts, or lists of messages), and an optional `margin`.

    Without a `prompt`, two lists of messages begin with it: what they have in common.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same: there is no preference to learn")
    prompt: Text
    if "prompt" not in row and isinstance(chosen, Messages) and isinstance(rejected, Messages):
        same = next(i for i in range(len(chosen) + 1) if i >= len(chosen) or i >= len(rejected) or chosen[i] != rejected[i])
        prompt, chosen, rejected = Messages(chosen[:same]), Messages(chosen[same:]), Messages(rejected[same:])
        if not prompt or not chosen or not rejected:
            raise BadRow("chosen and rejected need messages in common, the prompt, and one each that differs")
    else:
        prompt = _turns(row, "prompt")
    _same_form(prompt, chosen, rejected)
    margin = row.get("margin") or 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise BadRow(f"field 'margin' is {margin!r}, not a number")
    return Preference(prompt, chosen, rejected, float(margin))


def unpaired(row: Mapping[str, Any]) -> Formatted:
    """`prompt`, `completion` and `label`: whether the completion is desirable (KTO)."""
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise BadRow(f"field 'label' is {label!r}: true where the completion is desirable, else false")
    prompt, completion = _turns(row, "prompt"), _answer(row, "completion")
    _same_form(prompt, completion)
    return Labelled(prompt, completion, bool(label))


def prompt(row: Mapping[str, Any]) -> Formatted:
    """`prompt`; all other fields are handed to the reward functions by their names."""
    return Prompt(_turns(row, "prompt"), {k: v for k, v in row.items() if k != "prompt"})
