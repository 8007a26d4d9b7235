"""Formats: what a row of the data means, as parts of text that are trained on or not.

A format is a function `row -> Conversation`; one of your own is named by import path in `data.train.format` and may
return a list of `(text, trained_on)` pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from myllm_ray.data.messages import BadRow as BadRow
from myllm_ray.data.messages import Messages, read_messages

Part = tuple[str, bool]
"""A piece of text, and whether the loss stands on it."""


class Instruction(list[Part]):
    """An instruction and its answer: in a plain layout, and as the chat that it is where the tokenizer has a chat template."""

    def __init__(self, parts: Iterable[Part], messages: Messages):
        super().__init__(parts)
        self.messages = messages


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
    """`instruction`, optional `input`, `output`: a chat of two turns where the tokenizer has a chat template of its own, else
    in the layout of Alpaca (Taori et al., 2023) without its preamble."""
    output = field(row, "output")
    if not output:
        raise BadRow("field 'output' is empty: there is nothing to train on")
    asked, given = field(row, "instruction"), field(row, "input", required=False)
    prompt = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    turns = [{"role": "user", "content": f"{asked}\n\n{given}" if given else asked}, {"role": "assistant", "content": output}]
    return Instruction([(prompt + "### Response:\n", False), (output, True)], Messages(turns))


def chat(row: Mapping[str, Any]) -> Formatted:
    """`messages` or `conversations` (data/messages.py), and optional `tools`; the loss is on the assistant's turns."""
    name = "messages" if row.get("messages") is not None or "conversations" not in row else "conversations"
    messages = read_messages(row.get(name), name, row.get("tools"), row.get("system") if name == "conversations" else None)
    if not any(messages.trained):
        silent = any(m["role"] == "assistant" for m in messages)
        raise BadRow(("every message of the assistant has train: false" if silent else "no message of the assistant")
                     + ": there is nothing to train on")
    return messages


def _turns(row: Mapping[str, Any], name: str) -> Text:
    """A field that is a text, or a list of messages."""
    value = row.get(name)
    return read_messages(value, name, row.get("tools")) if isinstance(value, (list, Mapping)) else field(row, name)


def _answer(row: Mapping[str, Any], name: str) -> Text:
    answer = _turns(row, name)
    if isinstance(answer, str) and not answer.strip():
        raise BadRow(f"field {name!r} is empty: there is no answer")
    return answer


def _only_assistant(answer: Text, name: str) -> Text:
    """An answer, all of it by the assistant: what the user or a tool wrote in it would be scored as the model's."""
    if isinstance(answer, Messages) and (not answer or not all(answer.trained)):
        raise BadRow(f"{name} must be messages of the assistant, all trained on; what comes before belongs to the prompt")
    return answer


def _same_form(prompt: Text, *answers: Text) -> None:
    if len({isinstance(t, Messages) for t in (prompt, *answers)}) > 1:
        raise BadRow("prompt and answers must all be texts, or all lists of messages")


def preference(row: Mapping[str, Any]) -> Formatted:
    """`prompt`, `chosen`, `rejected` (texts, or lists of messages), and an optional `margin`.

    Without a `prompt`, it is what the row has as `messages` or `conversations`, or what the two answers, lists of messages, have in
    common at their beginning.
    """
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same: there is no preference to learn")
    prompt: Text
    before = next((name for name in ("messages", "conversations") if name in row), "prompt") if "prompt" not in row else "prompt"
    if before not in row and isinstance(chosen, Messages) and isinstance(rejected, Messages):
        same = next(i for i in range(len(chosen) + 1) if i >= len(chosen) or i >= len(rejected) or chosen[i] != rejected[i])
        prompt, chosen, rejected = chosen.part(0, same), chosen.part(same), rejected.part(same)
        if not prompt or not chosen or not rejected:
            raise BadRow("chosen and rejected need messages in common, the prompt, and one each that differs")
    else:
        prompt = _turns(row, before)
    _same_form(prompt, _only_assistant(chosen, "chosen"), _only_assistant(rejected, "rejected"))
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
    _same_form(prompt, _only_assistant(completion, "completion"))
    return Labelled(prompt, completion, bool(label))


def prompt(row: Mapping[str, Any]) -> Formatted:
    """`prompt` (a text, or a list of messages, with optional `tools`); all other fields are handed to the reward functions by their names."""
    return Prompt(_turns(row, "prompt"), {k: v for k, v in row.items() if k != "prompt"})
