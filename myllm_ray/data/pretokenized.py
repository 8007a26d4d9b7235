"""Data that has been tokenized: the format `tokens`, and files of token ids that are used in place.

A file that is used in place is read once when the data is prepared: the ids are checked, and the index of its documents
is written to the token store. The tokens stay where they are. The layouts are

    flat       `.npy` or `.bin`: one array with numpy's header, or only the ids, as OLMo-core and nanoGPT write them; a
               document ends with an end token
    megatron   `.bin` with an index `.idx` beside it (Megatron-LM); each sequence is a document
    arrow      the files of a folder of Hugging Face datasets (`save_to_disk`); each row is a document
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt

from myllm_ray.config.errors import DataError
from myllm_ray.config.section import Section
from myllm_ray.config.sections import Field
from myllm_ray.data.byte_ranges import ByteRanges, version_of
from myllm_ray.data.formats import BadRow, TokenIds
from myllm_ray.data.shards import DocumentIndex, Shard, index_batch
from myllm_ray.data.token_file import NARROW, BitWriter

IN_PLACE = ("flat", "megatron", "arrow")
"""Kinds of units that are used in place."""
IGNORED = -100
"""Label of a token that is not trained on."""
_MASKS = ("labels", "completion_mask", "assistant_masks", "loss_mask")
_BLOCK = 2**22
"""Number of tokens that are read at once."""
_MEGATRON = b"MMIDIDX\x00\x00"
_MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class Tokens:
    """Reads the field `input_ids`, and at most one of `labels`, `completion_mask`, `assistant_masks`, `loss_mask`.

    A label is the id of the token, or -100 if it is not trained on. A mask is 0 for such a token. Without these fields,
    all tokens are trained on. The tokens are used as they are: none is added.
    """

    class Config(Section):
        """Layout of files of token ids that do not describe it themselves."""

        dtype: Literal["uint8", "uint16", "uint32", "int32", "int64", "uint64"] | None = Field(
            None,
            description="type of the ids in .npy and .bin files without a header; default: uint16 if the tokenizer has "
            "at most 65,536 tokens, otherwise uint32",
        )
        end_token: NonNegativeInt | Literal["none"] | None = Field(
            None,
            description="id that ends a document in .npy and .bin files; none: each file is one document; default: the "
            "end-of-text token of the tokenizer",
        )

    def __init__(self, config: Config):
        self.config = config

    def __call__(self, row: Mapping[str, Any]) -> TokenIds:
        ids = _integers(row, "input_ids", "iu")
        given = [name for name in _MASKS if row.get(name) is not None]
        if len(given) > 1:
            raise BadRow(f"the row has {' and '.join(given)}: give one of them")
        if not given:
            return TokenIds(ids, np.ones(len(ids), bool))
        values = _integers(row, given[0], "iub")
        if len(values) != len(ids):
            raise BadRow(f"field {given[0]!r} has {len(values)} entries, but there are {len(ids)} tokens")
        return TokenIds(ids, _trained(given[0], values, ids))


def _integers(row: Mapping[str, Any], name: str, kinds: str) -> np.ndarray:
    value = row.get(name)
    if value is None:
        raise BadRow(
            f"no field {name!r}; the row has {', '.join(sorted(map(str, row))) or 'no fields'} "
            "(data.*.fields renames columns)"
        )
    if not isinstance(value, (list, np.ndarray)):
        raise BadRow(f"field {name!r} is {type(value).__name__}, not a list of integers")
    try:
        found = np.asarray(value)
    except (ValueError, OverflowError):  # lists of different lengths
        found = np.asarray("")
    if not found.size:
        raise BadRow(f"field {name!r} is empty") if isinstance(value, list) and not value else BadRow(_not_ids(name))
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise BadRow(_not_ids(name))
    return found


def _not_ids(name: str) -> str:
    return f"field {name!r} is not a list of integers"


def _trained(name: str, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns which tokens (n,) are trained on, from the field with the given name.

    Raises:
        BadRow: A label is neither the id of its token nor -100.
    """
    if name != "labels":
        return values.astype(bool)
    trained: np.ndarray = values != IGNORED
    wrong = np.flatnonzero(trained & (values != ids))
    if len(wrong):
        at = int(wrong[0])
        raise BadRow(
            f"label {at} is {int(values[at])}, but the token is {int(ids[at])}: a label is the id of its own token, or "
            f"{IGNORED}; the model predicts it from the tokens before"
        )
    return trained


@dataclass
class _Layout:
    """Where the tokens of a file are.

    Attributes:
        path: Absolute path or URL.
        dtype: Type of the ids.
        runs: (first byte, number of tokens) of each run of consecutive tokens.
        ends: (documents,) number of tokens up to the end of each document; None: documents end with `end_token`.
        end_token: The id; None: the file is one document.
        masks: For each run, the name of the field and its values (n,), which say what is trained on.
        guessed: Whether `dtype` is not known from the file or the config.
    """

    path: str
    dtype: np.dtype[Any]
    runs: list[tuple[int, int]]
    ends: np.ndarray | None = None
    end_token: int | None = None
    masks: list[tuple[str, np.ndarray]] | None = None
    guessed: bool = False

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.runs)


