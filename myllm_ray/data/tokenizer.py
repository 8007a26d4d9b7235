"""Builds and loads tokenizers: from a folder, from a hub id, by training BPE on the data, or one token per byte.

All tokenizers are Hugging Face fast tokenizers. The imports of transformers are local to the functions that use it:
Ray's controller and tasks that only read tokens also import this module, and transformers takes seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.common.pretrained import checkpoint_in, gguf_arguments, pretrained_folder, tokenizer_folder
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import TokenizerSection
from myllm_ray.data.chat_template import ChatTemplate
from myllm_ray.data.messages import BadRow
from myllm_ray.data.templates import (
    DEFAULT_CHAT_TEMPLATE,
    DEFAULT_WITHOUT_TURN_END,
    NAMED,
    TRAINED,
    TURN_END,
    TURN_START,
    NamedTemplate,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)
TOKENIZER_VERSION = 2
"""Part of the cache key. Change it when the same config section produces a different tokenizer."""
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL = [END_OF_TEXT, PAD, TURN_START, TURN_END]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token per UTF-8 byte: ids 0 to 255 are the bytes, followed by the special tokens."""
    from tokenizers import Tokenizer, models

    alphabet = _byte_characters()
    model = models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[])
    return _wrap(_byte_level(Tokenizer(model)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE (Sennrich et al., 2016; Radford et al., 2019).

    Training is deterministic: the same texts give the same vocabulary.

    Args:
        texts: the texts to train on; see `_capped` for the limit of their size.
        vocab_size: number of tokens, including the 256 bytes and the special tokens.

    Raises:
        ConfigError: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(SPECIAL):
        raise ConfigError(
            f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens "
            f"need {256 + len(SPECIAL)}"
        )
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_capped(texts), trainer)
    return _wrap(tokenizer)


def tokenizer_section(config: TrainerConfig) -> TokenizerSection:
    """Returns the tokenizer section of a config; without one, a section that loads the model's own tokenizer."""
    if config.tokenizer is not None:
        return config.tokenizer
    name = config.model.name or ""
    checkpoint = checkpoint_in(name)
    if checkpoint is not None:
        return TokenizerSection(path=str(tokenizer_folder(checkpoint)))
    return TokenizerSection(path=name) if Path(name).expanduser().exists() else TokenizerSection(name=name)


def load_tokenizer(section: TokenizerSection, texts: Iterable[str] | None = None) -> Any:
    """Builds or loads the tokenizer of a config.

    Args:
        section: the tokenizer section of the config.
        texts: the texts to train on, for `train: bpe`.

    Raises:
        ConfigError: the folder or hub id can't be loaded, there are no texts to train on, or the chat template can't be
            used for training.
    """
    tokenizer = _load(section, texts)
    template = template_of(section.chat_template) if section.chat_template else None
    wanted = [*section.add_special_tokens, *(template.tokens if template else ())]
    known = tokenizer.get_vocab()
    # A token that the tokenizer knows keeps its id and becomes special: the template alone writes it.
    if wanted:
        tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(wanted))}, False)
        log.info("%d special tokens were added to the tokenizer", sum(token not in known for token in set(wanted)))
    if template is not None:
        tokenizer.chat_template = template.text
        try:
            ChatTemplate.of(tokenizer)
        except BadRow as error:
            raise ConfigError(f"tokenizer.chat_template: {error}") from None
    return tokenizer


def _load(section: TokenizerSection, texts: Iterable[str] | None) -> Any:
    if section.kind == "bytes":
        return byte_tokenizer()
    if section.train == "bpe":
        if texts is None:
            raise ConfigError("tokenizer.train: no texts to train on")
        return train_bpe(texts, section.vocab_size)
    return open_tokenizer(
        section.path or section.name or "",
        "tokenizer.path" if section.path else "tokenizer.name",
        local=section.path is not None,
    )


