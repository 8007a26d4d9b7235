"""Rows for the evaluation of a model: one document or one prompt per row, batched by length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from fsspec.core import url_to_fs

from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import SourceSection
from myllm_ray.data import sources as reading
from myllm_ray.data.cache import DataCache
from myllm_ray.data.examples import TOKENS, LengthLimits
from myllm_ray.data.order import Order
from myllm_ray.data.packing import Row
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.prepare import MapUnits, packing_of, token_store
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import TokenizeOptions

_CHUNK = 1 << 20


def rows_of(store: TokenStore, packing: Packing) -> RowPlan:
    """Returns the rows of a store, in the order of the data.

    Args:
        store: the store.
        packing: the packing of documents of tokens. A store of examples has one example per row.
    """
    return RowPlan(store, Order(0, "none"), packing if store.kind == TOKENS else Packing("record", packing.size))


def task_rows(config: TrainerConfig, tokenizer_folder: str, map_units: MapUnits = map) -> tuple[RowPlan | None, ...]:
    """Returns the rows of each entry of `evaluation.tasks`; None for a task of lm-evaluation-harness.

    The data is tokenized with the settings of the run, into the cache of the run.

    Raises:
        DataError: the data of a task can't be read, or is empty.
        ConfigError: no prompt fits with its answer.
    """
    cache, size = DataCache.of(config), config.data.sequence_length
    found: list[RowPlan | None] = []
    for number, task in enumerate(config.evaluation.tasks):
        if task.data is None:
            found.append(None)
            continue
        room = size - task.max_new_tokens
        if room < 1 and task.data.format == "prompt":
            raise ConfigError(
                f"evaluation.tasks.{number}.max_new_tokens={task.max_new_tokens} leaves no tokens for a prompt in "
                f"data.sequence_length={size}"
            )
        limits = LengthLimits(max(1, room))
        options = TokenizeOptions({}, config.data.on_bad_row, config.trainer_section.trains_on_prompt, limits)
        source = task.data.model_copy(update={"limit": task.limit or task.data.limit})
        named = [(source, f"evaluation.tasks.{number}.data")]
        store = token_store(cache, Path(tokenizer_folder), named, options, map_units)
        found.append(rows_of(store, Packing("none", size, packing_of(config).overflow)))
        found[-1].rows_in_epoch(0)  # type: ignore[union-attr]  # written before workers start
    return tuple(found)


class Batches(Sequence[list[Row]]):
    """The rows of a plan in batches of similar length, the longest first.

    A batch has little padding, and a batch that does not fit into memory fails at the start.

    Args:
        plan: the rows.
        size: number of rows per batch; the last batch may have fewer.
    """

    def __init__(self, plan: RowPlan, size: int):
        segments, firsts = plan.segments(0)
        lengths = np.add.reduceat(np.asarray(segments[:, 2]), np.asarray(firsts[:-1]))
        self.plan, self.size, self._order = plan, size, np.argsort(-lengths, kind="stable")

    def __len__(self) -> int:
        return -(-len(self._order) // self.size)

    @overload
    def __getitem__(self, number: int) -> list[Row]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[list[Row]]: ...
    def __getitem__(self, number: int | slice) -> list[Row] | Sequence[list[Row]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number >= len(self):
            raise IndexError(number)
        rows = self._order[number * self.size : (number + 1) * self.size]
        return [self.plan.rows(0, int(row), int(row) + 1)[0] for row in rows]


def digest(source: SourceSection, key: str) -> str:
    """Returns the SHA-256 of the files of a source: their contents, in the order in which they are read.

    Args:
        source: the source, with a path.
        key: the name of its path, for error messages.

    Raises:
        DataError: a file can't be read.
    """
    found = hashlib.sha256()
    for path in _files(source, key):
        filesystem, inner = url_to_fs(path)
        try:
            with filesystem.open(inner, "rb") as file:
                for piece in iter(lambda: file.read(_CHUNK), b""):
                    found.update(piece)
        except OSError as error:
            raise DataError(f"{key}: {path} can't be read: {error}") from None
        found.update(b"\0file\0")
    return found.hexdigest()


def _files(source: SourceSection, key: str) -> Iterator[str]:
    return reading.files_of(reading.list_units(source, key))
