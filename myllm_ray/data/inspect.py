"""Reports on prepared data, used by `myllm-ray data`: counts, lengths, packing, and the rows of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from myllm_ray.common.types import Position
from myllm_ray.data.chat_template import end_tokens
from myllm_ray.data.collate import wrap64
from myllm_ray.data.examples import LABELLED, PAIRS, PROMPTS, TOKENS, split
from myllm_ray.data.packing import Row
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.source_counts import SourceUse, source_uses
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.targets import count_targets, target_warnings
from myllm_ray.data.tokenize import decode

_SAMPLE = 2000


@dataclass
class SourceReport:
    """Counts of one data source; `first_skipped` is the place of its first skipped row, and the reason.

    `use`: what the run reads of a source that has a share.
    """

    name: str
    documents: int
    tokens: int
    skipped: int
    first_skipped: str
    duplicates: int
    use: SourceUse | None = None


@dataclass
class DataReport:
    """A report on the prepared data.

    `histogram`: (from, to, documents) by length in tokens. `longer_than_row`: number of documents longer than a row.
    `rows`, `steps`: those of an epoch; if the sources have shares (`mixed`), those of the run. `efficiency`: fraction
    of row positions that contain a token. `trained_share`: fraction of the tokens that are trained on.
    """

    sources: list[SourceReport]
    histogram: list[tuple[int, int, int]]
    longer_than_row: int
    rows: int
    steps: int
    mixed: bool
    efficiency: float
    trained_share: float
    validation_rows: int
    warnings: list[str]


def describe(prepared: PreparedData, tokenizer: Any, batches: int = 1) -> DataReport:
    """Returns a report on prepared data, from the whole index and the tokens of the first `_SAMPLE` documents.

    Args:
        prepared: The data.
        tokenizer: Its tokenizer.
        batches: Number of global batches of the run, for sources that have shares.
    """
    spec = prepared.train
    store, size = spec.plan.store, spec.plan.packing.size
    sources = [
        SourceReport(s["name"], s["documents"], s["tokens"], s["skipped"], s["first_skipped"], s["duplicates"])
        for s in store.meta["sources"]
    ]
    mixed, rows = spec.plan.order.mixture is not None, spec.plan.rows_in_epoch(0)
    if mixed:
        for source, use in zip(sources, source_uses(spec, batches), strict=True):
            source.use = use
    if store.kind == TOKENS:
        lengths = np.concatenate(
            [store.lengths(np.arange(a, min(a + 65536, len(store)))) for a in range(0, len(store), 65536)]
        )
        placed, longer = int(spec.plan.segments(0)[0][:, 2].sum()), int((lengths > size).sum())
    else:
        lengths = np.asarray([sum(len(ids) for ids, _ in parts_of(store, document)) for document in range(len(store))])
        placed, longer = int(lengths.sum()), sum(int(s["cut"]) for s in store.meta["sources"])
    trained, total, ended = _sampled(store, tokenizer)
    if store.kind == TOKENS:  # exact counts over all rows, without the tokens that are cut off
        trained, total = count_targets(spec.plan).kept, placed
    return DataReport(
        sources=sources,
        histogram=list(histogram(lengths)),
        longer_than_row=longer,
        rows=batches * spec.global_size if mixed else rows,
        steps=batches if mixed else spec.steps_in_epoch(0),
        mixed=mixed,
        efficiency=placed / (rows * size),
        trained_share=trained / max(1, total),
        validation_rows=prepared.validation.plan.rows_in_epoch(0) if prepared.validation else 0,
        warnings=[
            *prepared.notes,
            *target_warnings(spec),
            *end_warnings(store, tokenizer),
            *(_warnings(tokenizer, ended, min(len(store), _SAMPLE)) if store.kind != PROMPTS else []),
        ],
    )


def parts_of(
    store: Any, document: int, start: int = 0, length: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the (ids, trained on) pairs of a document: one pair, or for a record, one for its prompt and each answer.

    Args:
        store: the store of the document.
        document: number of the document.
        start: first token to read.
        length: number of tokens to read; None: all.
    """
    stored = store.read(document, start, length)
    if store.kind == TOKENS:
        return [decode(stored)]
    answers = {PAIRS: 2, LABELLED: 1, PROMPTS: 0}[store.kind]
    return [(part, np.full(len(part), number > 0)) for number, part in enumerate(split(stored)[: 1 + answers])]


