"""The tasks that make the shards of a source. Each is the work of one process, possibly on another node."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from myllm_ray.config.components import format_of
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.cache import DataCache
from myllm_ray.data.pretokenized import IN_PLACE, index_file
from myllm_ray.data.shards import write_shard
from myllm_ray.data.sources import Unit, read_unit
from myllm_ray.data.tokenize import TokenizeOptions, tokenize_rows
from myllm_ray.data.tokenizer import open_tokenizer

_UNITS = 8
"""Smallest number of units per shard."""
_MOST_SHARDS = 4096
"""Largest number of shards of a source, if its size does not force more of them."""


class ShardTask(NamedTuple):
    """The shard with the given number of a source, and the units that it holds."""

    number: int
    units: list[Unit]


def shard_tasks(units: list[Unit], limit: int | None) -> list[ShardTask]:
    """Divides the units of a source, in order, among shards.

    Args:
        units: The units.
        limit: Largest number of documents of the source. With a limit, each unit is a task; later ones are not read.
    """
    size = 1 if limit is not None else max(_UNITS, -(-len(units) // _MOST_SHARDS))
    groups: list[list[Unit]] = []
    for unit in units:
        # A file that is used in place is a shard.
        if not groups or len(groups[-1]) == size or unit.kind in IN_PLACE or groups[-1][0].kind in IN_PLACE:
            groups.append([])
        groups[-1].append(unit)
    return [ShardTask(number, group) for number, group in enumerate(groups)]


def make_shard(
    task: ShardTask,
    folder: Path,
    index: int,
    name: str,
    source: SourceSection,
    tokenizer_folder: str,
    options: TokenizeOptions,
    vocabulary: int,
    cache: DataCache,
    store: Path,
    attempt: str,
) -> pa.RecordBatch:
    """Tokenizes the units of a task into a shard, or describes a file that is used in place.

    Args:
        task: The task.
        folder: Folder in which the store is written, if the cache has no URL.
        index, name, source: Number, name and config of the source.
        tokenizer_folder: Folder of the tokenizer.
        options: Options of the tokenization.
        vocabulary: A number above all token ids.
        cache: The cache. With a URL, the shard is uploaded.
        store: Folder of the finished store.
        attempt: Part of the names of uploaded files. It differs between processes that prepare the same data.

    Returns:
        The index of the shard (`shards.index_batch`).

    Raises:
        DataError: A row can't be used, or the folder can't be written.
    """
    if cache.url is None:
        return _written(task, folder, f"{index}-{task.number:05d}", name, source, tokenizer_folder, options, vocabulary)
    cache.fetch(Path(tokenizer_folder))
    cache.folder.mkdir(parents=True, exist_ok=True)
    stem = f"{index}-{task.number:05d}-{attempt}"
    with tempfile.TemporaryDirectory(dir=cache.folder) as own:
        batch = _written(task, Path(own), stem, name, source, tokenizer_folder, options, vocabulary)
        for path in Path(own).iterdir():
            cache.upload_file(path, store / path.name)
    return batch


def _written(
    task: ShardTask,
    folder: Path,
    stem: str,
    name: str,
    source: SourceSection,
    tokenizer_folder: str,
    options: TokenizeOptions,
    vocabulary: int,
) -> pa.RecordBatch:
    unit = task.units[0]
    if unit.kind in IN_PLACE:
        config, bits = format_of(source).config, folder / f"trained-{stem}.bits"  # type: ignore[attr-defined]
        tokenizer, whole = opened(tokenizer_folder), options.train_on_prompt
        return index_file(unit.kind, unit.path, config, options.fields, tokenizer, vocabulary, whole, bits)
    batches = _tokenized(task.units, source, tokenizer_folder, options)
    return write_shard(folder, stem, name, batches, vocabulary, source.limit)


def _tokenized(
    units: list[Unit], source: SourceSection, tokenizer_folder: str, options: TokenizeOptions
) -> Iterator[pa.RecordBatch]:
    format_row, tokenizer = format_of(source), opened(tokenizer_folder)
    for unit in units:
        yield tokenize_rows(read_unit(unit, source), format_row, tokenizer, options)


_tokenizers: dict[str, Any] = {}
"""Opened tokenizers by folder: a process opens each tokenizer once, not once per task."""


def opened(tokenizer_folder: str) -> Any:
    """Returns the tokenizer of a folder."""
    if tokenizer_folder not in _tokenizers:
        _tokenizers[tokenizer_folder] = open_tokenizer(tokenizer_folder)
    return _tokenizers[tokenizer_folder]
