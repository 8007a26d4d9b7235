"""Chats as tokens: through the tokenizer's template, with the loss on what the assistant writes.

Which characters of a chat the assistant writes is known, in this order, from

1. the template's `{% generation %}` blocks;
2. prefix differences: a turn begins where the prompt for it ends, and ends where the chat up to and with it ends;
3. where a template writes an earlier turn otherwise once another follows (Qwen3 leaves out its thinking): what begins
   every turn of the assistant, which holds a special token and so can't be in a message, up to the token that ends it.

Whichever it is: each message's text must be found where it is said to be, no token may belong to a prompt and an answer
both, and each turn that is trained on must end with a token that ends turns.
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
    """A tokenised chat: (n,) ids, and (n,) bool: whether the loss is on each."""

    ids: np.ndarray
    trained: np.ndarray


def tokenize_chat(messages: Messages, tokenizer: Any, train_on_prompt: bool = False) -> Chat:
    """A whole chat, with the loss on the turns of the assistant that are trained on, each with the token that ends it.

    Raises:
        BadRow: the template can't render it, or it can't be said what of it the assistant writes.
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
    if not template.turn_ends and messages[-1]["role"] == "assistant":
        last_trained = train_on_prompt or messages.trained[-1]
        return Chat(np.append(tokens.ids, tokenizer.eos_token_id), np.append(trained, last_trained))
    return Chat(tokens.ids, trained)


def tokenize_prompt(messages: Messages, tokenizer: Any) -> tuple[list[int], str]:
    """The ids and the text of a chat with the beginning of the assistant's next turn, from which it is sampled."""
    template = ChatTemplate.of(tokenizer)
    _, text = _rendered(template, messages, generation_prompt=True)
    return template.special.rendered(text).ids.tolist(), template.special.unshield(text)


def tokenize_answer(prompt: Messages, answer: Messages, tokenizer: Any) -> list[int]:
    """The ids of an answer, with what ends it. Apart from the prompt's: the boundary is where it is at generation.

    Raises:
        BadRow: the template changes the prompt when an answer is added, or leaves out a part of the answer.
    """
    template = ChatTemplate.of(tokenizer)
    _, before = _rendered(template, prompt, generation_prompt=True)
    whole = prompt.followed_by(answer)
    shielded, text = _rendered(template, whole)
    if not text.startswith(before):
        raise BadRow(
            "the chat template changes the prompt when an answer is added; use one that only appends, or give texts"
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
    """The messages, special tokens in them shielded (`SpecialTokens.shield`), and what the template makes of those."""
    special = template.special
    shielded = Messages(special.shield(list(messages)), special.shield(messages.tools), messages.trained)
    if messages.tools and not template.takes_tools:
        raise BadRow(
            "the chat template has no place for the definitions of tools; use one that has, or leave out 'tools'"
        )
    if not template.takes_calls and any(message.get("tool_calls") for message in messages):
        raise BadRow("the chat template has no place for tool calls")
    text = template.render(shielded, shielded.tools, generation_prompt)
    if (shielded != messages or shielded.tools != messages.tools) and special.unshield(text) != template.render(
        messages, messages.tools, generation_prompt
    ):
        raise BadRow("the chat template acts on a special token in the messages, which are text")
    squeezed = _squeezed(text)
    for i, message in enumerate(shielded):
        if message["role"] != "assistant":
            _check_parts(message, squeezed, f"messages[{i}]")
    return shielded, text


def _trained_spans(template: ChatTemplate, messages: Messages, text: str) -> Iterator[Span]:
    """Where in the text the assistant's turns are that are trained on, each with the token that ends it."""
    wanted = [i for i, trained in enumerate(messages.trained) if trained]
    blocks = _generation_blocks(template, messages, text) if template.marks_generation else {}
    for i in wanted:
        spans = blocks.get(i) or [_span(template, messages, text, i)]
        last = spans[-1][1]
        if template.turn_marks and not template.ends_turn(text[:last]):
            found = re.compile(rf"\s*(?:{'|'.join(map(re.escape, template.turn_marks))})").match(text, last)
            if found is None:
                raise BadRow(
                    f"messages[{i}]: the turn does not end with a token that ends turns "
                    f"({' or '.join(template.turn_marks)})"
                )
            spans[-1] = (spans[-1][0], found.end())
        _check_parts(messages[i], _squeezed("".join(text[a:b] for a, b in spans)), f"messages[{i}]")
        yield from spans


def _generation_blocks(template: ChatTemplate, messages: Messages, text: str) -> dict[int, list[Span]]:
    """The `{% generation %}` blocks of each message of the assistant. Empty: the template made none of this chat."""
    marked, blocks = template.generated(messages, messages.tools)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if marked == text and len(blocks) == len(turns):
        return {i: [block] for i, block in zip(turns, blocks, strict=True)}
    headers = _headers(template, text)
    if blocks and (marked != text or len(headers) != len(turns) or min(blocks)[0] < headers[0]):
        raise BadRow(
            f"the chat template has {len(blocks)} {{% generation %}} blocks for {len(turns)} messages of the assistant: "
            "it can't "
            "be said which block is whose"
        )
    found: dict[int, list[Span]] = {}
    for block in sorted(b for b in blocks if b[0] < b[1]):
        found.setdefault(turns[bisect_right(headers, block[0]) - 1], []).append(block)
    return found


def _headers(template: ChatTemplate, text: str) -> list[int]:
    """Where what begins every turn of the assistant is in a text; nowhere if there is no such thing."""
    return [match.start() for match in re.finditer(re.escape(template.header), text)] if template.header else []


def _span(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span:
    found = _span_by_prefix(template, messages, text, i) or _span_by_header(template, messages, text, i)
    if found is None:
        raise BadRow(
            f"messages[{i}]: the chat template changes what it wrote before when a turn is added, "
            "so the loss mask can't be told; "
            "use a template with {% generation %}, one that only appends, or format prompt_completion"
        )
    return found


def _span_by_prefix(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span | None:
    """From the end of the prompt for turn i to the end of the chat with it, less the white space behind it."""
    try:
        before = template.render(messages[:i], messages.tools, True) if i else ""
        through = template.render(messages[: i + 1], messages.tools).rstrip()
    except BadRow:  # a template may refuse the beginning of a chat that it renders as a whole
        return None
    return (len(before), len(through)) if text.startswith(before) and text.startswith(through) else None


def _span_by_header(template: ChatTemplate, messages: Messages, text: str, i: int) -> Span | None:
    """From what begins turn i to the token that ends it."""
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
    """No token holds the end of a prompt and the beginning of its answer both (white space does not count)."""
    across = (tokens.offsets[:, 0] < first) & (tokens.offsets[:, 1] > first)
    for start, stop in tokens.offsets[across]:
        if text[first:stop].strip():
            raise BadRow(
                f"the token {text[start:stop]!r} holds the end of a prompt and the beginning of its answer, "
                "which is tokenised "
                "otherwise at generation; use a chat template whose prompts end with a special token or a line break"
            )


def _check_parts(message: dict[str, Any], squeezed: str, where: str) -> None:
    """A message is all in a text (`squeezed`: without white space): templates leave out what they have no place for
    (a second system turn, thinking, calls)."""
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
                    "; train: false takes a message of the assistant out of the loss"
                    if message["role"] == "assistant"
                    else ""
                )
            )


def _squeezed(text: str) -> str:
    """A text without its white space, which templates strip and add."""
    return "".join(text.split())