def index_file(
    kind: str,
    path: str,
    config: Tokens.Config,
    fields: Mapping[str, str],
    tokenizer: Any,
    vocabulary: int,
    train_on_prompt: bool,
    bits: Path,
) -> pa.RecordBatch:
    """Returns the index (`shards.index_batch`) of a file that is used in place.

    Args:
        kind: One of `IN_PLACE`.
        path: Path or URL.
        config: Options of the format.
        fields: Columns of the data by their names in the format.
        tokenizer: The tokenizer; only its end-of-text token is used.
        vocabulary: A number above all token ids of the tokenizer.
        train_on_prompt: Whether masks are ignored.
        bits: File to which masks are written, if a token is not trained on.

    Raises:
        DataError: The file can't be read, is truncated, or has an id that the tokenizer does not have.
    """
    path = path if "://" in path else os.path.abspath(path)
    end = (
        tokenizer.eos_token_id if config.end_token is None else None if config.end_token == "none" else config.end_token
    )
    try:
        version = version_of(path)
        if kind == "flat":
            layout = _flat(path, version[0], config.dtype, vocabulary)
            layout.end_token = end
        else:
            layout = _megatron(path, version[0]) if kind == "megatron" else _arrow(path, fields, train_on_prompt)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error}") from None
    own = bits.with_name(f"{bits.name}.{uuid.uuid4().hex[:8]}.tmp")
    index, writer = DocumentIndex(), BitWriter(own)
    for ids, ends, trained in _checked(layout, version, vocabulary, index):
        values = ids.astype(np.int32)
        if trained is not None:
            writer.write(trained)
            values ^= trained.astype(np.int32) - 1  # `~id` if not trained on
        index.add(values, ends)
    writer.close()
    if layout.ends is None and layout.end_token is not None and layout.tokens and not len(index):
        raise DataError(
            f"{path}: no document ends, because the token {end} does not occur; set options.end_token of the format "
            "(none: the file is one document), and check options.dtype"
        )
    if writer.masked:
        os.replace(own, bits)
    shard = Shard(
        path, layout.dtype.name, layout.tokens, layout.runs, bits.name if writer.masked else None, version=version
    )
    return index_batch(index.finish(), shard, kind="tokens")


