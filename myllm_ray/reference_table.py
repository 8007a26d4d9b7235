"""Log-probabilities of answers under a frozen reference model, computed before a run.

With the table, no second model is in memory during training. For preference pairs, the values are computed once per
document and reused by every run on the same data. KTO also combines each prompt with the answer of the next row of its
batch. These pairs change between epochs, so the table of KTO contains the values of every row of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.common import distributed
from myllm_ray.common.files import published
from myllm_ray.common.progress import track
from myllm_ray.common.types import Position
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.collate_examples import build_pairs
from myllm_ray.data.examples import LABELLED
from myllm_ray.data.packing import Segment
from myllm_ray.data.stream import StreamSpec
from myllm_ray.models.load import build_deferred
from myllm_ray.ops.pairs import one_answer_per_row, shared_prompt_mask
from myllm_ray.trainers.preference import ReferenceTable, answer_log_probs

_BLOCK = 8
"""Number of rows per forward pass."""
_Block = tuple[int, int, Callable[[], dict[str, Any]]]
"""Index of the first entry in the table, number of entries, and a function that builds their micro-batch."""


def reference_table(
    config: TrainerConfig, tokenizer: Any, spec: StreamSpec, batches: int, section: ModelSection, shared: bool
) -> ReferenceTable:
    """Returns the table of reference log-probabilities for the answers of a stream.

    All ranks compute it together. It is stored next to the tokens, and an existing table is read instead of computed.

    Args:
        config: The config of the run.
        tokenizer: The tokenizer of the run.
        spec: The stream of training or of validation.
        batches: Number of global batches of the stream that the run reads. Only KTO depends on it.
        section: The config of the reference model.
        shared: Whether a prompt and both answers are one row of a forward pass.

    Returns:
        The table, with values in nats.
    """
    by_row = spec.plan.store.kind == LABELLED
    described = [
        section.model_dump(mode="json"),
        _files(section),
        config.run.seed,
        config.accelerator.precision,
        shared,
        *([spec.plan.key, spec.global_size, batches] if by_row else []),
    ]
    path = spec.plan.store.folder / f"reference-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}.npy"
    cache = spec.plan.store.cache
    if distributed.is_main():
        cache.fetch_file(path)
    # All ranks follow the decision of rank 0: the file may be visible to other ranks at a different time, and a rank
    # that skips the collectives in this branch would make the others hang.
    if distributed.from_main(not path.exists()):
        blocks = list(_of_rows(spec, batches) if by_row else _of_documents(spec))
        values = _score(config, tokenizer, section, blocks, shared)
        if distributed.is_main():
            with published(path, existing="replace") as beside:
                np.save(beside, values)
            cache.upload_file(path, path)
        distributed.barrier()  # no rank reads the file before rank 0 has written it
    cache.fetch_file(path)
    return ReferenceTable(torch.from_numpy(np.load(path)), _first_rows(spec, batches) if by_row else None)


def _files(section: ModelSection) -> list[list[Any]]:
    """Returns the names, sizes in bytes and modification times of the files of a model's folder.

    The list is empty if the model is not a folder. The values are part of the key of the table, because another model
    may be written to the same folder.
    """
    folder = Path(section.name or "")
    if not section.name or not folder.is_dir():
        return []
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir()) if path.is_file()
    ]


def _of_documents(spec: StreamSpec) -> Iterator[_Block]:
    """Yields blocks with one entry per document of the store."""
    store = spec.plan.store
    for first in range(0, len(store), _BLOCK):
        numbers = range(first, min(first + _BLOCK, len(store)))
        rows = [[Segment(n, 0, int(store.lengths(np.asarray([n]))[0]))] for n in numbers]
        yield first, len(numbers), partial(build_pairs, store, rows, spec.pad_id)


def _of_rows(spec: StreamSpec, batches: int) -> Iterator[_Block]:
    """Yields blocks with one entry per row of the first `batches` global batches."""
    for number, (epoch, row) in enumerate(spec.positions(Position(), batches)):
        for place in range(0, spec.global_size, _BLOCK):
            count = min(_BLOCK, spec.global_size - place)
            yield number * spec.global_size + place, count, partial(spec.build, epoch, row + place, count)


def _first_rows(spec: StreamSpec, batches: int) -> list[int]:
    """Returns the index of the entry of each epoch's first row."""
    return [
        number * spec.global_size
        for number, position in enumerate(spec.positions(Position(), batches))
        if position.row == 0
    ]


@torch.no_grad()
def _score(
    config: TrainerConfig, tokenizer: Any, section: ModelSection, blocks: list[_Block], shared: bool
) -> np.ndarray:
    """Computes the values of the table, (entries, 2) float32.

    The blocks are distributed over the ranks, and each block is computed by one rank with one micro-batch. The values
    therefore do not depend on the number of ranks.
    """
    accelerator = SingleGPUAccelerator.like(config.accelerator)
    accelerator.setup()
    model = accelerator.prepare_frozen(build_deferred(section, tokenizer, config.data.sequence_length, config.run.seed))
    last, count, _ = blocks[-1]
    table = torch.zeros(last + count, 2, dtype=torch.float64)
    own = blocks[distributed.rank() :: distributed.world_size()]
    for first, count, build in track(own, "computing the reference table", len(own)):
        micro = accelerator.move(to_tensors(build()))
        inputs, per_row = (
            ({**micro, "attention_mask": shared_prompt_mask(micro["segment_ids"])}, 2)
            if shared
            else (one_answer_per_row(micro), 1)
        )
        with accelerator.autocast():
            table[first : first + count] = answer_log_probs(model, inputs, per_row, count)[0].double().cpu()
    # The backend of the process group reduces tensors on the device. The sum of float64 values with zeros is exact.
    device = accelerator.device if distributed.is_distributed() else "cpu"
    return distributed.all_reduce_(table.to(device)).float().cpu().numpy()  # entries of other ranks are 0
