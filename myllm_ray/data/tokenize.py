"""Documents to token ids with a loss mask: pure functions over Arrow batches.

A token that is not trained on is stored as `~id` (bitwise not, so below zero): ids and mask are one int32 column, and a
document is one contiguous run of a file. `decode` below is the one place that undoes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from myllm_ray.config.errors import DataError
from myllm_ray.data.formats import BadRow, Format, Labelled, Messages, Preference, Prompt
from myllm_ray.data.records import Room, kind_of, tokenize_record


@dataclass
class TokenizeOptions:
    """`fields`: new name -> column. `on_bad_row`: error | skip. `train_on_prompt`: the loss stands on all parts. `room`: for records."""

    fields: Mapping[str, str]
    on_bad_row: str = "error"
    train_on_prompt: bool = False
    room: Room | None = None


def encode(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """(n,) ids and (n,) bool -> (n,) int32, `~id` where not trained on."""
    return np.where(trained, ids, ~ids).astype(np.int32)


def decode(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `encode`: (ids, trained)."""
    trained = tokens >= 0
    return np.where(trained, tokens, ~tokens), trained


def tokenize_rows(rows: Iterable[tuple[str, Mapping[str, Any] | BadRow]], format_row: Format, tokenizer: Any,
                  options: TokenizeOptions) -> pa.RecordBatch:
    """Format and tokenise rows; each comes with the place it stands at (`file:line`), for messages.

    Returns a batch with columns `tokens` (list<int32>, see `encode`), one row a document, and in its schema's metadata the
    `kind` of the documents, and how many rows were `skipped` and answers `cut`. A row that can't be used raises DataError, or is counted, as `options.on_bad_row` says.
    """
    documents: list[np.ndarray] = []
    skipped, cut, first_reason, kind = 0, 0, "", ""
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            renamed = {**row, **{new: row[old] for new, old in options.fields.items() if old in row}}
            formatted = format_row(renamed)
            if kind and kind != kind_of(formatted):
                raise DataError(f"{place}: the format gives {kind_of(formatted)}, for the rows before it gave {kind}")
            kind = kind_of(formatted)
            if isinstance(formatted, (Preference, Labelled, Prompt)):
                if options.room is None:
                    raise DataError(f"{place}: the format gives {kind}, which this trainer can't use (data.*.format)")
                document, was_cut = tokenize_record(formatted, tokenizer, options.room)
                cut += was_cut
            else:
                document = tokenize_one(formatted, tokenizer, options.train_on_prompt)
            documents.append(document)
        except BadRow as error:
            if options.on_bad_row == "error":
                raise DataError(f"{place}: {error} (data.on_bad_row=skip leaves such rows out)") from None
            skipped += 1
            first_reason = first_reason or f"{place}: {error}"
    lengths = [len(d) for d in documents]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    values = np.concatenate(documents) if documents else np.empty(0, np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))
    schema = pa.schema([pa.field("tokens", column.type)], metadata={
        "skipped": str(skipped), "reason": first_reason, "cut": str(cut), "kind": kind})
    return pa.record_batch([column], schema=schema)


def tokenize_one(formatted: Any, tokenizer: Any, train_on_prompt: bool = False) -> np.ndarray:
    """One document as encoded tokens: (n,) int32. Ends with the end-of-text token, trained on like what precedes it."""
    if isinstance(formatted, Messages):
        return _tokenize_messages(formatted, tokenizer, train_on_prompt)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ids: list[int] = [] if bos is None or bos == eos else [bos]
    trained: list[bool] = [train_on_prompt] * len(ids)
    for piece, train in formatted:
        # Part by part: the boundary between prompt and response falls where it falls at generation.
        part = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        ids += part
        trained += [train or train_on_prompt] * len(part)
    ids.append(eos)
    trained.append(trained[-1] if trained else True)
    return encode(np.asarray(ids), np.asarray(trained))


def _tokenize_messages(messages: Messages, tokenizer: Any, train_on_prompt: bool) -> np.ndarray:
    """A chat through the tokenizer's template; trained on: what the assistant writes, with the token that ends its turn."""
    rendered = tokenizer.apply_chat_template(list(messages), tokenize=False)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = [(0, len(rendered))] if train_on_prompt else _assistant_spans(messages, rendered, tokenizer)
    starts = np.asarray([start for start, _ in encoded["offset_mapping"]])
    trained = np.zeros(len(starts), bool)
    for first, last in spans:
        trained |= (starts >= first) & (starts < last)
    return encode(np.asarray(encoded["input_ids"]), trained)


def _assistant_spans(messages: Messages, rendered: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where the assistant's turns stand in the rendered text, as (first, last) character.

    A turn begins where the prompt for it ends (`add_generation_prompt`) and ends where the text up to and with it ends;
    white space after the last token of the turn belongs to the template, not to the turn.
    """
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(list(messages[:i]), tokenize=False, add_generation_prompt=True) if i else ""
        through = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
        if not rendered.startswith(before) or not rendered.startswith(through.rstrip()):
            raise BadRow(f"messages[{i}]: the chat template changes what it wrote before when a turn is added, so the "
                         "loss mask can't be told; use a template that only appends, or format prompt_completion")
        spans.append((len(before), len(through.rstrip())))
    return spans
