"""Chats as people have them: rows of OpenAI's, ShareGPT's and Hugging Face's layout, as messages for templates.

    OpenAI, Hugging Face   {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
    ShareGPT               {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}

Either key may hold either kind of message.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from myllm_ray.config.errors import DataError

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
"""ShareGPT's names of roles; every other name is kept."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what a model thinks before it answers; transformers hands each to templates under all of these names."""


class BadRow(DataError):
    """One row can't be used; `data.on_bad_row` decides whether that ends the run or the row is skipped and counted."""


class Messages(list[dict[str, Any]]):
    """A chat, to be rendered by the tokenizer's chat template.

    Args:
        messages: {role, content, ...} each.
        tools: definitions of the tools that the assistant may call, as JSON schemas.
        trained: for each message, whether the loss is on it; default: on the assistant's.
    """

    def __init__(
        self,
        messages: Iterable[Mapping[str, Any]] = (),
        tools: list[dict[str, Any]] | None = None,
        trained: Iterable[bool] | None = None,
    ):
        super().__init__(dict(message) for message in messages)
        self.tools = tools
        self.trained = [m["role"] == "assistant" for m in self] if trained is None else list(trained)

    def part(self, start: int, stop: int | None = None) -> Messages:
        """Messages [start, stop), with the same tools."""
        return Messages(self[start:stop], self.tools, self.trained[start:stop])

    def followed_by(self, others: Messages) -> Messages:
        """These messages and then the others, with the tools of these."""
        return Messages([*self, *others], self.tools, [*self.trained, *others.trained])


def read_messages(value: Any, name: str, tools: Any = None, system: Any = None) -> Messages:
    """A list of messages as templates read them.

    Args:
        value: the row's field.
        name: of the field, for messages of errors.
        tools: tool definitions: a list, or its JSON.
        system: ShareGPT's field of that name: a message of the system before the others.

    Raises:
        BadRow: there is no text in a message, or something that is not text; or a message has no role.
    """
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list) or not value:
        raise BadRow(f"field {name!r} must be a non-empty list of {{role, content}} or {{from, value}}")
    read = [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]
    messages, trained = [m for m, _ in read], [t for _, t in read]
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages, trained = [{"role": "system", "content": system}, *messages], [False, *trained]
    return Messages(messages, _tools(tools), trained)


def _message(message: Any, where: str) -> tuple[dict[str, Any], bool]:
    """A message, and whether the loss is on it."""
    if not isinstance(message, Mapping):
        raise BadRow(f"{where} is {type(message).__name__}, not a message {{role, content}}")
    given = {key: value for key, value in message.items() if value is not None}
    named = given.pop("from", None)
    role = given.pop("role", None) or named
    if not isinstance(role, str):
        raise BadRow(f"{where} has no role (or from)")
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    found: dict[str, Any] = {"role": ROLES.get(role, role)}
    if role == "function_call":
        given["tool_calls"], content = _parsed(content, f"{where}: the function call"), None
    calls = _tool_calls(given.pop("tool_calls", None), where)
    trained = _is_trained(given, found["role"], where)
    for key in REASONING:
        if key in given and not isinstance(given[key], str):
            raise BadRow(f"{where}.{key} is {type(given[key]).__name__}, not text")
    text = _text(content, where)
    if text is None and not calls:
        raise BadRow(f"{where} has no text content")
    if found["role"] == "assistant" and not calls and not (text or "").strip():
        raise BadRow(f"{where}: the assistant's content is empty, and it calls no tool: there is nothing to train on")
    # Without the key rather than with null: templates that ask for content find none, others fail.
    return {
        **found,
        **({} if calls and not text else {"content": text}),
        **({"tool_calls": calls} if calls else {}),
        **given,
    }, trained


def _is_trained(given: dict[str, Any], role: str, where: str) -> bool:
    """Takes `train` and `weight` out of a message; the loss is on the assistant's unless one says otherwise."""
    weight, train = given.pop("weight", None), given.pop("train", None)
    if weight is not None and weight not in (0, 1):
        raise BadRow(f"{where}.weight is {weight!r}: 1 trains on a message of the assistant, 0 does not")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{where}.train is {train!r}: true or false")
    if role != "assistant":
        if train or weight:
            raise BadRow(f"{where} is of the {role}: only messages of the assistant can be trained on (train, weight)")
        return False
    return train is not False and weight != 0


def _text(content: Any, where: str) -> str | None:
    """The text of a content: a string, null, or a list of parts that are all text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRow(f"{where} has {type(content).__name__} as content, not text")
    texts = []
    for part in content:
        kind = part.get("type", "text" if "text" in part else "unknown") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise BadRow(f"{where} has a part of type {kind!r}: only text can be trained on, no images, audio or video")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's layout, their arguments as objects."""
    if calls is None:
        return []
    calls = _parsed(calls, f"{where}.tool_calls") if isinstance(calls, str) else calls
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(
                f"{where}.tool_calls: a call needs the name of a function, as {{function: {{name, arguments}}}}"
            )
        arguments = function.get("arguments", function.get("parameters"))
        arguments = (
            _parsed(arguments, f"{where}.tool_calls: the arguments") if isinstance(arguments, str) else arguments
        )
        found.append(
            {
                "type": "function",
                **{k: v for k, v in call.items() if k in ("id", "type") and v is not None},
                "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
            }
        )
    return found


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions from a list or its JSON; None without any. Null values, which Parquet fills in, are left out."""
    tools = _parsed(tools, "field 'tools'") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(
            "field 'tools' must be a list of definitions {type: function, function: {name, description, parameters}}"
        )
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parsed(text: Any, what: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"{what} is not valid JSON") from None
