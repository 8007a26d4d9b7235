"""Data sources: splits paths into units, and reads the rows of a unit. Rows are ordered by unit.

A unit is a part of a file that one task can read without the rest of it, such as a byte range of a JSONL or text file,
or a row group of a Parquet file. Files of these types are read in bounded memory and by several tasks in parallel.
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
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.builtin import stdlib, tasks
from myllm_ray.data.formats import BadRow
from myllm_ray.data.pretokenized import index_path

RANGE_BYTES = 2**20
"""Size of a unit of a line-based file, in bytes."""
TEXT_PIECE = 64 * 2**10
"""Size in characters after which a text file is cut at the next blank line, so that a book becomes many documents."""
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".py": "text",
    ".rst": "text",
}

TOKEN_FILES = {".npy": "flat", ".bin": "flat", ".arrow": "arrow"}
"""Files of token ids, which are used in place with the format `tokens`."""
_TOKENS = "tokens"
_ROWS_OF_IDS = (".jsonl", ".ndjson", ".json", ".parquet")

Row = tuple[str, Mapping[str, Any] | BadRow]
"""The location of a row (`file:line`), and the row, or the reason why it is invalid."""


@dataclass(frozen=True)
class Unit:
    """A part of a file: bytes [start, stop) of a line-based file, or part number `start` of any other file."""

    path: str
    kind: str
    start: int
    stop: int


def list_units(source: SourceSection, key: str) -> list[Unit]:
    """Returns all units of a source, in order. Paths keep their order; files of a folder or glob are sorted by name.

    Args:
        source: Config section of the source.
        key: Config key of the path, for error messages.

    Raises:
        DataError: No file is found, a file type is unknown, or the library for the URL is not installed.
    """
    if source.source == "python-stdlib":
        return [Unit(path, "stdlib", 0, 0) for path in stdlib.files()]
    if source.source is not None:
        return [Unit(source.source, "task", 0, tasks.VERSION)]
    paths = source.path if isinstance(source.path, list) else [source.path or ""]
    tokens = source.format == _TOKENS
    types = {**{t: EXTENSIONS[t] for t in _ROWS_OF_IDS}, **TOKEN_FILES} if tokens else EXTENSIONS
    return [unit for path in paths for file in _expand(path, key, types) for unit in _split(file, key, types)]


def files_of(units: list[Unit]) -> Iterator[str]:
    """Yields the paths of the files of units."""
    for path, kind in dict.fromkeys((u.path, u.kind) for u in units):
        if kind != "task":
            yield path
        if kind == "megatron":
            yield index_path(path)


def signature(units: list[Unit]) -> str:
    """Returns a hash of the files' paths, sizes and modification times, used in the cache keys of prepared data."""
    seen = {}
    for path in files_of(units):
        filesystem, inner = url_to_fs(path)
        info = filesystem.info(inner)
        seen[path] = [info.get("size"), str(info.get("mtime") or info.get("LastModified") or info.get("etag"))]
    text = json.dumps([seen, [asdict(u) for u in units]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_unit(unit: Unit, source: SourceSection) -> Iterator[Row]:
    """Yields the rows of one unit, each with its location in the file."""
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


def _expand(path: str, key: str, types: Mapping[str, str]) -> list[str]:
    """Returns the files of a path, folder or glob."""
    filesystem, inner = open_storage(path, key, DataError)
    try:
        if globbing.has_magic(inner):
            found = sorted(p for p in filesystem.glob(inner) if filesystem.isfile(p))
        elif filesystem.isdir(inner):
            found = _of_datasets(filesystem, inner, key, ".arrow" in types)
            found = found or sorted(p for p in filesystem.find(inner) if PurePosixPath(p).suffix in types)
        elif ".bin" in types and (bin := _megatron(filesystem, inner)):
            found = [bin]
        else:
            found = [inner] if filesystem.exists(inner) else []
    except UserError:
        raise
    except Exception as error:  # each fsspec file system raises its own exception types
        raise DataError(f"{key}: {path!r} can't be listed: {type(error).__name__}: {error}") from None
    if not found:
        raise DataError(
            f"{key}: nothing found at {path!r}: give a file, a folder with {', '.join(types)} files, or a glob"
        )
    return [filesystem.unstrip_protocol(p) if "://" in path else p for p in found]


def _of_datasets(filesystem: Any, folder: str, key: str, tokens: bool) -> list[str]:
    """Returns the Arrow files of a folder that Hugging Face datasets has saved; no files for another folder."""
    if filesystem.exists(f"{folder}/dataset_dict.json"):
        splits = json.loads(filesystem.cat_file(f"{folder}/dataset_dict.json"))["splits"]
        raise DataError(f"{key}: {folder!r} has several splits: give the folder of one of them ({', '.join(splits)})")
    if not (filesystem.exists(f"{folder}/state.json") and filesystem.exists(f"{folder}/dataset_info.json")):
        return []
    if not tokens:
        raise DataError(
            f"{key}: {folder!r} is a folder of datasets (save_to_disk): with token ids, set format: tokens; with text, "
            "write Parquet (to_parquet)"
        )
    state = json.loads(filesystem.cat_file(f"{folder}/state.json"))
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise DataError(f"{key}: {folder!r} has an index of rows: save it again after flatten_indices()")
    return [f"{folder}/{file['filename']}" for file in state["_data_files"]]


def _megatron(filesystem: Any, path: str) -> str | None:
    """Returns Megatron's file of tokens for the path of its index, or for the path without a suffix."""
    stem = path.removesuffix(".idx")
    if path.endswith(".idx") or not filesystem.exists(path):
        return f"{stem}.bin" if filesystem.exists(f"{stem}.bin") and filesystem.exists(f"{stem}.idx") else None
    return None


def _split(path: str, key: str, types: Mapping[str, str]) -> list[Unit]:
    suffix = PurePosixPath(path).suffix.lower()
    kind = types.get(suffix)
    if kind is None:
        hint = "; for token ids, set format: tokens" if suffix in (*TOKEN_FILES, ".idx") else ""
        raise DataError(f"{key}: {path!r} has an unsupported file type; supported types are {', '.join(types)}{hint}")
    if kind in TOKEN_FILES.values():
        filesystem, inner = url_to_fs(path)
        indexed = suffix == ".bin" and filesystem.exists(index_path(inner))
        return [Unit(path, "megatron" if indexed else kind, 0, 1)]
    if kind == "parquet":
        return [Unit(path, kind, group, group + 1) for group in range(_parquet_groups(path))]
    if kind in ("json", "csv"):
        return [Unit(path, kind, 0, 1)]
    filesystem, inner = url_to_fs(path)
    size = filesystem.size(inner)
    return [Unit(path, kind, a, min(a + RANGE_BYTES, size)) for a in range(0, size, RANGE_BYTES)]


def _parquet_groups(path: str) -> int:
    """Returns the number of row groups of a Parquet file.

    Extension types are rejected, because they may contain pickled data, which can execute code when read.

    Raises:
        DataError: A column has an extension type, or the file is not a valid Parquet file.
    """
    try:
        with fsspec.open(path, "rb") as file:
            opened = pq.ParquetFile(file)
            for column in opened.schema_arrow:
                metadata = column.metadata or {}
                if isinstance(column.type, pa.BaseExtensionType) or b"ARROW:extension:name" in metadata:
                    raise DataError(
                        f"{path}: column {column.name!r} has the extension type {column.type}; only plain types are "
                        "read; convert the column to a plain type"
                    )
            return int(opened.num_row_groups)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a valid Parquet file: {' '.join(str(error).split())[:200]}") from None


def _lines(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Yields (offset, line) for each line that *starts* in the unit's byte range. The last line may end after it."""
    with fsspec.open(unit.path, "rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # skips the rest of a line of the previous unit, or only its newline
        while (offset := file.tell()) < unit.stop:
            line = file.readline()
            if not line:
                return
            yield offset, line


def line_number(path: str, offset: int) -> int:
    """Returns the line number at a byte offset. Reads the file up to there, so it is called only for messages."""
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
            problem = None if isinstance(row, dict) else f"a line must be a JSON object, not {type(row).__name__}"
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            row, problem = None, f"not valid JSON: {getattr(error, 'msg', error)}"
        if problem or row is None:
            yield f"{unit.path}:{line_number(unit.path, offset)}", BadRow(problem or "empty")
        else:
            yield Place(unit.path, offset), row


class Place(str):
    """A `path:line` location that computes the line number only when it is formatted."""

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
        raise DataError(
            f"{unit.path}: a JSON data set must be a list of objects, not {type(rows).__name__} "
            "(for one object per line, use a .jsonl file)"
        )
    for i, row in enumerate(rows):
        place = f"{unit.path}: row {i}"
        yield place, row if isinstance(row, dict) else BadRow(f"a row must be a JSON object, not {type(row).__name__}")


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
    """Yields the documents of a text file: lines, paragraphs, or pieces of the file that end at a blank line."""
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
