"""Tokenisation of chats with the tokenizer's chat template, and the loss mask over the assistant's turns.

The character spans that the assistant writes are determined by the first method that applies:

1. The template's `{% generation %}` blocks.
2. Prefix differences: a turn starts where the rendered prompt for it ends, and ends where the rendered chat up to and
   including the turn ends.
3. Turn headers, for templates that render a turn differently once another turn follows (Qwen3 omits its reasoning):
   the span runs from the header of an assistant turn to the token that ends the turn. The header contains a special
   token, so a message can't contain it.

All methods are checked the same way: each message's text must occur in its span, no token may overlap both a prompt and
an answer, and each trained turn must end with an end-of-turn token.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from myllm_ray.data.chat_template import ChatTemplate, Span
from myllm_ray.data.messages import REASONING, BadRow, Messages
from myllm_ray.data.special_tokens import Tokens


class Chat(NamedTuple):
    """A tokenised chat: `ids` (n,) int64, and `trained` (n,) bool, True where the loss includes the token."""

    ids: np.ndarray
    trained: np.ndarray


def tokenize_chat(messages: Messages, tokenizer: Any, train_on_prompt: bool = False) -> Chat:
    """Tokenises a whole chat and computes its loss mask.

    The loss includes each trained assistant turn and the token that ends it.

    Args:
        messages: the chat.
        tokenizer: a fast tokenizer with a chat template.
        train_on_prompt: if True, the loss includes all tokens.

    Raises:
        BadRow: the template can't render the chat, or the assistant's spans can't be determined.
    """
    template = ChatTemplate.of(tokenizer)
    shielded, text = _rendered(template, messages)
    tokens = template.special.rendered(text)
    if train_on_prompt:
        trained = np.ones(len(tokens.ids), bool)
    else:
        trained = np.zeros(len(tokens.ids), bool)
        for first, last in _trained_spans(template, shielded, text):
            _check_start(tokens, text, first)
            trained |= (tokens.offsets[:, 0] >= first) & (tokens.offsets[:, 0] < last)
    # A template without an end-of-turn token gives the model nothing to stop at: append the end-of-text token.
    if not template.turn_ends and messages[-1]["role"] == "assistant":
        last_trained = train_on_prompt or messages.trained[-1]
        return Chat(np.append(tokens.ids, tokenizer.eos_token_id), np.append(trained, last_trained))
    return Chat(tokens.ids, trained)


def tokenize_prompt(messages: Messages, tokenizer: Any) -> tuple[list[int], str]:
    """Returns the ids and the text of a chat followed by the generation prompt of the assistant's next turn."""
    template = ChatTemplate.of(tokenizer)
    _, text = _rendered(template, messages, generation_prompt=True)
    return template.special.rendered(text).ids.tolist(), template.special.unshield(text)


def tokenize_answer(prompt: Messages, answer: Messages, tokenizer: Any) -> list[int]:
    """Returns the ids of an answer, including the token that ends it.

    The answer is tokenised separately from the prompt, so that the token boundary is the same as at generation.

    Raises:
        BadRow: the template changes the prompt when an answer is appended, or omits a part of the answer.
    """
    template = ChatTemplate.of(tokenizer)
    _, before = _rendered(template, prompt, generation_prompt=True)
    whole = prompt.followed_by(answer)
    shielded, text = _rendered(template, whole)
    if not text.startswith(before):
        raise BadRow(
            "the chat template changes the prompt when an answer is added; use a template that only appends, "
            "or give prompt and answers as texts"
        )
    written = text[len(before) :].rstrip()
    squeezed = _squeezed(written)
    for i in range(len(prompt), len(whole)):
        _check_parts(shielded[i], squeezed, f"messages[{i}]")
    if template.turn_ends and not template.ends_turn(written):
        raise BadRow(f"the answer does not end with a token that ends a turn ({' or '.join(template.turn_ends)})")
    ids: list[int] = template.special.rendered(written).ids.tolist()
    return ids if template.turn_ends else [*ids, int(tokenizer.eos_token_id)]


def _rendered(template: ChatTemplate, messages: Messages, generation_prompt: bool = False) -> tuple[Messages, str]:
    """Returns the messages with their special tokens shielded (`SpecialTokens.shield`), and their rendered text.

    Raises:
        BadRow: the template does not support tools or tool calls that the chat has, interprets a special token in a
            message, or omits a part of a message.
    """
    special = template.special
    shielded = Messages(special.shield(list(messages)), special.shield(messages.tools), messages.trained)
    if messages.tools and not template.takes_tools:
        raise BadRow(
            "the chat template does not write tool definitions; use a template that does, or leave out 'tools'"
        )
    if not template.takes_calls and any(message.get("tool_calls") for message in messages):
        raise BadRow("the chat template does not write tool calls; use a template that does")
    text = template.render(shielded, shielded.tools, generation_prompt)
    # Shielded and original messages must render alike: a difference means that the template branches on the token.
    if (shielded != messages or shielded.tools != messages.tools) and special.unshield(text) != template.render(
        messages, messages.tools, generation_prompt
    ):
        raise BadRow("the chat template acts on a special token in the messages, which must be treated as text")
    squeezed = _squeezed(text)
    for i, message in enumerate(shielded):
        if message["role"] != "assistant":
            _check_parts(message, squeezed, f"messages[{i}]")
    return shielded, text