def _checked(
    layout: _Layout, version: tuple[int, str], vocabulary: int, index: DocumentIndex
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """Yields the ids (n,) of a file in blocks, the ends of documents in each, and which tokens (n,) are trained on."""
    ranges, size, done, ended = ByteRanges(), layout.dtype.itemsize, 0, 0
    for run, (byte, tokens) in enumerate(layout.runs):
        for first in range(0, tokens, _BLOCK):
            count = min(_BLOCK, tokens - first)
            data = ranges.read(layout.path, byte + first * size, count * size, version[0], version)
            ids = np.frombuffer(data, layout.dtype)
            if layout.guessed and not done and size == 2 and count >= 16 and not ids[1::2].any():
                raise DataError(
                    f"{layout.path}: every second id is 0, as in a file of uint32: set options.dtype of the format"
                )
            if layout.ends is not None:
                last = int(np.searchsorted(layout.ends, done + count, side="right"))
                ends, ended = layout.ends[ended:last] - done, last
            else:
                # No id is equal to -1.
                ends = np.flatnonzero(ids == (-1 if layout.end_token is None else layout.end_token)) + 1
            if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
                wrong = int(np.argmax((ids >= vocabulary) | (ids < 0)))
                number = len(index) + int(np.searchsorted(ends, wrong, side="right"))
                raise DataError(
                    f"{layout.path}: document {number} has the token id {int(ids[wrong])}, but the tokenizer has the "
                    f"ids 0 to {vocabulary - 1}: use the tokenizer of the data"
                    + (
                        f", or set options.dtype of the format if the ids are not {layout.dtype}"
                        if layout.guessed
                        else ""
                    )
                )
            trained = None
            if layout.masks is not None:
                name, mask = layout.masks[run]
                try:
                    trained = _trained(name, mask[first : first + count], ids)
                except BadRow as error:
                    raise DataError(f"{layout.path}: tokens from {done} on: {error}") from None
            yield ids, ends, trained
            done += count
    if layout.ends is not None and ended < len(layout.ends):  # empty documents in a file without tokens
        yield np.empty(0, layout.dtype), layout.ends[ended:] - done, None
    ranges.close()


def _flat(path: str, size: int, dtype: str | None, vocabulary: int) -> _Layout:
    found = np.dtype(dtype or ("uint16" if vocabulary <= NARROW else "uint32")).newbyteorder("<")
    with fsspec.open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            if size % found.itemsize:
                raise DataError(
                    f"{path} has {size} bytes, which is no multiple of {found.itemsize}: it is truncated, or its ids "
                    f"are not {found} (options.dtype of the format)"
                )
            return _Layout(path, found, [(0, size // found.itemsize)] if size else [], guessed=dtype is None)
        file.seek(0)
        try:
            read = np.lib.format.read_array_header_1_0
            if np.lib.format.read_magic(file) != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, stored = read(file)
        except ValueError as error:
            raise DataError(f"{path}: not a valid .npy file: {error}") from None
        first = file.tell()
    if len(shape) != 1 or stored.kind not in "iu" or stored.newbyteorder("<") != stored:
        raise DataError(
            f"{path}: the array must have one dimension and little-endian integers, not {shape} {stored.str}"
        )
    if dtype is not None and stored != found:
        raise DataError(f"{path}: the header says {stored}, but options.dtype of the format says {dtype}")
    if first + shape[0] * stored.itemsize != size:
        raise DataError(f"{path} has {size} bytes, but its header describes {first + shape[0] * stored.itemsize}")
    return _Layout(path, stored, [(first, shape[0])] if shape[0] else [])


def index_path(path: str) -> str:
    """Returns the path of the index of Megatron's file of tokens."""
    return path.removesuffix(".bin") + ".idx"


def _megatron(path: str, size: int) -> _Layout:
    index = index_path(path)
    whole = version_of(index)[0]
    with fsspec.open(index, "rb") as file:
        header = file.read(34)
        if len(header) < 34 or not header.startswith(_MEGATRON):
            raise DataError(f"{index}: not an index of Megatron-LM (MMIDIDX)")
        version, code, count, documents = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in _MEGATRON_DTYPES:
            raise DataError(f"{index}: version {version} with the type {code} of ids is not supported")
        expected = 34 + 12 * count + 8 * documents
        if whole != expected:
            more = " (an index with modes is not supported)" if whole == expected + count else ""
            raise DataError(f"{index} has {whole} bytes, but its header describes {expected}{more}")
        lengths = np.frombuffer(file.read(4 * count), "<i4")
        places = np.frombuffer(file.read(8 * count), "<i8")
    dtype = np.dtype(_MEGATRON_DTYPES[code]).newbyteorder("<")
    ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(places, (ends - lengths) * dtype.itemsize):
        raise DataError(f"{index}: the sequences do not follow each other in {path}; write the file again")
    described = int(ends[-1]) * dtype.itemsize if count else 0
    if size != described:
        raise DataError(
            f"{path} has {size} bytes, but its index describes {described}: it is truncated, or of another index"
        )
    return _Layout(path, dtype, [(0, int(ends[-1]))] if described else [], ends)


def _arrow(path: str, fields: Mapping[str, str], train_on_prompt: bool) -> _Layout:
    if "://" in path:
        raise DataError(f"{path}: a folder of datasets must be on a disk; from a URL, read Parquet (to_parquet)")
    runs: list[tuple[int, int]] = []
    ends: list[np.ndarray] = []
    masks: list[tuple[str, np.ndarray]] = []
    dtype, done = np.dtype("<i4"), 0
    try:
        with pa.memory_map(path) as mapped:
            file = mapped.read_buffer()
        for batch in pa.ipc.open_stream(file):
            columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
            names = {new: fields.get(new, new) for new in ("input_ids", *_MASKS)}
            column = columns.get(names["input_ids"])
            if column is None:
                raise DataError(f"{path}: no column {names['input_ids']!r}; it has {', '.join(columns)}")
            values, lengths = _list_column(path, names["input_ids"], column, "iu")
            dtype = values.dtype
            byte = values.__array_interface__["data"][0] - file.address
            if len(values) and not 0 <= byte <= file.size - values.nbytes:
                raise DataError(f"{path} is compressed, so it can't be used in place; write Parquet (to_parquet)")
            given = [name for name in _MASKS if names[name] in columns]
            if len(given) > 1:
                raise DataError(f"{path}: the columns {' and '.join(given)} both say what is trained on: remove one")
            if given and not train_on_prompt:
                mask, counts = _list_column(path, names[given[0]], columns[names[given[0]]], "iub")
                if not np.array_equal(counts, lengths):
                    raise DataError(f"{path}: {names[given[0]]!r} and {names['input_ids']!r} have different lengths")
                masks.append((given[0], mask))
            if len(values):
                runs.append((byte, len(values)))
            elif masks:
                masks.pop()
            ends.append(done + np.cumsum(lengths, dtype=np.int64))
            done += len(values)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a valid Arrow stream: {' '.join(str(error).split())[:200]}") from None
    return _Layout(path, dtype, runs, np.concatenate([np.empty(0, np.int64), *ends]), masks=masks or None)


def _list_column(path: str, name: str, column: pa.Array, kinds: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of a column of lists, without a copy, and the lengths of the lists."""
    listed = isinstance(column, (pa.ListArray, pa.LargeListArray, pa.FixedSizeListArray))
    if not listed or column.null_count or column.flatten().null_count:
        raise DataError(f"{path}: the column {name!r} must have lists of integers, without nulls, not {column.type}")
    flat = column.flatten()
    if pa.types.is_boolean(flat.type) and "b" in kinds:
        values = flat.to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(flat.type):
        values = flat.to_numpy(zero_copy_only=True)
    else:
        raise DataError(f"{path}: the column {name!r} must have lists of integers, without nulls, not {column.type}")
    return values, column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
