"""Data that has been tokenized is used in place: any layout gives the rows of the same tokens in the own store."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import MakeConfig

from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.sections import SourceSection
from myllm_ray.data import pretokenized, sources
from myllm_ray.data.evaluation_rows import digest
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import decode
from myllm_ray.data.tokenizer import byte_tokenizer

END = byte_tokenizer().eos_token_id
SIZE = len(byte_tokenizer())
Documents = list[np.ndarray]


def documents_of(store: TokenStore) -> Documents:
    return [store.read(number) for number in range(len(store))]


def flat(folder: Path, documents: Documents, dtype: str = "<u2") -> Path:
    for name, part in (("a.npy", documents[:3]), ("b.npy", documents[3:])):
        (folder / name).write_bytes(np.concatenate(part).astype(dtype).tobytes())
    return folder


def with_header(folder: Path, documents: Documents) -> Path:
    np.save(folder / "tokens.npy", np.concatenate(documents).astype("<i8"))
    return folder / "tokens.npy"


def megatron(folder: Path, documents: Documents, code: int = 8, dtype: str = "<u2") -> Path:
    lengths = np.asarray([len(d) for d in documents], "<i4")
    places = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    (folder / "text_document.bin").write_bytes(b"".join(d.astype(dtype).tobytes() for d in documents))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    numbers = np.arange(len(documents) + 1, dtype="<i8")
    (folder / "text_document.idx").write_bytes(index + lengths.tobytes() + places.tobytes() + numbers.tobytes())
    return folder / "text_document"


def columns(documents: Documents, mask: str | None) -> dict[str, list[list[int]]]:
    pairs = [decode(document) for document in documents]
    found = {"input_ids": [ids.tolist() for ids, _ in pairs]}
    if mask == "labels":
        found[mask] = [np.where(trained, ids, -100).tolist() for ids, trained in pairs]
    elif mask is not None:
        found[mask] = [trained.astype(int).tolist() for _, trained in pairs]
    return found


def of_datasets(folder: Path, documents: Documents, mask: str | None = None, **options: Any) -> Path:
    """Writes the folder that `Dataset.save_to_disk` writes."""
    table = pa.table(columns(documents, mask))
    halves = [table.slice(0, 5), table.slice(5)]
    for number, half in enumerate(halves):
        with pa.ipc.new_stream(folder / f"data-{number:05d}-of-00002.arrow", table.schema, **options) as writer:
            writer.write_table(half, max_chunksize=3)
    names = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (folder / "state.json").write_text(json.dumps({"_data_files": names, "_fingerprint": "x"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def parquet(folder: Path, documents: Documents, mask: str | None = None) -> Path:
    pq.write_table(pa.table(columns(documents, mask)), folder / "tokens.parquet", row_group_size=4)
    return folder / "tokens.parquet"


def jsonl(folder: Path, documents: Documents, mask: str | None = None) -> Path:
    table = pa.table(columns(documents, mask))
    (folder / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    return folder / "tokens.jsonl"


def same_rows(a: PreparedData, b: PreparedData) -> None:
    """Checks that two prepared runs have the same identity and the same first 24 rows, bit for bit."""
    assert a.identity == b.identity
    assert a.train.plan.store.duplicates == b.train.plan.store.duplicates
    for row in range(0, 24, 8):
        left, right = (p.train.build(0, row, 8) for p in (a, b))
        assert left.keys() == right.keys()
        assert all(np.array_equal(left[key], right[key]) for key in left)


def pretrain(make_config: MakeConfig, path: Path | str, *overrides: str, **top: Any) -> PreparedData:
    named = ("trainer=pretrain", f"data.train.path={path}", "data.train.format=tokens", "data.train.name=docs")
    return prepare(make_config(*named, *overrides, **top))


@pytest.fixture
def texts(make_config: MakeConfig, data_file: Path) -> PreparedData:
    fields = "data.train.fields={text: output}"
    named = (f"data.train.path={data_file}", "data.train.format=text", fields, "data.train.name=docs")
    return prepare(make_config("trainer=pretrain", *named))


@pytest.mark.parametrize("write", [flat, with_header, megatron, of_datasets, parquet, jsonl])
@pytest.mark.parametrize("block", [pretokenized._BLOCK, 7])
def test_every_layout_gives_the_same_rows(
    make_config: MakeConfig,
    texts: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path, Documents], Path],
    block: int,
) -> None:
    monkeypatch.setattr(pretokenized, "_BLOCK", block)
    (tmp_path / "tokens").mkdir()
    path = write(tmp_path / "tokens", documents_of(texts.train.plan.store))
    found = pretrain(make_config, path)
    same_rows(found, texts)
    store = found.train.plan.store
    copies = [file for file in store.folder.rglob("*") if file.name.startswith(("tokens-", "trained-"))]
    assert bool(copies) == (write in (parquet, jsonl)), "the tokens of other files have no copy"


@pytest.mark.parametrize("mask", ["labels", "completion_mask", "assistant_masks"])
@pytest.mark.parametrize("write", [of_datasets, parquet, jsonl])
def test_masks_of_sft(make_config: MakeConfig, tmp_path: Path, write: Callable[..., Path], mask: str) -> None:
    own = prepare(make_config("data.train.name=docs"))
    (tmp_path / "tokens").mkdir()
    path = write(tmp_path / "tokens", documents_of(own.train.plan.store), mask)
    named = (f"data.train.path={path}", "data.train.format=tokens", "data.train.name=docs")
    same_rows(prepare(make_config(*named)), own)
    whole = prepare(make_config(*named, "sft.train_on_prompt=true")).train.plan.store
    assert whole.targets(np.arange(len(whole))).tolist() == [len(d) - 1 for d in documents_of(whole)]


def test_a_limit_and_renamed_columns(make_config: MakeConfig, texts: PreparedData, tmp_path: Path) -> None:
    documents = documents_of(texts.train.plan.store)
    whole = of_datasets(tmp_path, documents)
    for number in range(2):
        file = whole / f"data-{number:05d}-of-00002.arrow"
        table = pa.ipc.open_stream(file.read_bytes()).read_all().rename_columns(["ids"])
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    found = pretrain(make_config, whole, "data.train.fields={input_ids: ids}", "data.train.limit=7").train.plan.store
    assert [d.tolist() for d in documents_of(found)] == [d.tolist() for d in documents[:7]]


def test_documents_of_files_without_ends(make_config: MakeConfig, tmp_path: Path) -> None:
    """A file may be one document; one that does not end with the end token still ends with the file."""
    ids = np.arange(60, dtype="<u4")
    ids[20] = ids[40] = END
    (tmp_path / "a.bin").write_bytes(ids.tobytes())
    options = "data.train.options={dtype: uint32, end_token: %s}"
    lengths = {}
    for end in ("none", str(END), "30"):
        store = pretrain(make_config, tmp_path / "a.bin", options % end, "data.validation=null").train.plan.store
        lengths[end] = [len(d) for d in documents_of(store)]
    assert lengths == {"none": [60], str(END): [21, 20, 19], "30": [31, 29]}


def test_empty_documents_keep_their_numbers(make_config: MakeConfig, tmp_path: Path) -> None:
    documents = [np.asarray(d, np.int32) for d in ([], [1, 2], [], [3], [], [])] * 2
    for write in (megatron, of_datasets):
        folder = tmp_path / write.__name__
        folder.mkdir()
        store = pretrain(make_config, write(folder, documents), "data.validation=null").train.plan.store
        assert [d.tolist() for d in documents_of(store)] == [d.tolist() for d in documents]


def test_datasets_writes_such_a_folder(make_config: MakeConfig, texts: PreparedData, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    documents = documents_of(texts.train.plan.store)
    found = datasets.Dataset.from_dict({"input_ids": [d.tolist() for d in documents]})
    found.save_to_disk(tmp_path / "one", num_shards=2)
    same_rows(pretrain(make_config, tmp_path / "one"), texts)
    datasets.DatasetDict({"train": found, "test": found}).save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match=r"has several splits: give the folder of one of them \(train, test\)"):
        pretrain(make_config, tmp_path / "several")


def test_a_changed_file_is_noticed(make_config: MakeConfig, texts: PreparedData, tmp_path: Path) -> None:
    documents = documents_of(texts.train.plan.store)
    path = megatron(tmp_path, documents)
    first = pretrain(make_config, path)
    assert pretrain(make_config, f"{path}.idx").identity == first.identity
    file = path.with_suffix(".bin")
    changed = np.frombuffer(file.read_bytes(), "<u2").copy()
    changed[0] += 1
    file.write_bytes(changed.tobytes())
    with pytest.raises(DataError, match=r"text_document.bin has changed since the data was prepared"):
        first.train.build(0, 0, 8)
    again = pretrain(make_config, path)
    assert again.identity["tokens"] != first.identity["tokens"]
    source = SourceSection(path=str(path), format="tokens")
    before = digest(source, "data")
    (tmp_path / "text_document.idx").write_bytes(b"x")
    assert digest(source, "data") != before, "the index is part of the data"


TABLE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a.npy", lambda p: p.write_bytes(b"abc"), r"has 3 bytes, which is no multiple of 2: it is truncated, or its ids"),
    ("a.npy", lambda p: np.save(p, np.ones((2, 2), np.int32)), "must have one dimension and little-endian integers"),
    ("a.npy", lambda p: np.save(p, np.ones(4)), r"little-endian integers, not \(4,\) <f8"),
    ("a.npy", lambda p: np.save(p, np.ones(4, ">i4")), "little-endian integers"),
    ("a.npy", lambda p: (np.save(p, np.ones(9, "<i4")), cut(p)), "bytes, but its header describes"),
    ("a.npy", lambda p: p.write_bytes(b"\x93NUMPY\x09"), "not a valid .npy file"),
    ("a.bin", lambda p: p.write_bytes(np.ones(9, "<u2").tobytes()), f"the token {END} does not occur; set options"),
    (
        "a.bin",
        lambda p: p.write_bytes(np.arange(1, 40, dtype="<u4").tobytes()),
        "every second id is 0, as in a file of u",
    ),
    (
        "a.bin",
        lambda p: p.write_bytes(np.asarray([1, END, 3, 4, 999], "<u2").tobytes()),
        rf"a.bin: document 1 has the token id 999, but the tokenizer has the ids 0 to {SIZE - 1}: use the tokenizer",
    ),
    ("a.npy", lambda p: np.save(p, np.asarray([-1, END])), r"document 0 has the token id -1"),
    ("t.bin", lambda p: (megatron(p.parent, DOCUMENTS), cut(p.parent / "text_document.bin", p)), "is truncated, or of"),
    ("t.idx", lambda p: (p.write_bytes(b"x" * 99), p.with_suffix(".bin").touch()), "not an index of Megatron-LM"),
    ("text_document.idx", lambda p: (megatron(p.parent, DOCUMENTS), cut(p)), "but its header describes"),
    ("text_document.idx", lambda p: (megatron(p.parent, DOCUMENTS), add(p, 2)), "an index with modes is not supported"),
    ("text_document.idx", lambda p: megatron(p.parent, DOCUMENTS, code=7), "the type 7 of ids is not supported"),
    ("a.arrow", lambda p: p.write_bytes(b"x" * 99), "not a valid Arrow stream"),
    ("a.arrow", lambda p: stream(p, {"ids": [[1]]}), "no column 'input_ids'; it has ids"),
    ("a.arrow", lambda p: stream(p, {"input_ids": [["a"]]}), "must have lists of integers, without nulls"),
    ("a.arrow", lambda p: stream(p, {"input_ids": [[1, None]]}), "must have lists of integers, without nulls"),
    ("a.arrow", lambda p: stream(p, {"input_ids": [[1]], "labels": [[1, 2]]}), "have different lengths"),
    ("a.arrow", lambda p: stream(p, {"input_ids": [[1, 2]], "labels": [[1, 3]]}), "label 1 is 3, but the token is 2"),
    (
        "a.arrow",
        lambda p: stream(p, {"input_ids": [[1]], "labels": [[1]], "completion_mask": [[1]]}),
        "the columns labels and completion_mask both say",
    ),
    ("a.jsonl", lambda p: p.write_text('{"text": "x"}'), r"a.jsonl:1: no field 'input_ids'; the row has text"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": []}'), "field 'input_ids' is empty"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [1.5]}'), "field 'input_ids' is not a list of integers"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [[1], [2, 3]]}'), "field 'input_ids' is not a list of integers"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [true]}'), "field 'input_ids' is not a list of integers"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": "1 2"}'), "field 'input_ids' is str, not a list of integers"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [9999]}'), "the token id 9999 is not one of the tokenizer"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [-5]}'), "the token id -5 is not one of the tokenizer"),
    ("a.jsonl", lambda p: p.write_text('{"input_ids": [1], "labels": [2]}'), "label 0 is 2, but the token is 1"),
    (
        "a.jsonl",
        lambda p: p.write_text('{"input_ids": [1], "labels": [1, 2]}'),
        "has 2 entries, but there are 1 tokens",
    ),
    (
        "a.jsonl",
        lambda p: p.write_text('{"input_ids": [1], "labels": [1], "loss_mask": [1]}'),
        "the row has labels and loss_mask: give one of them",
    ),
    ("a.txt", lambda p: p.write_text("x"), "unsupported file type; supported types are .jsonl"),
]
DOCUMENTS = [np.asarray([1, 2, END]), np.asarray([3, END])]


def cut(path: Path, target: Path | None = None) -> None:
    """Removes the last byte of a file; Megatron's file gets the name of `target`."""
    path.write_bytes(path.read_bytes()[:-1])
    if target is not None:
        path.rename(target)
        path.with_suffix(".idx").rename(target.with_suffix(".idx"))


