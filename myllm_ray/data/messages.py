"""Reads chats in the OpenAI, ShareGPT and Hugging Face layouts as messages for chat templates.

    OpenAI, Hugging Face   {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
    ShareGPT               {"conversations": [{"from": "human", "value": ...}, ...], "system": ..., "tools": ...}

Either key may contain either kind of message.
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
"""Maps ShareGPT's role names to those of chat templates; all other names are unchanged."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message's reasoning; transformers also copies the text to the other names that chat templates read."""


class BadRow(DataError):
    """Raised for a row that can't be used.

    `data.on_bad_row` determines whether the error ends the run, or the row is skipped and counted.
    """


class Messages(list[dict[str, Any]]):
    """A chat, to be rendered by the tokenizer's chat template.

    Args:
        messages: the messages, each {role, content, ...}.
        tools: definitions of the tools that the assistant may call, as JSON schemas.
        trained: for each message, whether the loss includes it. Default: True for the assistant's messages.
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
        """Returns messages [start, stop), with the same tools."""
        return Messages(self[start:stop], self.tools, self.trained[start:stop])

    def followed_by(self, others: Messages) -> Messages:
        """Returns these messages followed by `others`, with the tools of these messages."""
        return Messages([*self, *others], self.tools, [*self.trained, *others.trained])


def read_messages(value: Any, name: str, tools: Any = None, system: Any = None) -> Messages:
    """Reads the messages of a row in the layout of chat templates.

    Args:
        value: the field of the row: a list of messages, or one message.
        name: name of the field, for error messages.
        tools: tool definitions: a list, or its JSON.
        system: the `system` field of ShareGPT rows: the content of a system message inserted before the others,
            unless the chat already begins with one.

    Raises:
        BadRow: a message has no role, no content, or content that is not text; an assistant message has nothing to
            train on; or `train`, `weight`, the tool calls or the tools are not valid.
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
    """Reads one message; returns it and whether the loss includes it."""
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
    # Omit `content` instead of setting it to None: a template that tests for it finds none, and one that requires it
    # fails in the probe and gets an empty content (`ChatTemplate.needs_content`).
    return {
        **found,
        **({} if calls and not text else {"content": text}),
        **({"tool_calls": calls} if calls else {}),
        **given,
    }, trained


def _is_trained(given: dict[str, Any], role: str, where: str) -> bool:
    """Removes `train` and `weight` from a message and returns whether the loss includes the message.

    The loss includes assistant messages, except those with `train: false` or `weight: 0`.
    """
    weight, train = given.pop("weight", None), given.pop("train", None)
    if weight is not None and weight not in (0, 1):
        raise BadRow(f"{where}.weight is {weight!r}: it must be 1 (train on the assistant's message) or 0 (do not)")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"{where}.train is {train!r}: it must be true or false")
    if role != "assistant":
        if train or weight:
            raise BadRow(f"{where} has role {role}: only assistant messages can be trained on (train, weight)")
        return False
    return train is not False and weight != 0


def _text(content: Any, where: str) -> str | None:
    """Returns the text of a message's content, which is a string, None, or a list of text parts.

    Raises:
        BadRow: the content is of another type, or a part is not text.
    """
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
    """Returns tool calls in OpenAI's layout, with their arguments as objects.

    Args:
        calls: a call, a list of calls, the JSON of either, or None.
        where: name of the message for errors.

    Raises:
        BadRow: a call has no function name, or its arguments are not valid JSON.
    """
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
    """Returns tool definitions from a list or its JSON, or None if there are no tools.

    Null values are removed: Parquet fills in the keys that a definition does not have.

    Raises:
        BadRow: the value is not a list of definitions.
    """
    tools = _parsed(tools, "field 'tools'") if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow(
            "field 'tools' must be a list of definitions {type: function, function: {name, description, parameters}}"
        )
    return [_without_nulls(tool) for tool in tools]


def _without_nulls(value: Any) -> Any:
    """Returns a JSON value with all keys whose value is null removed, recursively."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parsed(text: Any, what: str) -> Any:
    """Parses JSON; raises BadRow that names `what` if it is not valid."""
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"{what} is not valid JSON") from None
