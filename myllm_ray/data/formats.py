"""Formats: functions that map a data row to the text, the messages or the record to train on.

A format is a function `row -> Formatted`. A custom format is given as an import path in `data.train.format`, and can
return a list of `(text, trained_on)` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, NamedTuple

import numpy as np

from myllm_ray.data.messages import BadRow as BadRow
from myllm_ray.data.messages import Messages, read_messages

Part = tuple[str, bool]
"""A piece of text, and whether the loss includes it."""


class Instruction(list[Part]):
    """An instruction and its answer, in two layouts: plain parts, and a chat.

    The chat is used if the tokenizer has its own chat template, else the plain parts.

    Args:
        parts: (text, trained on) pairs of the plain layout.
        messages: the same instruction and answer as messages.
    """

    def __init__(self, parts: Iterable[Part], messages: Messages):
        super().__init__(parts)
        self.messages = messages


Text = str | Messages


@dataclass(frozen=True)
class Preference:
    """A prompt with a preferred and a rejected answer.

    `prompt`, `chosen` and `rejected` are all texts, or all messages. `margin` is how much better the chosen answer is,
    0 if not known.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float = 0.0


@dataclass(frozen=True)
class Labelled:
    """A prompt with one answer, labelled as desirable or undesirable."""

    prompt: Text
    completion: Text
    desirable: bool


@dataclass(frozen=True)
class Prompt:
    """The prompt of a rollout; `columns` are passed to reward functions."""

    prompt: Text
    columns: Mapping[str, Any] = dataclass_field(default_factory=dict)


class TokenIds(NamedTuple):
    """A document that has been tokenized."""

    ids: np.ndarray
    """(n,) token ids, integers."""
    trained: np.ndarray
    """(n,) bool, which tokens the loss includes."""


Formatted = list[Part] | Messages | Preference | Labelled | Prompt | TokenIds
Format = Callable[[Mapping[str, Any]], Formatted]


def field(row: Mapping[str, Any], name: str, required: bool = True) -> str:
    """Returns a text field of a row; an empty text if the field is missing and not `required`.

    Raises:
        BadRow: a required field is missing, or the field is not a string.
    """
    value = row.get(name)
    if value is None:
        if not required:
            return ""
        raise BadRow(
            f"no field {name!r}; the row has {', '.join(sorted(map(str, row))) or 'no fields'} "
            "(data.*.fields renames columns)"
        )
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is {type(value).__name__}, not text")
    return value


def text(row: Mapping[str, Any]) -> Formatted:
    """Reads the field `text`; the loss includes all of it."""
    value = field(row, "text")
    if not value:
        raise BadRow("field 'text' is empty")
    return [(value, True)]


def prompt_completion(row: Mapping[str, Any]) -> Formatted:
    """Reads the fields `prompt` and `completion`; the loss includes the completion only."""
    completion = field(row, "completion")
    if not completion:
        raise BadRow("field 'completion' is empty: there is nothing to train on")
    return [(field(row, "prompt"), False), (completion, True)]


def instruction(row: Mapping[str, Any]) -> Formatted:
    """Reads the fields `instruction`, `input` (optional) and `output`; the loss includes the output only.

    The result is a chat of two turns if the tokenizer has its own chat template, else the layout of Alpaca
    (Taori et al., 2023) without its preamble.
    """
    output = field(row, "output")
    if not output:
        raise BadRow("field 'output' is empty: there is nothing to train on")
    asked, given = field(row, "instruction"), field(row, "input", required=False)
    prompt = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    turns = [
        {"role": "user", "content": f"{asked}\n\n{given}" if given else asked},
        {"role": "assistant", "content": output},
    ]
    return Instruction([(prompt + "### Response:\n", False), (output, True)], Messages(turns))