def add(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes() + bytes(count))


def stream(path: Path, values: dict[str, list[Any]], **options: Any) -> None:
    table = pa.table(values)
    with pa.ipc.new_stream(path, table.schema, **options) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("name", "write", "message"), TABLE)
def test_a_wrong_file_is_one_line(
    make_config: MakeConfig, tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(DataError, match=message) as found:
        pretrain(make_config, tmp_path / name, "data.validation=null")
    assert name in str(found.value)


def test_what_cannot_be_used_in_place(make_config: MakeConfig, tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow", {"input_ids": [[1] * 1000]}, options=pa.ipc.IpcWriteOptions(compression="lz4"))
    with pytest.raises(DataError, match="is compressed, so it can't be used in place"):
        pretrain(make_config, tmp_path / "a.arrow")
    (tmp_path / "d").mkdir()
    folder = of_datasets(tmp_path / "d", DOCUMENTS)
    with pytest.raises(
        DataError, match=r"is a folder of datasets \(save_to_disk\): with token ids, set format: tokens"
    ):
        prepare(make_config(f"data.train.path={folder}"))
    with pytest.raises(DataError, match=r"unsupported file type; .*; for token ids, set format: tokens"):
        prepare(make_config(f"data.train.path={folder}/data-00000-of-00002.arrow"))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_indices_data_files": [{"filename": "x"}]}))
    with pytest.raises(DataError, match="save it again after flatten_indices"):
        pretrain(make_config, folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tokenizer={train: bpe, vocab_size: 300}", "tokenizer.train: the data has token ids and no text"),
        ("data.train.options={dtype: float32}", "data.train.options: dtype: input should be"),
        ("data.train.options={end_token: -1}", "data.train.options: end_token: input should be"),
        ("data.train.options={size: 4}", "size"),
    ],
)
def test_options_are_checked(make_config: MakeConfig, tmp_path: Path, override: str, message: str) -> None:
    flat(tmp_path, DOCUMENTS * 3)
    with pytest.raises(ConfigError, match=message):
        pretrain(make_config, tmp_path / "a.npy", override)


def test_units_of_a_folder(tmp_path: Path) -> None:
    """A folder may have several layouts; an index is read with its file."""
    flat(tmp_path, DOCUMENTS * 3)
    megatron(tmp_path, DOCUMENTS)
    parquet(tmp_path, DOCUMENTS)
    units = sources.list_units(SourceSection(path=str(tmp_path), format="tokens"), "k")
    kinds = {Path(u.path).name: u.kind for u in units}
    assert kinds == {"a.npy": "flat", "b.npy": "flat", "text_document.bin": "megatron", "tokens.parquet": "parquet"}
    names = [Path(path).name for path in sources.files_of(units)]
    assert names == ["a.npy", "b.npy", "text_document.bin", "text_document.idx", "tokens.parquet"]
