"""`data_summary.json` of a run: what its prepared data is, for the report.

It takes the same short time for any amount of data: counts are those of the store, lengths and packing are taken from
at most `_MOST` documents and rows that are spread over all of them, and only the first rows are decoded.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from myllm_ray.common.secrets import mask_text
from myllm_ray.data.examples import TOKENS
from myllm_ray.data.inspect import histogram, label_of, part_names, parts_of, pieces
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.source_counts import source_uses

_MOST, _BLOCK, _READ = 2**18, 4096, 500
_ROWS, _CHARACTERS = 3, 1500


def summarize(prepared: PreparedData, tokenizer: Any, batches: int = 1) -> dict[str, Any]:
    """Returns a summary of the data as a JSON object.

    Keys: `sources` (each with `name`, `documents`, `tokens`, `skipped`, `first_skipped`, `duplicates`, and if the
    sources have shares `share` and `passes`, those of the run), `run_rows` and `run_steps` (only with shares: those of
    the run), `documents`,
    `tokens`, `kind`, `histogram` ([from, to, documents] by length in tokens), `sampled_documents` and `sampled_rows`
    (None: all were counted), `row_tokens`, `rows` and `steps` of an epoch, `efficiency` (share of the positions of rows
    that contain a token), `trained_share`, `longer_than_row` (a share), `validation_rows`, `packing`, `isolation`,
    `notes`, and `preview` (the first rows as text, with what is trained on).

    Args:
        prepared: The data.
        tokenizer: Its tokenizer.
        batches: Number of global batches of the run, for sources that have shares.
    """
    spec = prepared.train
    plan, store, size = spec.plan, spec.plan.store, spec.plan.packing.size
    rows = plan.rows_in_epoch(0)
    documents = _spread(len(store), _MOST if store.kind == TOKENS else _READ)
    if store.kind == TOKENS:
        lengths = store.lengths(documents)
        trained = int(store.targets(documents).sum())
    else:
        parts = [parts_of(store, int(document)) for document in documents]
        lengths = np.asarray([sum(len(ids) for ids, _ in part) for part in parts])
        trained = sum(int(on.sum()) for part in parts for _, on in part)
    picked = _spread(rows, _MOST)
    if store.kind == TOKENS:
        segments, firsts = plan.segments(0)
        filled = sum(
            int(segments[int(firsts[block[0]]) : int(firsts[block[-1] + 1]), 2].sum()) for block in _blocks(picked)
        )
        efficiency = filled / (len(picked) * size)
    else:
        efficiency = float(np.minimum(lengths, size).mean()) / size
    mixed = plan.order.mixture is not None
    uses = [asdict(use) for use in source_uses(spec, batches)] if mixed else [{}] * len(store.sources)
    return {
        **({"run_rows": batches * spec.global_size, "run_steps": batches} if mixed else {}),
        "sources": [
            {
                **{key: source[key] for key in ("name", "documents", "tokens", "skipped", "duplicates")},
                "first_skipped": mask_text(str(source["first_skipped"])),
                **use,
            }
            for source, use in zip(store.meta["sources"], uses, strict=True)
        ],
        "documents": len(store),
        "tokens": sum(int(source["tokens"]) for source in store.meta["sources"]),
        "kind": store.kind,
        "histogram": [list(bin) for bin in histogram(lengths)],
        "sampled_documents": len(documents) if len(documents) < len(store) else None,
        "sampled_rows": len(picked) if len(picked) < rows else None,
        "row_tokens": size,
        "rows": rows,
        "steps": spec.steps_in_epoch(0),
        "efficiency": efficiency,
        "trained_share": trained / max(1, int(lengths.sum())),
        "longer_than_row": float((lengths > size).mean()),
        "validation_rows": prepared.validation.plan.rows_in_epoch(0) if prepared.validation else 0,
        "packing": prepared.packing,
        "isolation": str(prepared.isolation) if prepared.isolation else None,
        "notes": [mask_text(note) for note in prepared.notes],
        "preview": [_preview(spec, number, row, tokenizer) for number, row in enumerate(plan.rows(0, 0, _ROWS)) if row],
    }


def _spread(count: int, most: int) -> np.ndarray:
    """Returns all numbers below `count`, or about `most` of them in blocks that are spread evenly."""
    if count <= most:
        return np.arange(count)
    block = min(_BLOCK, max(1, most // 64))
    starts = np.linspace(0, count - block, most // block).astype(np.int64)
    return np.unique((starts[:, None] + np.arange(block)).ravel())


def _blocks(numbers: np.ndarray) -> list[np.ndarray]:
    """Splits ascending numbers into runs of consecutive ones."""
    return [] if not len(numbers) else np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)


def _preview(spec: Any, number: int, row: Any, tokenizer: Any) -> dict[str, Any]:
    names = part_names(spec.plan.store.kind)
    shown: list[list[Any]] = []
    left = _CHARACTERS
    for segment in row:
        last = -1
        for part, text, trained in pieces(spec, [segment], tokenizer):
            if left <= 0:
                break
            name = "" if part == last else names[part] if names else f"document {segment.document}"
            shown.append([name, mask_text(text[:left]) + ("…" if len(text) > left else ""), trained])
            left, last = left - len(text), part
    return {
        "row": number,
        "tokens": sum(segment.length for segment in row),
        "documents": [segment.document for segment in row[:20]],
        "pieces": shown,
        "label": label_of(spec, row),
    }
