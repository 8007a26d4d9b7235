"""Special tokens come from the chat template, never from the data: text that spells one is tokenised as text.

A tokenizer looks for the spellings of its special tokens before anything else, so a document with `<|endoftext|>` in
it would hold the end-of-text token, and a message with `<|im_end|>` in it would end its turn. Text without such a
spelling is tokenised as always. Text with one is tokenised by a copy of the tokenizer in which every special token
has another spelling of the same length, in private-use characters (`_respelled`). In a rendered chat the template's
special tokens are written in the copy's spelling, and those in the messages as they are, so both get the ids that are
meant.

Added tokens that are not marked special (`<think>`, `<tool_call>` of Qwen3) remain tokens wherever they are written:
that is what they are for.
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
"""Where the two private-use planes of Unicode begin: spellings of the copy, and of special tokens in messages."""
_SHIELDS = re.compile("[\U00100000-\U0010fffd]")


class Tokens(NamedTuple):
    """`ids` (n,), and `offsets` (n, 2): where each token begins and ends in the text, in characters."""

    ids: np.ndarray
    offsets: np.ndarray


class SpecialTokens:
    """The special tokens of a tokenizer, and tokenisation of text that may spell them.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.ids = {**named, **added}
        """Spelling -> id."""
        self.spellings = sorted(self.ids, key=lambda s: (-len(s), s))
        self.pattern = re.compile("|".join(map(re.escape, self.spellings)) or "(?!)")
        # Text that the vocabulary has no token for gives the unknown one. (GPT-2 calls its end-of-text token so.)
        unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
        self._reserved = frozenset(self.ids.values()) - unknown
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._shields = {s: chr(_SHIELD + i) * len(s) for i, s in enumerate(self.spellings)}
        self._respelled = {s: chr(_COPY + i) * len(s) for i, s in enumerate(self.spellings)}
        self._unshield = re.compile("|".join(self._shields.values()) or "(?!)")
        self._spelling = {shield: spelling for spelling, shield in self._shields.items()}

    @staticmethod
    def of(tokenizer: Any) -> SpecialTokens:
        """The one of a tokenizer, made once."""
        if tokenizer not in _made:
            _made[tokenizer] = SpecialTokens(tokenizer)
        return _made[tokenizer]

    def text(self, text: str) -> list[int]:
        """The ids of a text, none of them a special token."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._reserved.isdisjoint(ids):
            ids = self._copy.encode(text, add_special_tokens=False).ids
            if not self._reserved.isdisjoint(ids):
                raise BadRow("the text has private-use characters (from U+F0000 on) that mark special tokens here")
        return ids

    def shield(self, value: Any) -> Any:
        """A value of JSON with every special token in its strings written so that a template passes it on as text."""
        if isinstance(value, str):
            if _SHIELDS.search(value):
                raise BadRow("a message has private-use characters (from U+100000 on), which mark special tokens here")
            return self.pattern.sub(lambda found: self._shields[found.group()], value)
        if isinstance(value, dict):
            return {self.shield(key): self.shield(v) for key, v in value.items()}
        return [self.shield(v) for v in value] if isinstance(value, (list, tuple)) else value

    def unshield(self, rendered: str) -> str:
        """The text with the spellings in it that `shield` took out. Places of characters do not change."""
        return self._unshield.sub(lambda found: self._spelling[found.group()], rendered)

    def rendered(self, shielded: str) -> Tokens:
        """The tokens of a rendered chat whose messages went through `shield`.

        Raises:
            BadRow: the template's special tokens can't be told from those in the messages.
        """
        wanted = len(self.pattern.findall(shielded))
        encoding = self._backend.encode(shielded, add_special_tokens=False)
        if self._unshield.search(shielded) is not None or self._count(encoding.ids) != wanted:
            respelled = self.pattern.sub(lambda found: self._respelled[found.group()], shielded)
            encoding = self._copy.encode(self.unshield(respelled), add_special_tokens=False)
            if self._count(encoding.ids) != wanted:
                raise BadRow("the special tokens in the messages can't be told from those of the chat template")
        return Tokens(np.asarray(encoding.ids, np.int64), np.asarray(encoding.offsets, np.int64).reshape(-1, 2))

    def _count(self, ids: list[int]) -> int:
        return sum(i in self._reserved for i in ids)

    @cached_property
    def _copy(self) -> Tokenizer:
        """The tokenizer with other spellings of its special tokens: added tokens, vocabulary, unknown token."""
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
        else:  # Unigram: pieces with their scores
            model["vocab"] = [[self._respelled.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = self._respelled.get(model["unk_token"], model["unk_token"])
        if "merges" in model:  # a merge must not make a special token of its parts
            pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
            model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & self._respelled.keys()]
        copy: Tokenizer = Tokenizer.from_str(json.dumps(raw))
        return copy


_made: WeakKeyDictionary[Any, SpecialTokens] = WeakKeyDictionary()
