"""Tokenizers in GGUF: which of llama.cpp's tokenizers gives the same tokens, or an error if none does.

llama.cpp implements the regular expressions of known tokenizers under names (`tokenizer.ggml.pre`) and never reads
one from the file. The description of a tokenizer (`tokenizer.json`) is therefore compared with the known ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from myllm_ray.config.errors import ConfigError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {
    ("ByteLevel", False): "gpt-2",
    ("Digits ByteLevel", False): "smollm",
    (f"Split({_QWEN2})", False): "qwen2",
    (f"Split({_LLAMA3})", True): "llama-bpe",
    (f"Split({_LLAMA3})", False): "smaug-bpe",
}
"""The name in GGUF by the pre-tokenizer and by `ignore_merges`: whether a word in the vocabulary is one token."""
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
"""The tags of transformers around what a model generates, which are not part of Jinja."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE, _SPACES = "▁", {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Prepend", "prepend": _SPACE}
_NO_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
"""The pre-tokenizer of Gemma: without effect, because its normalizer replaces all spaces."""
_MOST_ENDS = 3


def check_tokenizer(tokenizer: Any, ends: Sequence[int]) -> None:
    """Checks that llama.cpp has the tokenizer, and can end answers at all end tokens.

    Raises:
        ConfigError: It has no tokenizer that gives the same tokens.
    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    problem = _problem(raw)
    if problem is None and _space_prefix(raw) is not None:
        problem = _merge_problem(raw)
    elif problem is None and _pre_tokenizer(raw) is None:
        problem = "llama.cpp does not know its normalizer and pre-tokenizer"
    if problem is not None:
        raise ConfigError(f"--to gguf: llama.cpp can't express this tokenizer: {problem}; use --to hf")
    if len(ends) > _MOST_ENDS:
        raise ConfigError(
            f"--to gguf: answers end at {len(ends)} tokens, and a GGUF file can name {_MOST_ENDS}; use --to hf"
        )


def write_tokenizer(writer: Any, tokenizer: Any, rows: int, ends: Sequence[int]) -> None:
    """Writes a tokenizer with the methods of `GGUFWriter`.

    Args:
        writer: The writer.
        tokenizer: A fast tokenizer of transformers that `check_tokenizer` accepts.
        rows: The number of token embeddings, which may exceed the number of tokens.
        ends: The ids of the tokens that end an answer, the end-of-text token first.
    """
    from gguf import TokenType

    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    tokens = {i: token for token, i in vocabulary.items()}
    added = tokenizer.added_tokens_decoder
    spelled = [tokens.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in tokens else TokenType.UNUSED for i in range(rows)]
    for i, token in added.items():
        types[i] = TokenType.CONTROL if token.special else TokenType.USER_DEFINED
    if _space_prefix(raw) is not None:
        _write_sentencepiece(writer, raw, spelled, types)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(raw))
        # llama.cpp requires merges. It merges single characters first, so it never applies this one to special tokens.
        end = tokenizer.eos_token
        writer.add_token_merges([" ".join(pair) for pair in _pairs(raw)] or [f"{end} {end}"])
    writer.add_token_list(spelled)
    writer.add_token_types(types)
    _write_special_tokens(writer, tokenizer, ends)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(plain_jinja(tokenizer.chat_template))


def _write_special_tokens(writer: Any, tokenizer: Any, ends: Sequence[int]) -> None:
    for end, write in zip(
        ends, (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), strict=False
    ):
        write(end)
    for i, write in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
    ):
        if i is not None:
            write(i)
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    at = whole.index(plain[0]) if plain else 0
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and whole[:at] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(whole[at + len(plain) :] == [tokenizer.eos_token_id])


def _problem(raw: dict[str, Any]) -> str | None:
    """Returns what llama.cpp can't express in any tokenizer, or None."""
    model = raw["model"]
    if model["type"] != "BPE":
        return f"its model is {model['type']}, not BPE"
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "its BPE has dropout, prefixes or suffixes"
    for token in raw["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            return f"the token {token['content']} removes spaces next to it"
    return None


def _pre_tokenizer(raw: dict[str, Any]) -> str | None:
    """Returns the name in GGUF of the pre-tokenizer of a byte-level BPE, or None if llama.cpp has no equal one."""
    model, steps = raw["model"], _steps(raw["pre_tokenizer"], "pretokenizers")
    # llama.cpp does not normalize, so texts must be in NFC already, as nearly all are.
    if model.get("byte_fallback") or [s["type"] for s in _steps(raw["normalizer"], "normalizers")] not in ([], ["NFC"]):
        return None
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    by_expression, others = steps[-1]["use_regex"], steps[:-1]
    if by_expression and not others:
        key = "ByteLevel"
    elif by_expression and others == [{"type": "Digits", "individual_digits": True}]:
        key = "Digits ByteLevel"
    elif not by_expression and len(others) == 1 and _splits(others[0]):
        key = f"Split({others[0]['pattern']['Regex']})"
    else:
        return None
    return PRE_TOKENIZERS.get((key, bool(model.get("ignore_merges"))))


def _splits(step: dict[str, Any]) -> bool:
    return bool(
        step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]
    )


