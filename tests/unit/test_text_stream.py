"""Text while it is sampled: characters of several bytes, spaces of SentencePiece, stop texts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.serving.text_stream import TextStream

TEXT = "Grüße, 你好! 👍🏽 naïve\n\n  two  spaces \N{ZERO WIDTH JOINER}é"


def pieces(tokenizer: Any, ids: list[int], stop: list[str] | None = None) -> list[str]:
    stream = TextStream(tokenizer, stop or [])
    return [*(stream.add(token) for token in ids), stream.end()]


def llama_like() -> PreTrainedTokenizerFast:
    """Words with a leading space as in SentencePiece, and a token for each byte, with Llama's decoder."""
    words = ["▁the", "▁cat", "s", "▁", "!", "▁sat", "a"]
    vocabulary = {"<s>": 0, "</s>": 1, **{f"<0x{i:02X}>": 2 + i for i in range(256)}}
    vocabulary |= {word: 258 + i for i, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def test_no_piece_has_half_a_character() -> None:
    tokenizer = byte_tokenizer()
    found = pieces(tokenizer, list(TEXT.encode()))
    assert "".join(found) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
    assert sum(bool(piece) for piece in found) == len(TEXT), "each character is shown when it is complete"


def test_spaces_of_sentencepiece() -> None:
    tokenizer = llama_like()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "▁cat", "s", "▁sat", "!", "▁", "▁the"])
    found = pieces(tokenizer, ids)
    assert found[:5] == ["the", " cat", "s", " sat", "!"]
    assert "".join(found) == "the cats sat!  the" == tokenizer.decode(ids)
    ids = [258, *(2 + byte for byte in "é你".encode()), 259]
    assert pieces(tokenizer, ids) == ["the", "", "é", "", "", "你", " cat", ""]


@pytest.mark.parametrize("make", [byte_tokenizer, llama_like])
def test_the_pieces_are_the_text_of_the_whole_answer(make: Any) -> None:
    tokenizer, draw = make(), random.Random(3)
    for _ in range(200):
        text = "".join(draw.choice("aé你👍 \n") for _ in range(draw.randint(1, 12))).encode()
        # The end can be cut within a character. SentencePiece then replaces the whole run of bytes, when all of it is
        # decoded at once; the characters before the cut are shown already.
        cut = draw.randint(0, 3) if make is byte_tokenizer else 0
        ids = [byte + (0 if make is byte_tokenizer else 2) for byte in text[: len(text) - cut]]
        ids.append(tokenizer.eos_token_id)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


def test_invalid_bytes_lose_no_text() -> None:
    tokenizer = byte_tokenizer()
    for seed in range(50):
        ids = random.Random(seed).choices(range(256), k=40)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
    llama = llama_like()
    ids = [2 + byte for byte in "你".encode()] + [2 + 0x80, 259, 260]
    assert "".join(pieces(llama, ids)).endswith(" cats"), "a wrong byte does not hold back the text after it"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one\nUser: two", ["\nUser:"], "one"),
        ("one\nUse two", ["\nUser:"], "one\nUse two"),
        ("one\nUse", ["\nUser:"], "one\nUse"),
        ("aaab", ["aab"], "a"),
        ("abc", ["c", "b"], "a"),
        ("STOP", ["STOP"], ""),
        ("ünd", ["n"], "ü"),
        ("abc", [""], "abc"),
    ],
)
def test_stop_texts(text: str, stop: list[str], wanted: str) -> None:
    stream, found = TextStream(byte_tokenizer(), stop), ""
    for byte in text.encode():
        found += stream.add(byte)
        assert wanted.startswith(found), "nothing is shown that a stop text takes back"
    assert found + stream.end() == wanted
    assert stream.stopped == (wanted != text)
    assert stream.add(97) == ("" if stream.stopped else "a")
