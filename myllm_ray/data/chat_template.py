"""Properties of a chat template: the tokens that end a turn, the header that begins one, and the supported inputs.

The properties are found by rendering short probe chats once per template.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import weakref
from collections.abc import Iterable
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from myllm_ray.data.messages import BadRow
from myllm_ray.data.special_tokens import SpecialTokens

log = logging.getLogger(__name__)
_ASKED, _ANSWER, _AGAIN, _TOOL, _ARGUMENT = (
    "probe question",
    "probe answer",
    "probe question again",
    "probe_tool",
    "probe_argument",
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""(first, last): the characters [first, last) of a text."""


class ChatTemplate:
    """The properties of a tokenizer's chat template, and rendering with it.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        BadRow: the template does not write the assistant's content.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.special = (
            weakref.proxy(tokenizer),
            SpecialTokens.of(tokenizer),
        )  # a weak reference: the cache `_made` must not keep the tokenizer alive
        self.as_parts = self.arguments_as_text = self.needs_content = self.takes_calls = False
        self.marks_generation = bool(_GENERATION.search(tokenizer.get_chat_template() or ""))
        ends, marks = self._turn_ends()
        self.turn_ends: tuple[str, ...] = ends
        """Spellings of the tokens that end an assistant turn; empty if the template writes no such token."""
        self.turn_marks: tuple[str, ...] = (*ends, *marks)
        """`turn_ends`, and the tokens that end an assistant turn only when another turn follows."""

    @staticmethod
    def of(tokenizer: Any) -> ChatTemplate:
        """Returns the `ChatTemplate` of a tokenizer, cached until the tokenizer's template changes."""
        known = _made.get(tokenizer)
        if known is None or known[0] != tokenizer.chat_template:
            known = _made[tokenizer] = (tokenizer.chat_template, ChatTemplate(tokenizer))
        return known[1]

    def render(self, messages: Iterable[dict[str, Any]], tools: Any = None, generation_prompt: bool = False) -> str:
        """Renders a chat as text.

        Args:
            messages: the messages of the chat.
            tools: the tool definitions, or None.
            generation_prompt: if True, append the beginning of the assistant's next turn.

        Raises:
            BadRow: the template rejects the messages.
        """
        given = self._as_wanted(messages)
        try:
            text: str = self.tokenizer.apply_chat_template(
                given, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template can raise any exception type
            raise BadRow(f"the chat template refuses the messages: {' '.join(str(error).split())[:200]}") from None
        return text

    def _as_wanted(self, messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns copies of the messages in the form that the template reads.

        Depending on the template, contents become lists of parts (`as_parts`), call arguments become JSON strings
        (`arguments_as_text`), and messages without content get an empty one (`needs_content`).
        """
        found = [dict(message) for message in messages]
        for message in found:
            if self.needs_content:
                message.setdefault("content", "")
            if self.as_parts and isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            if self.arguments_as_text and message.get("tool_calls"):
                message["tool_calls"] = [
                    {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                    for call in message["tool_calls"]
                ]
        return found

    def _turn_ends(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns (tokens that end a turn, further tokens that end a turn when another follows), from probe chats.

        Sets `as_parts`, and the flags that `_call_ends` sets.
        """
        asked, answer = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}
        if _ANSWER not in self._probed([asked, answer]):
            self.as_parts = True
            if _ANSWER not in self._probed([asked, answer]):
                self.as_parts = False
                raise BadRow("the chat template does not write the assistant's content: it can't be used for training")
        ends = self._leading(self._probed([asked, answer]).rpartition(_ANSWER)[2])
        between = (
            self._probed([asked, answer, {"role": "user", "content": _AGAIN}])
            .rpartition(_AGAIN)[0]
            .rpartition(_ANSWER)[2]
        )
        marks = [m for m in self._leading(between)[:1] if ends and m not in ends]
        ends += self._call_ends(ends)
        return tuple(ends), tuple(marks)

    def _call_ends(self, ends: list[str]) -> list[str]:
        """Returns the further tokens that end a turn with a tool call, and detects how the template reads calls.

        Sets `takes_calls`, `needs_content` and `arguments_as_text`.
        """
        call = {"type": "function", "id": "probe1234", "function": {"name": _TOOL, "arguments": {_ARGUMENT: 1}}}
        for self.needs_content, self.arguments_as_text in itertools.product((False, True), (False, True)):
            text = self._probed(
                [{"role": "user", "content": _ASKED}, {"role": "assistant", "tool_calls": [call]}]
            ).rpartition(_TOOL)[2]
            behind = [match.group() for match in self.special.pattern.finditer(text)]
            # With an empty content, some templates write an empty turn after the call.
            if _ARGUMENT in text and sum(token in ends for token in behind) <= max(1, len(ends)):
                self.takes_calls = True
                return [token for token in behind[-1:] if ends and token not in ends]
        self.needs_content = self.arguments_as_text = False
        return []

    def ends_turn(self, text: str) -> bool:
        """Returns whether a text ends with a token that ends an assistant turn, ignoring trailing white space."""
        return text.rstrip().endswith(self.turn_marks) if self.turn_marks else False

    def _probed(self, messages: list[dict[str, Any]], tools: Any = None, generation_prompt: bool = False) -> str:
        """Renders a probe chat; returns an empty text if the template rejects it."""
        try:
            return self.render(messages, tools, generation_prompt)
        except BadRow:
            return ""

    def _leading(self, text: str) -> list[str]:
        """Returns the distinct spellings of the added tokens at the start of a text, skipping white space."""
        found = []
        while match := self._added.match(text := text.lstrip()):
            found.append(match.group())
            text = text[match.end() :]
        return list(dict.fromkeys(found))

    @cached_property
    def _added(self) -> re.Pattern[str]:
        """A pattern that matches all added tokens, longest first.

        Includes tokens not marked special: some tokenizers do not mark their end-of-turn token as special.
        """
        spelled = {t.content for t in self.tokenizer.added_tokens_decoder.values()} | self.special.ids.keys()
        return re.compile(
            "|".join(re.escape(s) for s in sorted(spelled, key=lambda s: (-len(s), s)) if s.strip()) or "(?!)"
        )

    @cached_property
    def header(self) -> str:
        """The text that begins every assistant turn, or an empty text if it contains no special token.

        The special token ensures that a message can't contain the header.
        """
        asked, answer = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}
        plain, prompt = (self._probed([asked], None, ask).rpartition(_ASKED)[2] for ask in (False, True))
        chats = [asked, answer], [asked, answer, {"role": "user", "content": _AGAIN}]
        behind = [prompt, *(self._probed(chat).partition(_ANSWER)[0].rpartition(_ASKED)[2] for chat in chats)]
        # `of_user` is the text that ends the user's turn: it precedes the header and is removed from it.
        pieces = zip(self._split(plain), self._split(prompt), strict=False)
        of_user = "".join(one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pieces))
        same = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*behind, strict=False))
        found = "".join(characters[0] for characters in same)[len(of_user) :]
        return found if self.special.pattern.search(found) else ""

    @cached_property
    def generation_prompt(self) -> str:
        """The text before an answer at generation: `header` and any further text of the template (`<think>`)."""
        prompt = self._probed([{"role": "user", "content": _ASKED}], None, True)
        return prompt[prompt.rfind(self.header) :] if self.header else ""

    def _split(self, text: str) -> list[str]:
        """Splits a text into its added tokens and the text between them."""
        edges = [0, *(edge for match in self._added.finditer(text) for edge in match.span()), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(edges) if a < b]

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template writes tool definitions."""
        tool = {
            "type": "function",
            "function": {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object", "properties": {}}},
        }
        return _TOOL in self._probed([{"role": "user", "content": _ASKED}], [tool])

    def notes(self) -> list[str]:
        """Returns notes about the template for the user, one line each."""
        names, found = " or ".join(self.turn_ends), []
        if not self.turn_ends:
            found.append(
                "the chat template writes no token that ends the assistant's turns: the end-of-text token "
                f"({self.tokenizer.eos_token}) is appended to the last answer of each chat, "
                "so that the model learns to stop"
            )
        elif self.marks_generation:
            asked = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWER}]
            text, spans = self.generated(asked, None)
            if not any(self.ends_turn(text[a:b]) for a, b in spans):
                found.append(
                    f"the chat template's {{% generation %}} leaves out the token that ends a turn ({names}): "
                    "the token is trained on anyway, so that the model learns to stop"
                )
        if "strftime_now" in str(self.tokenizer.get_chat_template()):
            found.append(
                "the chat template can write today's date: data prepared on another day may have other tokens; "
                "put a fixed date into the template"
            )
        return found

    def generated(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        """Returns the text of a chat and the character spans of its `{% generation %}` blocks.

        Raises:
            BadRow: the template rejects the messages.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        conversation = [{k: v for k, v in m.items() if v is not None} for m in self._as_wanted(messages)]
        found: Any
        try:
            found = render_jinja_template(
                conversations=[conversation],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template can raise any exception type
            raise BadRow(f"the chat template refuses the messages: {' '.join(str(error).split())[:200]}") from None
        (text,), (spans,) = found
        return text, list(spans)


def _json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


_made: WeakKeyDictionary[Any, tuple[Any, ChatTemplate]] = WeakKeyDictionary()


def end_tokens(tokenizer: Any, others: Iterable[int] = ()) -> tuple[int, ...]:
    """Returns the ids of the tokens that end an answer, without duplicates.

    The order is: the end-of-text token, the tokens that end the assistant's turns in the chat template, then those of
    `others` that are special tokens of this tokenizer, sorted.

    Args:
        tokenizer: a fast tokenizer.
        others: further candidate ids, from the base model's generation config.
    """
    special = SpecialTokens.of(tokenizer)
    found = [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template is not None:
        try:
            found += [
                int(tokenizer.convert_tokens_to_ids(spelling)) for spelling in ChatTemplate.of(tokenizer).turn_ends
            ]
        except BadRow as error:
            log.warning("%s", error)
    # If the base model has another tokenizer, its ids can mean other tokens here.
    found += sorted(i for i in others if i in special.ids.values())
    return tuple(dict.fromkeys(found))
