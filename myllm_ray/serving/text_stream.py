"""Decodes an answer token by token, so that the pieces together are the text of the whole answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Text of an answer that is shown while it is sampled.

    A piece of text is returned when no later token can change it. Tokens whose text ends with an incomplete UTF-8
    character are held back, and so is text that can be the beginning of a stop text. Each token is decoded together
    with the tokens of the piece before it, because some tokenizers decode a token differently at the start of a text
    (SentencePiece removes its leading space).

    `tokenizers.decoders.DecodeStream` decodes in the same way. It does not return the text that is held back at the
    end of an answer, and it raises an exception for some invalid byte sequences.

    Args:
        tokenizer: Decodes the tokens; special tokens are left out.
        stop: Texts that end the answer. The text returned ends before the first of them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, [word for word in stop if word]
        self.stopped = False
        """Whether a stop text was found."""
        self._tokens: list[int] = []
        self._first = self._read = 0  # tokens [first, read) are the context, and their text is decoded
        self._held = ""  # decoded text that can be the beginning of a stop text

    def add(self, token: int) -> str:
        """Adds a token and returns the text that is now final; empty if none is.

        After a stop text, further tokens are ignored.
        """
        if self.stopped:
            return ""
        self._tokens.append(token)
        new = self._new_text()
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._first, self._read = self._read, len(self._tokens)
        return self._before_stop(new)

    def end(self) -> str:
        """Returns the rest of the text at the end of the answer. Incomplete characters become U+FFFD."""
        if self.stopped:
            return ""
        rest = self._before_stop(self._new_text())
        self._first = self._read = len(self._tokens)
        rest, self._held = rest + self._held, ""
        return rest

    def _new_text(self) -> str:
        """Returns the text of the tokens after the context."""
        before = self._decode(self._tokens[self._first : self._read])
        # Invalid bytes can change the text of the context (SentencePiece decodes a run of byte tokens as a whole). It
        # is shown already, so only what makes the text longer is new.
        return self._decode(self._tokens[self._first :])[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _before_stop(self, new: str) -> str:
        """Returns the part of the text before a stop text, without the end that can be the beginning of one."""
        text = self._held + new
        places = [at for word in self.stop if (at := text.find(word)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        longest = max((len(word) for word in self.stop), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(text)), 0, -1) if any(w.startswith(text[-n:]) for w in self.stop)), 0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
