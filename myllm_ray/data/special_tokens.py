"""Tokenisation in which special tokens come from the chat template only, never from the data.

A tokenizer matches the spellings of its special tokens before it splits any other text. A document that contains
`<|endoftext|>` would therefore get the end-of-text token, and a message that contains `<|im_end|>` would end its turn.

Text without such a spelling is tokenised as usual. Text with one is tokenised by a copy of the tokenizer in which every
special token has another spelling of the same length, in private-use characters (`_respelled`). In a rendered chat, the
template's special tokens are replaced by the spellings of the copy, and those in the messages are unchanged. The
template's tokens then get special ids, and the messages are tokenised as text.

Added tokens that are not marked special (`<think>` and `<tool_call>` of Qwen3) remain tokens in all text, as intended
by the tokenizer.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from myllm_ray.data.messages import BadRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_COPY, _SHIELD = 0xF0000, 0x100000
"""First characters of the two private-use planes of Unicode.

`_COPY` is used for the spellings of the tokenizer's copy, `_SHIELD` for special tokens in messages.
"""
_SHIELDS = re.compile("[\U00100000-\U0010fffd]")


def start_of_text(tokenizer: Any) -> list[int]:
    """Returns the ids that every document without a chat template begins with: the begin-of-text token, if any.

    It is left out if it is also the end-of-text token (GPT-2), which already separates documents.
    """
    bos = tokenizer.bos_token_id
    return [] if bos is None or bos == tokenizer.eos_token_id else [int(bos)]


def continued(tokenizer: Any, text: str) -> list[int]:
    """Returns the ids of a text that a model continues, with `start_of_text` unless the text begins with it.

    The names of special tokens in the text are encoded as such. An empty text becomes the end-of-text token.
    """
    first = start_of_text(tokenizer)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return (ids if ids[:1] == first else [*first, *ids]) or [int(tokenizer.eos_token_id)]


class Tokens(NamedTuple):
    """Tokens of a text: `ids` (n,) int64, and `offsets` (n, 2) int64, the start and end of each token in characters."""

    ids: np.ndarray
    offsets: np.ndarray


class SpecialTokens:
    """The special tokens of a tokenizer, and tokenisation of text that may contain their spellings.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids = {**named, **added}
        """Maps each spelling to its id."""
        self.spellings = sorted(self.ids, key=lambda s: (-len(s), s))
        self.pattern = re.compile("|".join(map(re.escape, self.spellings)) or "(?!)")
        # Plain text outside the vocabulary becomes the unknown token, so that token is allowed in text. It is not
        # allowed if it is also the end-of-text, begin-of-text or padding token (GPT-2: unknown is end-of-text).
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        self._reserved = frozenset(self.ids.values()) - unknown
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        # Replacements have the length of the original spelling, so character offsets stay valid.
        self._shields = {s: chr(_SHIELD + i) * len(s) for i, s in enumerate(self.spellings)}
        self._respelled = {s: chr(_COPY + i) * len(s) for i, s in enumerate(self.spellings)}
        self._unshield = re.compile("|".join(self._shields.values()) or "(?!)")
        self._spelling = {shield: spelling for spelling, shield in self._shields.items()}

    @staticmethod
    def of(tokenizer: Any) -> SpecialTokens:
        """Returns the `SpecialTokens` of a tokenizer, cached per tokenizer."""
        if tokenizer not in _made:
            _made[tokenizer] = SpecialTokens(tokenizer)
        return _made[tokenizer]

    def text(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens.

        Raises:
            BadRow: the text contains private-use characters that the copy of the tokenizer uses.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._reserved.isdisjoint(ids):
            ids = self._copy.encode(text, add_special_tokens=False).ids
            if not self._reserved.isdisjoint(ids):
                raise BadRow("the text has private-use characters (U+F0000 and up), which are reserved here")
        return ids

    def shield(self, value: Any) -> Any:
        """Replaces the special tokens in the strings of a JSON value, so that a template treats them as text.

        Raises:
            BadRow: a string already contains characters that are used as replacements.
        """
        if isinstance(value, str):
            if _SHIELDS.search(value):
                raise BadRow("a message has private-use characters (U+100000 and up), which are reserved here")
            return self.pattern.sub(lambda found: self._shields[found.group()], value)
        if isinstance(value, dict):
            return {self.shield(key): self.shield(v) for key, v in value.items()}
        return [self.shield(v) for v in value] if isinstance(value, (list, tuple)) else value

    def unshield(self, rendered: str) -> str:
        """Restores the spellings that `shield` replaced. Character positions do not change."""
        return self._unshield.sub(lambda found: self._spelling[found.group()], rendered)

    def rendered(self, shielded: str) -> Tokens:
        """Tokenises a rendered chat whose messages went through `shield`.

        Raises:
            BadRow: the template's special tokens can't be distinguished from those in the messages.
        """
        # `shielded` spells only the template's special tokens: the ids must contain exactly this number of them.
        wanted = len(self.pattern.findall(shielded))
        encoding = self._backend.encode(shielded, add_special_tokens=False)
        if self._unshield.search(shielded) is not None or self._count(encoding.ids) != wanted:
            respelled = self.pattern.sub(lambda found: self._respelled[found.group()], shielded)
            encoding = self._copy.encode(self.unshield(respelled), add_special_tokens=False)
            if self._count(encoding.ids) != wanted:
                raise BadRow("special tokens in the messages can't be distinguished from those of the chat template")
        return Tokens(np.asarray(encoding.ids, np.int64), np.asarray(encoding.offsets, np.int64).reshape(-1, 2))

    def _count(self, ids: list[int]) -> int:
        """Returns the number of reserved special tokens in `ids`."""
        return sum(i in self._reserved for i in ids)

    @cached_property
    def _copy(self) -> Tokenizer:
        """A copy of the tokenizer in which the special tokens have the spellings of `_respelled`.

        The spellings are replaced in the added tokens, the vocabulary and the unknown token.
        """
        from tokenizers import Tokenizer

        raw = json.loads(self._backend.to_str())
        raw["post_processor"] = (
            raw["post_processor"] if (raw["post_processor"] or {}).get("type") == "ByteLevel" else None
        )
        raw["padding"] = raw["truncation"] = None
        for token in raw["added_tokens"]:
            token["content"] = self._respelled.get(token["content"], token["content"])
        model = raw["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self._respelled.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:  # Unigram: (piece, score) pairs
            model["vocab"] = [[self._respelled.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._respelled.get(model["unk_token"], model["unk_token"])
        if "merges" in model:  # a merge must not produce a special token from its parts
            pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & self._respelled.keys()]
        copy: Tokenizer = Tokenizer.from_str(json.dumps(raw))
        return copy


_made: WeakKeyDictionary[Any, SpecialTokens] = WeakKeyDictionary()


def vocabulary_size(tokenizer: Any) -> int:
    """Returns a number above all token ids of a tokenizer, cached per tokenizer."""
    if tokenizer not in _sizes:
        _sizes[tokenizer] = 1 + max(tokenizer.get_vocab().values(), default=-1)
    return _sizes[tokenizer]


_sizes: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
