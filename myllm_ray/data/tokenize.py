"""Conversion of rows to token ids with a loss mask, as pure functions that return Arrow batches.

A token that is not trained on is stored as `~id` (bitwise not, so negative). Ids and mask are therefore one int32
column, and a document is one contiguous range of a file. Only `decode` inverts this encoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from myllm_ray.config.errors import DataError, UserError
from myllm_ray.data.chat import tokenize_chat
from myllm_ray.data.examples import LengthLimits, kind_of, tokenize_example
from myllm_ray.data.formats import BadRow, Format, Instruction, Labelled, Messages, Preference, Prompt, TokenIds
from myllm_ray.data.special_tokens import SpecialTokens, start_of_text, vocabulary_size
from myllm_ray.data.tokenizer import has_own_template


@dataclass
class TokenizeOptions:
    """Options of tokenisation.

    `fields`: maps new names to columns of the row. `on_bad_row`: "error" or "skip". `train_on_prompt`: if True, the
    loss includes all parts. `limits`: length limits of examples; None if the trainer can't use examples.
    """

    fields: Mapping[str, str]
    on_bad_row: str = "error"
    train_on_prompt: bool = False
    limits: LengthLimits | None = None


def encode(ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Encodes ids (n,) and mask (n,) bool as (n,) int32, with `~id` where the mask is False."""
    return np.where(trained, ids, ~ids).astype(np.int32)


def decode(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ids, trained), the inverse of `encode`."""
    trained = tokens >= 0
    return np.where(trained, tokens, ~tokens), trained


def _format(format_row: Format, row: Mapping[str, Any], place: str) -> Any:
    """Applies a format to a row; adds the row's place to unexpected errors."""
    try:
        return format_row(row)
    except (BadRow, UserError):
        raise
    except Exception as error:  # a custom format can raise any exception type
        error.add_note(f"in the row at {place}")
        raise


def tokenize_rows(
    rows: Iterable[tuple[str, Mapping[str, Any] | BadRow]], format_row: Format, tokenizer: Any, options: TokenizeOptions
) -> pa.RecordBatch:
    """Formats and tokenises rows.

    Args:
        rows: (place, row) pairs; the place (`file:line`) is for error messages. A `BadRow` in place of a row is
            handled like a row that can't be used.
        format_row: the format.
        tokenizer: a fast tokenizer.
        options: see `TokenizeOptions`.

    Returns:
        A batch with the column `tokens` (list<int32>, see `encode`), one row per document. The metadata of its schema
        has the `kind` of the documents, the number of `skipped` rows, the `reason` of the first one, the number of
        rows whose answers were `cut`, and the number of `chats`.

    Raises:
        DataError: a row can't be used and `options.on_bad_row` is "error", the format returns different kinds, or it
            returns examples that the trainer can't use.
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
                raise DataError(f"{place}: the format gives {kind_of(formatted)}, but it gave {kind} for earlier rows")
            kind = kind_of(formatted)
            if isinstance(formatted, (Preference, Labelled, Prompt)):
                if options.limits is None:
                    raise DataError(f"{place}: the format gives {kind}, which this trainer can't use (data.*.format)")
                document, was_cut = tokenize_example(formatted, tokenizer, options.limits)
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
    schema = pa.schema(
        [pa.field("tokens", column.type)],
        metadata={"skipped": str(skipped), "reason": first_reason, "cut": str(cut), "kind": kind, "chats": str(chats)},
    )
    return pa.record_batch([column], schema=schema)


def is_chat(formatted: Any, tokenizer: Any) -> bool:
    """Returns whether the result of a format is rendered by the chat template."""
    if isinstance(formatted, Instruction):
        return has_own_template(tokenizer)
    return isinstance(getattr(formatted, "prompt", formatted), Messages)


def tokenize_one(formatted: Any, tokenizer: Any, train_on_prompt: bool = False) -> np.ndarray:
    """Tokenises one document; returns encoded tokens (n,) int32, see `encode`.

    A document of parts ends with the end-of-text token, which is trained on if the token before it is. The end of a
    chat is that of its template, see `tokenize_chat`. Token ids are used as they are.
    """
    if isinstance(formatted, TokenIds):
        return _checked(formatted, tokenizer, train_on_prompt)
    if isinstance(formatted, Instruction) and has_own_template(tokenizer):
        formatted = formatted.messages
    if isinstance(formatted, Messages):
        return encode(*tokenize_chat(formatted, tokenizer, train_on_prompt))
    special = SpecialTokens.of(tokenizer)
    eos, ids = tokenizer.eos_token_id, start_of_text(tokenizer)
    trained: list[bool] = [train_on_prompt] * len(ids)
    for piece, train in formatted:
        # Tokenise the parts separately, so that the boundary between prompt and response is the same as at generation.
        part = special.text(piece)
        ids += part
        trained += [train or train_on_prompt] * len(part)
    ids.append(eos)
    trained.append(trained[-1] if trained else True)
    return encode(np.asarray(ids), np.asarray(trained))


def _checked(document: TokenIds, tokenizer: Any, train_on_prompt: bool) -> np.ndarray:
    """Returns the encoded tokens (n,) int32 of a document that has been tokenized.

    Raises:
        BadRow: the tokenizer does not have one of the ids.
    """
    vocabulary = vocabulary_size(tokenizer)
    wrong = np.flatnonzero((document.ids < 0) | (document.ids >= vocabulary))
    if len(wrong):
        raise BadRow(
            f"the token id {int(document.ids[wrong[0]])} is not one of the tokenizer, which has the ids 0 to "
            f"{vocabulary - 1}: use the tokenizer of the data"
        )
    return encode(document.ids, document.trained | train_on_prompt)
