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

from myllm_ray.config.errors import DataError, UserError
from myllm_ray.data.chat import tokenize_chat
from myllm_ray.data.formats import BadRow, Format, Instruction, Labelled, Messages, Preference, Prompt
from myllm_ray.data.records import Room, kind_of, tokenize_record
from myllm_ray.data.special_tokens import SpecialTokens
from myllm_ray.data.tokenizer import has_own_template


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


def _format(format_row: Format, row: Mapping[str, Any], place: str) -> Any:
    try:
        return format_row(row)
    except (BadRow, UserError):
        raise
    except Exception as error:  # of a format of the user's own
        error.add_note(f"in the row at {place}")
        raise


def tokenize_rows(rows: Iterable[tuple[str, Mapping[str, Any] | BadRow]], format_row: Format, tokenizer: Any,
                  options: TokenizeOptions) -> pa.RecordBatch:
    """Format and tokenise rows; each comes with the place it stands at (`file:line`), for messages.

    Returns a batch with columns `tokens` (list<int32>, see `encode`), one row a document, and in its schema's metadata the
    `kind` of the documents, and how many rows were `skipped`, answers `cut`, and how many were `chats`. A row that can't be used raises DataError, or is counted, as `options.on_bad_row` says.
    """
    documents: list[np.ndarray] = []
    skipped, cut, chats, first_reason, kind = 0, 0, 0, "", ""
    for place, row in rows:
        try:
            if isinstance(row, BadRow):
                raise row
            renamed = {**row, **{new: row[old] for new, old in options.fields.items() if old in row}}
            formatted = _format(format_row, renamed, place)
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
            chats += is_chat(formatted, tokenizer)
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
        "skipped": str(skipped), "reason": first_reason, "cut": str(cut), "kind": kind, "chats": str(chats)})
    return pa.record_batch([column], schema=schema)


def is_chat(formatted: Any, tokenizer: Any) -> bool:
    """Whether what a format gave goes through the chat template."""
    if isinstance(formatted, Instruction):
        return has_own_template(tokenizer)
    return isinstance(getattr(formatted, "prompt", formatted), Messages)


def tokenize_one(formatted: Any, tokenizer: Any, train_on_prompt: bool = False) -> np.ndarray:
    """One document as encoded tokens: (n,) int32. Ends with the end-of-text token, trained on like what precedes it."""
    if isinstance(formatted, Instruction) and has_own_template(tokenizer):
        formatted = formatted.messages
    if isinstance(formatted, Messages):
        return encode(*tokenize_chat(formatted, tokenizer, train_on_prompt))
    special = SpecialTokens.of(tokenizer)
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ids: list[int] = [] if bos is None or bos == eos else [bos]
    trained: list[bool] = [train_on_prompt] * len(ids)
    for piece, train in formatted:
        # Part by part: the boundary between prompt and response falls where it falls at generation.
        part = special.text(piece)
        ids += part
        trained += [train or train_on_prompt] * len(part)
    ids.append(eos)
    trained.append(trained[-1] if trained else True)
    return encode(np.asarray(ids), np.asarray(trained))