def template_of(given: str) -> NamedTemplate:
    """Returns a chat template by its name or from a file.

    Args:
        given: `chatml`, `llama3`, `gemma`, or the path of a file with a template in Jinja.

    Raises:
        ConfigError: there is neither such a name nor such a file.
    """
    if given in NAMED:
        return NAMED[given]
    try:
        return NamedTemplate(Path(given).expanduser().read_text(encoding="utf-8"), ())
    except (OSError, UnicodeDecodeError):
        raise ConfigError(
            f"tokenizer.chat_template: {given!r} is neither the name of a template ({', '.join(NAMED)}) nor a readable "
            "file with a template in Jinja"
        ) from None


def open_tokenizer(name: str, key: str = "tokenizer.path", local: bool = True) -> Any:
    """Loads a saved tokenizer, and sets a default chat template if it has none.

    Args:
        name: a folder, a GGUF file or a hub id.
        key: config key, for error messages.
        local: if True, `name` must be a folder or a file.

    Raises:
        ConfigError: the tokenizer can't be loaded, is not a fast tokenizer, or has no end-of-text token.
    """
    from transformers import AutoTokenizer

    gguf = gguf_arguments(name)
    if local and not (Path(name).expanduser().is_file() if gguf else Path(name).expanduser().is_dir()):
        raise ConfigError(f"{key}: no {'file' if gguf else 'folder'} {name!r} (working directory: {Path.cwd()})")
    folder = pretrained_folder(name, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **gguf)
    except BaseException as error:
        # A panic of tokenizers, about a vocabulary that it can't use, is a BaseException of its own.
        known = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
        if not isinstance(error, known) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigError(f"{key}: {name!r} can't be loaded as a tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{key}: {name!r} has no fast tokenizer (tokenizer.json), which is needed for the loss mask")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: {name!r} has no end-of-text token (eos_token): add one to its tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = (
            DEFAULT_CHAT_TEMPLATE if TURN_END in tokenizer.get_vocab() else DEFAULT_WITHOUT_TURN_END
        )
    return tokenizer


def has_own_template(tokenizer: Any) -> bool:
    """Returns whether the tokenizer has its own chat template, rather than none or a default one of this module."""
    return tokenizer.chat_template not in (None, DEFAULT_CHAT_TEMPLATE, DEFAULT_WITHOUT_TURN_END)


def trained_template(tokenizer: Any, on_chats: bool) -> str | None:
    """Returns the chat template to save with a trained model, or None.

    A default template is saved only if the model was trained on chats (`on_chats`): other tools treat a model with a
    chat template as a chat model.
    """
    given: str | None = tokenizer.chat_template
    if has_own_template(tokenizer) or given is None:
        return given
    return TRAINED + given if on_chats else None


def fingerprint(tokenizer: Any) -> str:
    """Returns a hash of all properties of the tokenizer that determine the token ids."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def bytes_per_token(tokenizer: Any) -> list[int]:
    """Returns the number of UTF-8 bytes of each token id, 0 for special tokens.

    The numbers convert a loss in nats per token to bits per byte.
    """
    special = set(tokenizer.all_special_ids)
    byte_level = any(c in tokenizer.backend_tokenizer.to_str() for c in ('"ByteLevel"',))
    sizes = []
    for token_id in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in special or token is None:
            sizes.append(0)
        elif byte_level:  # every character of the token represents one byte
            sizes.append(len(token))
        elif _BYTE_TOKEN.fullmatch(token):
            sizes.append(1)
        else:
            sizes.append(len(token.replace("▁", " ").encode()))
    return sizes


_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token of SentencePiece that represents one byte of a character outside the vocabulary."""


def _byte_characters() -> list[str]:
    """Returns the printable characters that represent the 256 bytes in GPT-2, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    """Sets byte-level pre-tokenisation and decoding, and returns the tokenizer."""
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wraps a tokenizer for transformers, with the special tokens and the default chat template."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        chat_template=DEFAULT_CHAT_TEMPLATE,
        additional_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )


def _capped(texts: Iterable[str], max_bytes: int = 32 * 2**20) -> Iterator[str]:
    """Yields texts until their total length reaches `max_bytes`, counted in characters.

    The limit bounds memory; more text does not improve a vocabulary.
    """
    total = 0
    for piece in texts:
        total += len(piece)
        yield piece
        if total >= max_bytes:
            return
