"""Sources: from paths to units of work, and from a unit to its rows. The order of rows is the order of units.

A unit is a piece of a file that one task can read without the rest (a byte range of a JSONL or text file, a row group of
a Parquet file), so that a file of any size is read in bounded memory, and by several tasks at once.
"""

from __future__ import annotations

import glob as globbing
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from myllm_ray.common.remote import open_storage
from myllm_ray.config.errors import DataError, UserError
from myllm_ray.config.schema import SourceSection
from myllm_ray.data import stdlib, tasks
from myllm_ray.data.formats import BadRow

RANGE_BYTES = 2**20
"""How much of a line-based file one unit holds."""
TEXT_PIECE = 64 * 2**10
"""A text file longer than this is cut at the next blank line, so that a book is many documents, not one."""
EXTENSIONS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv",
              ".txt": "text", ".text": "text", ".md": "text", ".py": "text", ".rst": "text"}

Row = tuple[str, Mapping[str, Any] | BadRow]
"""Where a row stands (`file:line`), and the row, or why it is none."""


@dataclass(frozen=True)
class Unit:
    """A piece of a file: bytes [start, stop) of a line-based file, or part number `start` of another."""

    path: str
    kind: str
    start: int
    stop: int


def list_units(source: SourceSection, key: str) -> list[Unit]:
    """All units of a source, in order: paths as they were given, folders and globs sorted by name.

    Raises:
        DataError: nothing is there, a file's type is unknown, or a library for the URL is missing.
    """
    if source.source == "python-stdlib":
        return [Unit(path, "stdlib", 0, 0) for path in stdlib.files()]
    if source.source is not None:
        return [Unit(source.source, "task", 0, tasks.VERSION)]
    paths = source.path if isinstance(source.path, list) else [source.path or ""]
    return [unit for path in paths for file in _expand(path, key) for unit in _split(file, key)]