def _steps(value: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer or a pre-tokenizer."""
    if value is None:
        return []
    return [step for part in value[inner] for step in _steps(part, inner)] if value["type"] == "Sequence" else [value]


def plain_jinja(template: str) -> str:
    """Returns a chat template without the tags `generation`, which mark trained tokens and change no text."""
    return _GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)


def _space_prefix(raw: dict[str, Any]) -> bool | None:
    """Returns whether a BPE in the style of SentencePiece (Llama 2, Gemma) prepends a space; None for other BPE."""
    steps = _steps(raw["normalizer"], "normalizers")
    if not raw["model"].get("byte_fallback") or _steps(raw["pre_tokenizer"], "pretokenizers") not in ([], [_NO_SPLIT]):
        return None
    return {str([_PREPEND, _SPACES]): True, str([_SPACES]): False}.get(str(steps))


def _pairs(raw: dict[str, Any]) -> list[tuple[str, str]]:
    merges = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in raw["model"]["merges"])
    return [(left, right) for left, right in merges]


def _merge_problem(raw: dict[str, Any]) -> str | None:
    """Returns why the merges can't be expressed as scores of tokens, or None.

    llama.cpp merges any two neighbours whose concatenation is a token, the one with the highest score first.
    """
    pairs, vocabulary = _pairs(raw), raw["model"]["vocab"]
    known, finished, last = set(pairs), set(), ""
    added = {token["content"] for token in raw["added_tokens"]}
    for left, right in pairs:
        whole = left + right
        if whole != last:
            finished.add(last)
            last = whole
            if whole in finished:
                return f"its merges to {whole!r} are not consecutive"
    for token in vocabulary:
        if token in added or _BYTE.fullmatch(token):
            continue
        for at in range(1, len(token)):
            pair = (token[:at], token[at:])
            if pair[0] in vocabulary and pair[1] in vocabulary and pair not in known:
                return f"it does not merge {pair[0]!r} and {pair[1]!r}, whose concatenation is a token"
    return None


def _write_sentencepiece(writer: Any, raw: dict[str, Any], spelled: list[str], types: list[Any]) -> None:
    """Writes a tokenizer in the style of SentencePiece, with negative ranks of merges as scores; completes `types`."""
    from gguf import TokenType

    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(raw)):
        ranks.setdefault(left + right, rank)
    for i, token in enumerate(spelled):
        if _BYTE.fullmatch(token):
            types[i] = TokenType.BYTE
        elif token == raw["model"].get("unk_token"):
            types[i] = TokenType.UNKNOWN
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in spelled])
    writer.add_add_space_prefix(_space_prefix(raw))