def chat(row: Mapping[str, Any]) -> Formatted:
    """Reads the fields `messages` or `conversations` (see `data/messages.py`), and `tools` (optional).

    The loss includes the assistant's turns, except those excluded by `train` or `weight`.

    Raises:
        BadRow: no message of the assistant is trained on.
    """
    name = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    messages = read_messages(
        row.get(name), name, row.get("tools"), row.get("system") if name == "conversations" else None
    )
    if not any(messages.trained):
        silent = any(m["role"] == "assistant" for m in messages)
        raise BadRow(
            ("every message of the assistant has train: false" if silent else "no message of the assistant")
            + ": there is nothing to train on"
        )
    return messages


def _turns(row: Mapping[str, Any], name: str) -> Text:
    """Reads a field that is a text, one message, or a list of messages."""
    value = row.get(name)
    return read_messages(value, name, row.get("tools")) if isinstance(value, (list, Mapping)) else field(row, name)


def _answer(row: Mapping[str, Any], name: str) -> Text:
    """Reads an answer field; raises BadRow if its text is empty."""
    answer = _turns(row, name)
    if isinstance(answer, str) and not answer.strip():
        raise BadRow(f"field {name!r} is empty: there is no answer")
    return answer


def _only_assistant(answer: Text, name: str) -> Text:
    """Checks that an answer has only trained assistant messages, and returns it.

    The messages of a user or a tool in an answer would be scored as output of the model.

    Raises:
        BadRow: the answer is empty, or has a message that is not trained on.
    """
    if isinstance(answer, Messages) and (not answer or not all(answer.trained)):
        raise BadRow(
            f"{name} must be messages of the assistant, all trained on; what comes before belongs to the prompt"
        )
    return answer


def _same_form(prompt: Text, *answers: Text) -> None:
    """Raises BadRow unless the prompt and the answers are all texts or all messages."""
    if len({isinstance(t, Messages) for t in (prompt, *answers)}) > 1:
        raise BadRow("prompt and answers must all be texts, or all lists of messages")


def preference(row: Mapping[str, Any]) -> Formatted:
    """Reads the fields `prompt`, `chosen`, `rejected` (texts or lists of messages), and `margin` (optional).

    A row without `prompt` uses its field `messages` or `conversations` as the prompt. A row without these uses the
    common prefix of the two answers, which must then be lists of messages.

    Raises:
        BadRow: a field is missing or empty, the answers are equal, the forms differ, or the margin is not finite.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same: there is no preference to learn")
    prompt: Text
    before = (
        next((name for name in ("messages", "conversations") if name in row), "prompt")
        if "prompt" not in row
        else "prompt"
    )
    if before not in row and isinstance(chosen, Messages) and isinstance(rejected, Messages):
        same = next(
            i for i in range(len(chosen) + 1) if i >= len(chosen) or i >= len(rejected) or chosen[i] != rejected[i]
        )
        prompt, chosen, rejected = chosen.part(0, same), chosen.part(same), rejected.part(same)
        if not prompt or not chosen or not rejected:
            raise BadRow(
                "chosen and rejected need messages in common, which are the prompt, and at least one that differs each"
            )
    else:
        prompt = _turns(row, before)
    _same_form(prompt, _only_assistant(chosen, "chosen"), _only_assistant(rejected, "rejected"))
    margin = row.get("margin") or 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not math.isfinite(margin):
        raise BadRow(f"field 'margin' is {margin!r}, not a finite number")
    return Preference(prompt, chosen, rejected, float(margin))


def unpaired(row: Mapping[str, Any]) -> Formatted:
    """Reads the fields `prompt`, `completion` and `label`, True if the completion is desirable (KTO)."""
    label = row.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise BadRow(f"field 'label' is {label!r}: it must be true if the completion is desirable, else false")
    prompt, completion = _turns(row, "prompt"), _answer(row, "completion")
    _same_form(prompt, _only_assistant(completion, "completion"))
    return Labelled(prompt, completion, bool(label))


def prompt(row: Mapping[str, Any]) -> Formatted:
    """Reads the field `prompt` (a text or a list of messages), and `tools` (optional) for a list of messages.

    All fields except `prompt` are passed to the reward functions by name.
    """
    return Prompt(_turns(row, "prompt"), {k: v for k, v in row.items() if k != "prompt"})