def _trained_spans(template: ChatTemplate, messages: Messages, text: str) -> Iterator[Span]:
    """Yields the character spans of the trained assistant turns, each including the token that ends the turn."""
    wanted = [i for i, trained in enumerate(messages.trained) if trained]
    blocks = _generation_blocks(template, messages, text) if template.marks_generation else {}
    for i in wanted:
        spans = blocks.get(i) or [_span(template, messages, text, i)]
        last = spans[-1][1]
        if template.turn_marks and not template.ends_turn(text[:last]):
            # A `{% generation %}` block may stop before the end-of-turn token: extend the span over it.
            found = re.compile(rf"\s*(?:{'|'.join(map(re.escape, template.turn_marks))})").match(text, last)
            if found is None:
                raise BadRow(
                    f"messages[{i}]: the turn does not end with an end-of-turn token "
                    f"({' or '.join(template.turn_marks)})"
                )
            spans[-1] = (spans[-1][0], found.end())
        _check_parts(messages[i], _squeezed("".join(text[a:b] for a, b in spans)), f"messages[{i}]")
        yield from spans


def _generation_blocks(template: ChatTemplate, messages: Messages, text: str) -> dict[int, list[Span]]:
    """Returns the `{% generation %}` spans by index of the assistant message; empty if the chat has no such block.

    Raises:
        BadRow: the blocks can't be assigned to messages.
    """
    marked, blocks = template.generated(messages, messages.tools)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if marked == text and len(blocks) == len(turns):
        return {i: [block] for i, block in zip(turns, blocks, strict=True)}
    headers = _headers(template, text)
    if blocks and (marked != text or len(headers) != len(turns) or min(blocks)[0] < headers[0]):
        raise BadRow(
            f"the chat template has {len(blocks)} {{% generation %}} blocks for {len(turns)} assistant messages: "
            "the blocks can't be assigned to messages"
        )
    # A turn may have several blocks (reasoning, content): each block belongs to the last header before it.
    found: dict[int, list[Span]] = {}
    for block in sorted(b for b in blocks if b[0] < b[1]):
        found.setdefault(turns[bisect_right(headers, block[0]) - 1], []).append(block)
    return found


def _headers(template: ChatTemplate, text: str) -> list[int]:
    """Returns the start of each assistant turn header in a text; empty if the template has no header."""
    return [match.start() for match in re.finditer(re.escape(template.header), text)] if template.header else []


def _span(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span:
    """Returns the character span of assistant turn `i`, by prefix differences or else by turn headers."""
    found = _span_by_prefix(template, messages, text, i) or _span_by_header(template, messages, text, i)
    if found is None:
        raise BadRow(
            f"messages[{i}]: the chat template changes what it wrote before when a turn is added, so the loss mask "
            "can't be determined; use a template with {% generation %}, one that only appends, "
            "or format prompt_completion"
        )
    return found


def _span_by_prefix(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span | None:
    """Returns the span from the end of the prompt for turn `i` to the end of the chat through turn `i`.

    Trailing white space is excluded. Returns None if the template does not render the chat by appending only.
    """
    try:
        before = template.render(messages[:i], messages.tools, True) if i else ""
        through = template.render(messages[: i + 1], messages.tools).rstrip()
    except BadRow:  # a template may reject a prefix of a chat that it renders as a whole
        return None
    return (len(before), len(through)) if text.startswith(before) and text.startswith(through) else None


def _span_by_header(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span | None:
    """Returns the span from the end of turn `i`'s header through its end-of-turn token, or None if not found."""
    starts = _headers(template, text) if template.turn_marks else []
    turns = [j for j, m in enumerate(messages) if m["role"] == "assistant"]
    if len(starts) != len(turns):
        return None
    place = turns.index(i)
    prompt = (
        template.generation_prompt if text.startswith(template.generation_prompt, starts[place]) else template.header
    )
    first = starts[place] + len(prompt)
    end = re.compile("|".join(map(re.escape, template.turn_marks))).search(text, first, *starts[place + 1 : place + 2])
    return (first, end.end()) if end else None


def _check_start(tokens: Tokens, text: str, first: int) -> None:
    """Checks that no token contains both the end of a prompt and the start of its answer (white space is ignored).

    Raises:
        BadRow: a token crosses the boundary at character `first`.
    """
    across = (tokens.offsets[:, 0] < first) & (tokens.offsets[:, 1] > first)
    for start, stop in tokens.offsets[across]:
        if text[first:stop].strip():
            raise BadRow(
                f"the token {text[start:stop]!r} contains the end of a prompt and the beginning of its answer, which "
                "are tokenised separately at generation; use a chat template whose prompts end with a special token "
                "or a line break"
            )


def _check_parts(message: dict[str, Any], squeezed: str, where: str) -> None:
    """Checks that a rendered text contains all parts of a message.

    Templates omit parts that they do not support (a second system turn, reasoning, tool calls).

    Args:
        message: the message, with content, reasoning and tool calls.
        squeezed: the rendered text without white space.
        where: name of the message for errors.

    Raises:
        BadRow: a part of the message is not in the text.
    """
    reasoning = next((message[key] for key in REASONING if message.get(key)), "")
    names = [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls") or []]
    for what, part in [("content", message.get("content") or ""), ("reasoning_content", reasoning), *names]:
        if (
            isinstance(part, str)
            and _squeezed(part) not in squeezed
            and _squeezed(json.dumps(part, ensure_ascii=False)[1:-1]) not in squeezed
        ):
            raise BadRow(
                f"{where}: the chat template leaves out its {what}, or a part of it"
                + (
                    "; train: false excludes a message of the assistant from the loss"
                    if message["role"] == "assistant"
                    else ""
                )
            )


def _squeezed(text: str) -> str:
    """Returns a text without white space, because templates strip and add white space."""
    return "".join(text.split())