def _sampled(store: Any, tokenizer: Any) -> tuple[int, int, int]:
    """Returns (trained tokens, tokens, documents with a trained end token) of the first `_SAMPLE` documents."""
    parts = [part for document in range(min(len(store), _SAMPLE)) for part in parts_of(store, document)]
    ended = sum(ended_documents(store, end_tokens(tokenizer)))
    return sum(int(trained.sum()) for _, trained in parts), sum(len(ids) for ids, _ in parts), ended


def ended_documents(store: Any, ends: Sequence[int]) -> Iterator[bool]:
    """Yields, for each of the first `_SAMPLE` documents, whether it trains on one of the tokens `ends`."""
    for document in range(min(len(store), _SAMPLE)):
        yield any(np.isin(ids[trained], ends).any() for ids, trained in parts_of(store, document))


def end_warnings(store: Any, tokenizer: Any) -> Iterator[str]:
    """Yields a warning if no document of the first `_SAMPLE` trains on a token that ends an answer."""
    if store.kind != PROMPTS and not any(ended_documents(store, end_tokens(tokenizer))):
        yield (
            f"the token that ends a turn ({_names(tokenizer)}) is never trained on: the model will not learn to stop; "
            "put it inside the trained part of the chat template or format"
        )


def _names(tokenizer: Any) -> str:
    """Returns the spellings of the tokens that end an answer, for messages."""
    return " or ".join(tokenizer.convert_ids_to_tokens(sorted(end_tokens(tokenizer))))


def _warnings(tokenizer: Any, ended: int, sampled: int) -> Iterator[str]:
    """Yields warnings about documents without a trained end token, and about the padding token."""
    if 0 < ended < sampled:
        yield f"{sampled - ended} of {sampled} documents never train on a token that ends a turn ({_names(tokenizer)})"
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield (
            f"padding equals the end-of-text token ({tokenizer.eos_token}): training here is not affected, because "
            "padding is determined by the loss mask, but tools that mask by the pad token would never train on it"
        )


def histogram(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yields (from, to, count) of lengths, in bins that double in width."""
    low = 1
    while low <= int(lengths.max()):
        count = int(((lengths >= low) & (lengths < 2 * low)).sum())
        yield low, 2 * low - 1, count
        low *= 2


def rows_of_step(
    spec: StreamSpec, step: int, steps_per_batch: int = 1, sizes: Iterable[tuple[int, int]] = ()
) -> tuple[Position, list[Row], int]:
    """Returns (position, rows, fingerprint) of a step's global batch; the fingerprint is the one in the ledger.

    Args:
        spec: the training data.
        step: optimizer step, counted from 1, as in the log.
        steps_per_batch: optimizer steps that the trainer makes of each global batch.
        sizes: (completed steps, size of the global batch from then on), ascending; default: that of `spec`.
    """
    batch, done, position = (step - 1) // steps_per_batch, 0, Position()
    for at, size in sizes:
        if at > batch * steps_per_batch:
            break
        # With the size before, up to the change.
        position, done = spec.advance(position, at // steps_per_batch - done), at // steps_per_batch
        spec = replace(spec, global_size=size)
    position = spec.advance(position, batch - done)
    rows = spec.plan.rows(position.epoch, position.row, position.row + spec.global_size)
    fingerprint = wrap64(spec.build(position.epoch, position.row, spec.global_size, 0)["fingerprint"])
    return position, rows, fingerprint & (2**64 - 1)


def part_names(kind: str) -> tuple[str, ...]:
    """Returns the names of a document's parts, by the kind of its store; empty if a document is one text."""
    return {PAIRS: ("prompt", "chosen", "rejected"), LABELLED: ("prompt", "completion"), PROMPTS: ("prompt",)}.get(
        kind, ()
    )


def pieces(spec: StreamSpec, row: Row, tokenizer: Any) -> Iterator[tuple[int, str, bool]]:
    """Yields the runs of a row as (part number in the document, text, trained on), in order."""
    for segment in row:
        for number, (ids, trained) in enumerate(parts_of(spec.plan.store, *segment)):
            edges = np.flatnonzero(np.diff(trained.astype(np.int8))) + 1
            for part, mask in zip(np.split(ids, edges), np.split(trained, edges), strict=True):
                yield number, tokenizer.decode(part.tolist()), bool(mask[0])


def label_of(spec: StreamSpec, row: Row) -> str:
    """Returns the label of a row's answers: whether the completion is desirable, or the margin; empty if not known."""
    kind = spec.plan.store.kind
    if not row or kind not in (PAIRS, LABELLED):
        return ""
    last = split(spec.plan.store.read(*row[0]))[-1]
    if kind == LABELLED:
        return "desirable" if last[0] else "undesirable"
    margin = float(last.view(np.float32)[0])
    return f"margin {margin:g}" if margin else ""