def signature(units: list[Unit]) -> str:
    """A hash of which files these are, by path, size and time of change: the key of the cache of prepared data."""
    seen = {}
    for path in dict.fromkeys(u.path for u in units if u.kind != "task"):
        filesystem, inner = url_to_fs(path)
        info = filesystem.info(inner)
        seen[path] = [info.get("size"), str(info.get("mtime") or info.get("LastModified") or info.get("etag"))]
    text = json.dumps([seen, [asdict(u) for u in units]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_unit(unit: Unit, source: SourceSection) -> Iterator[Row]:
    """The rows of one unit, each with its place in the file."""
    if unit.kind == "stdlib":
        pairs = source.format != "text"
        yield from stdlib.functions(unit.path) if pairs else stdlib.text(unit.path)
    elif unit.kind == "task":
        yield from ((f"{unit.path}: row {i}", row) for i, row in enumerate(tasks.rows(unit.path, source.format)))
    elif unit.kind == "jsonl":
        yield from _read_jsonl(unit)
    elif unit.kind == "json":
        yield from _read_json(unit)
    elif unit.kind == "parquet":
        yield from _read_parquet(unit)
    elif unit.kind == "csv":
        yield from _read_csv(unit)
    else:
        yield from _read_text(unit, source.split_text)


def _expand(path: str, key: str) -> list[str]:
    """A path as the files behind it."""
    filesystem, inner = open_storage(path, key, DataError)
    try:
        if globbing.has_magic(inner):
            found = sorted(p for p in filesystem.glob(inner) if filesystem.isfile(p))
        elif filesystem.isdir(inner):
            found = sorted(p for p in filesystem.find(inner) if PurePosixPath(p).suffix in EXTENSIONS)
        else:
            found = [inner] if filesystem.exists(inner) else []
    except UserError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        raise DataError(f"{key}: {path!r} can't be listed: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(f"{key}: nothing found at {path!r}: give a file, a folder with {', '.join(EXTENSIONS)} files, "
                        "or a glob")
    return [filesystem.unstrip_protocol(p) if "://" in path else p for p in found]


def _split(path: str, key: str) -> list[Unit]:
    kind = EXTENSIONS.get(PurePosixPath(path).suffix.lower())
    if kind is None:
        raise DataError(f"{key}: {path!r} has an unknown type; known are {', '.join(EXTENSIONS)}")
    if kind == "parquet":
        return [Unit(path, kind, group, group + 1) for group in range(_parquet_groups(path))]
    if kind in ("json", "csv"):
        return [Unit(path, kind, 0, 1)]
    filesystem, inner = url_to_fs(path)
    size = filesystem.size(inner)
    return [Unit(path, kind, a, min(a + RANGE_BYTES, size)) for a in range(0, size, RANGE_BYTES)]


def _parquet_groups(path: str) -> int:
    """Row groups of a Parquet file of plain types: an extension type may be a pickle, which runs code when it is read."""
    try:
        with fsspec.open(path, "rb") as file:
            opened = pq.ParquetFile(file)
            for column in opened.schema_arrow:
                metadata = column.metadata or {}
                if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in metadata:
                    raise DataError(f"{path}: column {column.name!r} has the extension type {column.type}; only plain types are "
                                    "read: write it without")
            return int(opened.num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid Parquet file: {' '.join(str(error).split())[:200]}") from None


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that *begin* in the unit's bytes; the last may end beyond them."""
    with fsspec.open(unit.path, "rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # the rest of a line that belongs to the unit before, or just its newline
        while (offset := file.tell()) < unit.stop:
            line = file.readline()
            if not line:
                return
            yield offset, line


def line_number(path: str, offset: int) -> int:
    """The number of the line at a byte offset, counted only when a message needs it."""
    count, done = 1, 0
    with fsspec.open(path, "rb") as file:
        while done < offset:
            block = file.read(min(2**20, offset - done))
            if not block:
                break
            count += block.count(b"\n")
            done += len(block)
    return count


def _read_jsonl(unit: Unit) -> Iterator[Row]:
    for offset, line in _lines(unit):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else f"a line must be an object, this is {type(row).__name__}"
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            row, problem = None, f"not valid JSON: {getattr(error, 'msg', error)}"
        if problem or row is None:
            yield f"{unit.path}:{line_number(unit.path, offset)}", BadRow(problem or "empty")
        else:
            yield Place(unit.path, offset), row


class Place(str):
    """`path:line` that counts the line only when it is printed."""

    def __new__(cls, path: str, offset: int) -> Place:
        place = super().__new__(cls, path)
        place.offset = offset
        return place

    offset: int

    def __format__(self, spec: str) -> str:
        return f"{str.__str__(self)}:{line_number(str.__str__(self), self.offset)}"


def _read_json(unit: Unit) -> Iterator[Row]:
    with fsspec.open(unit.path, "rb") as file:
        try:
            rows = json.load(file)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise DataError(f"{unit.path}{line}: not valid JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(rows, list):
        raise DataError(f"{unit.path}: a JSON data set is a list of objects, this is {type(rows).__name__} "
                        "(one object a line is .jsonl)")
    for i, row in enumerate(rows):
        place = f"{unit.path}: row {i}"
        yield place, row if isinstance(row, dict) else BadRow(f"a row must be an object, this is {type(row).__name__}")


def _read_parquet(unit: Unit) -> Iterator[Row]:
    with fsspec.open(unit.path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=1024, row_groups=[unit.start]):
            for i, row in enumerate(batch.to_pylist()):
                yield f"{unit.path}: row group {unit.start}, row {i}", row


def _read_csv(unit: Unit) -> Iterator[Row]:
    number = 0
    with fsspec.open(unit.path, "rb") as file:
        try:
            for batch in pa.csv.open_csv(file, parse_options=pa.csv.ParseOptions(newlines_in_values=True)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{unit.path}: row {number}", row
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise DataError(f"{unit.path}: not valid CSV after row {number}: {error}") from None


def _read_text(unit: Unit, split: str) -> Iterator[Row]:
    """Documents of a text file: lines, paragraphs, or the file in pieces that end at a blank line."""
    pieces: list[str] = []
    size, first = 0, unit.start
    for offset, raw in _lines(unit):
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            yield Place(unit.path, offset), BadRow("not valid UTF-8")
            continue
        if not pieces:
            first = offset
        blank = not line.strip()
        pieces.append(line)
        size += len(line)
        complete = split == "line" or (blank and (split == "paragraph" or size >= TEXT_PIECE)) or size >= 4 * TEXT_PIECE
        if complete:
            yield from _document(unit, first, pieces)
            pieces, size = [], 0
    yield from _document(unit, first, pieces)


def _document(unit: Unit, offset: int, pieces: list[str]) -> Iterator[Row]:
    text = "".join(pieces)
    if text.strip():
        yield Place(unit.path, offset), {"text": text}
