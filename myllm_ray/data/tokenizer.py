"""Tokenizers: a folder, a hub id, BPE trained on the data, or plain bytes. All are Hugging Face fast tokenizers.

transformers is imported where it is used: Ray's controller and the tasks that only read tokens load this module too, and
would pay seconds for it at every start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.common.pretrained import checkpoint_in, pretrained_folder, tokenizer_folder
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import TokenizerSection, TrainerConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_VERSION = 2
"""Part of the cache's key: change it when the same section of the config gives another tokenizer."""
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, PAD, TURN_START, TURN_END]

_CHATML = """
{%- if tools %}
  {{- '<|im_start|>system\n' + (messages[0].content + '\n\n' if messages[0].role == 'system' else '') }}
  {{- 'You may call these functions, each by a JSON object {"name": ..., "arguments": {...}} in <tool_call></tool_call>:\n<tools>\n' }}
  {%- for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}
  {{- '</tools>' + turn_end + '\n' }}
{%- endif %}
{%- for message in messages %}
  {%- if message.role == 'assistant' %}
    {{- '<|im_start|>assistant\n' }}
    {%- generation %}
      {%- if message.reasoning_content %}{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
      {{- message.content }}
      {%- for call in message.tool_calls or [] %}
        {{- ('\n' if message.content or not loop.first else '') + '<tool_call>\n' }}
        {{- {'name': call.function.name, 'arguments': call.function.arguments} | tojson + '\n</tool_call>' }}
      {%- endfor %}
      {{- turn_end }}
    {%- endgeneration %}
    {{- '\n' }}
  {%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\n' if loop.first or messages[loop.index0 - 1].role != 'tool' else '\n' }}
    {{- '<tool_response>\n' + message.content + '\n</tool_response>' }}
    {{- turn_end + '\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' }}
  {%- elif not (tools and loop.first and message.role == 'system') %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + turn_end + '\n' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""ChatML, with reasoning, tools and calls as Qwen and Hermes write them."""
DEFAULT_CHAT_TEMPLATE = f"{{%- set turn_end = '{TURN_END}' %}}{_CHATML}"
"""For tokenizers that bring no template."""
DEFAULT_WITHOUT_TURN_END = "{%- set turn_end = eos_token %}" + _CHATML
"""Where the marker of a turn's end is no token, the end-of-text token ends it: generation can stop at that."""
TRAINED = "{#- The model was trained on chats in this layout. #}"
"""Stands before the default template where it is no longer a guess."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte: ids 0 to 255 are the bytes, then the special tokens."""
    from tokenizers import Tokenizer, models

    alphabet = _byte_characters()
    model = models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[])
    return _wrap(_byte_level(Tokenizer(model)))


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) on `texts`; the same texts give the same vocabulary.

    Raises:
        ConfigError: `vocab_size` is too small for the 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < 256 + len(SPECIAL):
        raise ConfigError(f"tokenizer.vocab_size={vocab_size} is too small: 256 bytes and {len(SPECIAL)} special tokens "
                          f"need {256 + len(SPECIAL)}")
    tokenizer = _byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(_capped(texts), trainer)
    return _wrap(tokenizer)


def tokenizer_section(config: TrainerConfig) -> TokenizerSection:
    """Where the tokenizer of a config comes from; left out, it is the model's own."""
    if config.tokenizer is not None:
        return config.tokenizer
    name = config.model.name or ""
    checkpoint = checkpoint_in(name)
    if checkpoint is not None:
        return TokenizerSection(path=str(tokenizer_folder(checkpoint)))
    return TokenizerSection(path=name) if Path(name).expanduser().is_dir() else TokenizerSection(name=name)


def load_tokenizer(section: TokenizerSection, texts: Iterable[str] | None = None) -> Any:
    """Build the tokenizer of a config; `texts` is what `train: bpe` learns from.

    Raises:
        ConfigError: the folder or hub id can't be loaded.
    """
    if section.kind == "bytes":
        return byte_tokenizer()
    if section.train == "bpe":
        if texts is None:
            raise ConfigError("tokenizer.train: no texts to train on")
        return train_bpe(texts, section.vocab_size)
    return open_tokenizer(section.path or section.name or "", "tokenizer.path" if section.path else "tokenizer.name",
                          local=section.path is not None)


def open_tokenizer(name: str, key: str = "tokenizer.path", local: bool = True) -> Any:
    """Load a saved tokenizer and give it what training needs: an end-of-text token, a chat template."""
    from transformers import AutoTokenizer

    if local and not Path(name).expanduser().is_dir():
        raise ConfigError(f"{key}: no folder {name!r} (seen from {Path.cwd()})")
    folder = pretrained_folder(name, key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ConfigError(f"{key}: {name!r} can't be loaded as a tokenizer: {reason}") from None
    if not tokenizer.is_fast:
        raise ConfigError(f"{key}: {name!r} has no fast tokenizer (tokenizer.json), which is needed for the loss mask")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{key}: {name!r} has no end-of-text token (eos_token): add one to its tokenizer_config.json")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE if TURN_END in tokenizer.get_vocab() else DEFAULT_WITHOUT_TURN_END
    return tokenizer


def has_own_template(tokenizer: Any) -> bool:
    """Whether the layout of chats is the tokenizer's own, rather than the default for tokenizers without one."""
    return tokenizer.chat_template not in (None, DEFAULT_CHAT_TEMPLATE, DEFAULT_WITHOUT_TURN_END)


def trained_template(tokenizer: Any, on_chats: bool) -> str | None:
    """The chat template that goes with a trained model. A default one only where the model has been trained on chats in it: with it,
    every tool would take the model for a chat model."""
    given: str | None = tokenizer.chat_template
    if has_own_template(tokenizer) or given is None:
        return given
    return TRAINED + given if on_chats else None


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything about the tokenizer that decides the token ids."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def bytes_per_token(tokenizer: Any) -> list[int]:
    """UTF-8 bytes that each token id stands for (0 for special tokens): what turns nats into bits per byte."""
    special = set(tokenizer.all_special_ids)
    byte_level = any(c in tokenizer.backend_tokenizer.to_str() for c in ('"ByteLevel"',))
    sizes = []
    for token_id in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(token_id)
        if token_id in special or token is None:
            sizes.append(0)
        elif byte_level:  # every character of the token is the stand-in of one byte
            sizes.append(len(token))
        else:
            sizes.append(len(token.replace("▁", " ").encode()))
    return sizes


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of the bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _byte_level(tokenizer: Tokenizer) -> Tokenizer:
    from tokenizers import decoders, pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, chat_template=DEFAULT_CHAT_TEMPLATE,
        additional_special_tokens=[TURN_START, TURN_END], clean_up_tokenization_spaces=False)


def _capped(texts: Iterable[str], max_bytes: int = 32 * 2**20) -> Iterator[str]:
    """The first `max_bytes` of text: a vocabulary does not get better from more, and memory stays bounded."""
    total = 0
    for piece in texts:
        total += len(piece)
        yield piece
        if total >= max_bytes:
            return
