"""Log-probabilities of answers under a frozen reference, computed before a run, so that no second model is in memory while it trains.

Of preference pairs they are computed once for each document, and serve every run on the same data. KTO also compares each prompt with
the answer of the next row of its batch: these pairs change from epoch to epoch, so there is a value for every row of the run.
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
from myllm_ray.common.types import Position
from myllm_ray.config.schema import ModelSection, TrainerConfig
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.collate_records import build_pairs
from myllm_ray.data.packing import Segment
from myllm_ray.data.records import LABELLED
from myllm_ray.data.stream import StreamSpec
from myllm_ray.models.load import build_deferred
from myllm_ray.ops.pairs import one_answer_per_row, shared_prompt_mask
from myllm_ray.trainers.preference import ReferenceTable, answer_log_probs

_BLOCK = 8
"""Rows whose log-probabilities are computed together."""
_Block = tuple[int, int, Callable[[], dict[str, Any]]]
"""First entry in the table, number of entries, and what makes their micro-batch."""


def reference_table(config: TrainerConfig, tokenizer: Any, spec: StreamSpec, batches: int, section: ModelSection, shared: bool) -> ReferenceTable:
    """The table of the answers that a stream has, computed by all ranks, and kept beside the tokens; read where it is there already.

    Args:
        spec: the stream of training or of validation.
        batches: how many global batches are read of it; of importance to KTO only.
        section: the reference model.
        shared: whether a prompt and both answers are one row of a forward pass.
    """
    by_row = spec.plan.store.kind == LABELLED
    described = [section.model_dump(mode="json"), _files(section), config.run.seed, config.accelerator.precision, shared,
                 *([spec.plan.key, spec.global_size, batches] if by_row else [])]
    path = spec.plan.store.folder / f"reference-{hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]}.npy"
    if distributed.from_main(not path.exists()):
        blocks = list(_of_rows(spec, batches) if by_row else _of_documents(spec))
        values = _score(config, tokenizer, section, blocks, shared)
        if distributed.is_main():
            with published(path, existing="replace") as beside:
                np.save(beside, values)
        distributed.barrier()
    return ReferenceTable(torch.from_numpy(np.load(path)), _first_rows(spec, batches) if by_row else None)


def _files(section: ModelSection) -> list[list[Any]]:
    """Names, sizes and times of a model's files, where it is a folder: another model may be written to the same place."""
    folder = Path(section.name or "")
    if not section.name or not folder.is_dir():
        return []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(folder.iterdir()) if path.is_file()]


def _of_documents(spec: StreamSpec) -> Iterator[_Block]:
    store = spec.plan.store
    for first in range(0, len(store), _BLOCK):
        numbers = range(first, min(first + _BLOCK, len(store)))
        rows = [[Segment(n, 0, int(store.lengths(np.asarray([n]))[0]))] for n in numbers]
        yield first, len(numbers), partial(build_pairs, store, rows, spec.pad_id)


def _of_rows(spec: StreamSpec, batches: int) -> Iterator[_Block]:
    for number, (epoch, row) in enumerate(spec.positions(Position(), batches)):
        for place in range(0, spec.global_size, _BLOCK):
            count = min(_BLOCK, spec.global_size - place)
            yield number * spec.global_size + place, count, partial(spec.build, epoch, row + place, count)


def _first_rows(spec: StreamSpec, batches: int) -> list[int]:
    """The entry of each epoch's first row."""
    return [number * spec.global_size for number, position in enumerate(spec.positions(Position(), batches)) if position.row == 0]


@torch.no_grad()
def _score(config: TrainerConfig, tokenizer: Any, section: ModelSection, blocks: list[_Block], shared: bool) -> np.ndarray:
    """(entries, 2) float32, the same whatever the number of ranks: blocks are dealt out, each computed by one."""
    accelerator = SingleGPUAccelerator.like(config.accelerator)
    accelerator.setup()
    model = accelerator.prepare_frozen(build_deferred(section, tokenizer, config.data.sequence_length, config.run.seed))
    last, count, _ = blocks[-1]
    table = torch.zeros(last + count, 2, dtype=torch.float64)
    for first, count, build in blocks[distributed.rank() :: distributed.world_size()]:
        micro = accelerator.move(to_tensors(build()))
        inputs, per_row = ({**micro, "attention_mask": shared_prompt_mask(micro["segment_ids"])}, 2) if shared else (one_answer_per_row(micro), 1)
        with accelerator.autocast():
            table[first : first + count] = answer_log_probs(model, inputs, per_row, count)[0].double().cpu()
    device = accelerator.device if distributed.is_distributed() else "cpu"
    return distributed.all_reduce_(table.to(device)).float().cpu().numpy()  # the others' entries are zero here
