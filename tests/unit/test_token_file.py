"""The files of a token store: 16 and 32 bits per token, and any cut into shards, give the same documents."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import MakeConfig, instruction_rows
from hypothesis import given
from hypothesis import strategies as st

from myllm_ray.config.errors import DataError
from myllm_ray.data import byte_ranges, shard_tasks, shards, sources, store_writer
from myllm_ray.data.byte_ranges import OPEN_FILES
from myllm_ray.data.prepare import prepare
from myllm_ray.data.shards import write_shard
from myllm_ray.data.store import TokenStore
from myllm_ray.data.store_writer import SourceShards, write_store
from myllm_ray.data.token_file import TokenReader, TokenWriter

IDS = st.integers(0, 2**16 - 1)
TOKENS = st.lists(IDS | IDS.map(lambda token: ~token), max_size=30)


@given(st.lists(TOKENS | st.lists(IDS, max_size=30), max_size=6), st.booleans(), st.data())
def test_ranges_are_as_written(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], narrow: bool, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    whole = [value for piece in pieces for value in piece]
    with TokenWriter(folder, 3, narrow) as writer:
        for piece in pieces:
            writer.write(np.asarray(piece, np.int32))
    reader = TokenReader(folder, 3, writer.described)
    assert reader.read(0, len(whole)).tolist() == whole
    first = data.draw(st.integers(0, len(whole)))
    count = data.draw(st.integers(0, len(whole) - first))
    read = reader.read(first, count)
    assert read.tolist() == whole[first : first + count]
    assert read.dtype == np.int32
    reader.close()
    masked = narrow and any(value < 0 for value in whole)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    bits = {"trained-3.bits": -(-len(whole) // 8)} if masked else {}
    assert sizes == ({"tokens-3.u16": 2 * len(whole), **bits} if narrow else {"tokens-3.bin": 4 * len(whole)})


def test_the_first_token_without_training_may_be_late(tmp_path: Path) -> None:
    values = np.arange(2**20 + 13, dtype=np.int32) % 2**16
    with TokenWriter(tmp_path, 0, narrow=True) as writer:
        writer.write(values)
        writer.write(np.asarray([~5, 6], np.int32))
    reader = TokenReader(tmp_path, 0, writer.described)
    assert (reader.read(0, len(values)) == values).all()
    assert reader.read(len(values), 2).tolist() == [~5, 6]
    reader.close()


def batch(documents: list[list[int]], kind: str = "tokens") -> pa.RecordBatch:
    """Returns tokenized documents."""
    column = pa.array(documents, pa.list_(pa.int32()))
    return pa.record_batch([column], schema=pa.schema([pa.field("tokens", column.type)], metadata={"kind": kind}))


def written(
    folder: Path, pieces: list[list[pa.RecordBatch]], vocabulary: int | None = None, limit: int | None = None
) -> TokenStore:
    """Writes a store with one source, which has a shard for each piece."""

    def write(beside: Path, index: int) -> Iterator[pa.RecordBatch]:
        for number, batches in enumerate(pieces):
            yield write_shard(beside, f"{index}-{number:05d}", "a", batches, vocabulary, None)

    write_store(folder, [SourceShards("a", write, limit)], {})
    return TokenStore(folder)


def legacy(store: TokenStore, folder: Path) -> TokenStore:
    """Writes the same store as an earlier version did: one file of tokens per source."""
    shutil.copytree(store.folder, folder)
    meta = json.loads((folder / "meta.json").read_text())
    source = meta["sources"][0]
    with TokenWriter(folder, 0, source.pop("shards")[0]["dtype"] == "uint16") as writer:
        for number in range(len(store)):
            writer.write(store.read(number))
    source.update(writer.described)
    (folder / "meta.json").write_text(json.dumps(meta))
    for path in (*folder.glob("tokens-0-*"), *folder.glob("trained-0-*"), folder / "runs-0.npy"):
        path.unlink()
    return TokenStore(folder)


@pytest.mark.parametrize(
    ("kind", "vocabulary", "dtype"),
    [
        ("tokens", 2**16, "uint16"),
        ("tokens", 2**16 + 1, "int32"),
        ("tokens", None, "int32"),
        ("pairs", 300, "int32"),
    ],
)
def test_the_width_does_not_change_the_content(tmp_path: Path, kind: str, vocabulary: int | None, dtype: str) -> None:
    documents = [[1, 65535, ~0, 7], [], [~65535], [4, 5]]
    batches = [batch([], ""), batch(documents[:2], kind), batch(documents[2:], kind)]
    wide, other = (written(tmp_path / str(size), [batches], size) for size in (None, vocabulary or 2**20))
    assert other.meta["sources"][0]["shards"][0]["dtype"] == dtype
    assert other.content_hash == wide.content_hash
    assert other.targets(np.arange(4)).tolist() == wide.targets(np.arange(4)).tolist() == [2, 0, 0, 1]
    assert [other.read(i).tolist() for i in range(4)] == documents
    assert other.read(0, 1, 2).tolist() == [65535, ~0]


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    documents = [[1, ~2], [3], [], [~4, 5, 6]]
    for vocabulary in (100, 2**20):
        store = written(tmp_path / f"s{vocabulary}", [[batch(documents[:2])], [batch(documents[2:])]], vocabulary)
        old = legacy(store, tmp_path / f"old{vocabulary}")
        assert [old.read(i).tolist() for i in range(4)] == documents
        assert old.read(3, 1, 2).tolist() == [5, 6]
    (tmp_path / "old100/tokens-0.u16").write_bytes(b"")
    with pytest.raises(DataError, match=r"tokens-0.u16 is shorter than its index; delete .*/old100"):
        TokenStore(tmp_path / "old100").read(1)


def test_the_content_hash_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """A run that was started by an earlier version resumes after its cache was deleted."""
    documents = [[1, ~2], [3], [], [~4, 5, 6]]
    values = np.concatenate([np.asarray(d, np.int32) for d in documents])
    offsets = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    expected = hashlib.sha256(values.tobytes() + offsets.tobytes()).hexdigest()[:32]
    assert written(tmp_path / "s", [[batch(documents)]], 100).content_hash == expected


@pytest.mark.parametrize("most", [store_writer.HASHED_TOKENS, 3])
def test_the_cut_into_shards_does_not_change_the_store(
    tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_writer, "HASHED_TOKENS", most)
    documents = [[1, ~2], [3], [], [~4, 5, 6], [3], [7] * 20]
    cuts = [[0, 6], [0, 1, 2, 3, 4, 5, 6], [0, 0, 4, 4, 6]]
    stores = [
        written(tmp_path / str(i), [[batch(documents[a:b])] for a, b in itertools.pairwise(cut)], 100)
        for i, cut in enumerate(cuts)
    ]
    numbers = np.arange(len(documents))
    for store in stores:
        assert [store.read(i).tolist() for i in range(len(store))] == documents
        assert store.targets(numbers).tolist() == stores[0].targets(numbers).tolist()
        assert (store.content_hash, store.duplicates, store.tokens) == (stores[0].content_hash, 1, 27)
    moved = [[1, ~2, 3], [], [~4, 5, 6], [3], [7] * 20, []]
    assert written(tmp_path / "moved", [[batch(moved)]], 100).content_hash != stores[0].content_hash
    other = [*documents[:-1], [7] * 19 + [8]]
    assert written(tmp_path / "other", [[batch(other)]], 100).content_hash != stores[0].content_hash


def test_a_limit_ends_within_a_shard(tmp_path: Path) -> None:
    documents = [[1, ~2], [3], [4, 5, 6], [7]]
    limited = written(tmp_path / "limited", [[batch(documents[:1])], [batch(documents[1:])]], 100, limit=2)
    whole = written(tmp_path / "whole", [[batch(documents[:2])]], 100)
    assert limited.content_hash == whole.content_hash
    assert (len(limited), limited.tokens) == (2, 3)


def test_documents_in_pieces_have_the_same_index() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(0, 5, 8)
        values = rng.integers(-5, 5, int(lengths.sum())).astype(np.int32)
        ends = np.cumsum(lengths)
        whole, pieces = shards.DocumentIndex(), shards.DocumentIndex()
        whole.add(values, ends)
        cut = int(rng.integers(0, len(values) + 1))
        before = ends[ends <= cut]
        pieces.add(values[:cut], before)
        pieces.add(values[cut:], ends[len(before) :] - cut)
        for a, b in zip(whole.finish(), pieces.finish(), strict=True):
            assert a.tolist() == b.tolist()
        documents = np.split(values, ends[:-1])
        assert whole.finish()[1].tolist() == [int((document[1:] >= 0).sum()) for document in documents]


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    written(tmp_path / "s", [[batch([[1, ~2, 3, 4], [3]])]], 100)
    for name, size in (("trained-0-00000.bits", 0), ("tokens-0-00000.u16", 6)):
        with open(tmp_path / "s" / name, "r+b") as file:
            file.truncate(size)
        with pytest.raises(DataError, match=rf"{name} is shorter than its index; delete .*/s, and the next run"):
            TokenStore(tmp_path / "s").read(1)


def test_an_id_above_the_vocabulary_is_refused(tmp_path: Path) -> None:
    for token in (2**16, ~(2**16)):
        with pytest.raises(DataError, match="token id 65536"):
            written(tmp_path / "s", [[batch([[1, token]])]], 2**16)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_task_cannot_write(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"node .* can't write .*/gone: No such file.*; all nodes that tokenize must"):
        write_shard(tmp_path / "gone", "0-00000", "a", [batch([[1]])], 100, None)


def test_many_shards_have_few_open_files(tmp_path: Path) -> None:
    store = written(tmp_path / "s", [[batch([[i, ~i]])] for i in range(100)], 100)
    store.read(0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(2):
        assert [store.read(i).tolist() for i in range(100)] == [[i, ~i] for i in range(100)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before <= OPEN_FILES


def test_micro_batches_are_the_same(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in instruction_rows())
    (tmp_path / "rows.jsonl").write_text(rows)
    path = f"data.train.path={tmp_path / 'rows.jsonl'}"
    narrow = prepare(make_config(path, f"data.cache={tmp_path / 'narrow'}"))
    monkeypatch.setattr(shards, "NARROW", 0)
    monkeypatch.setattr(shard_tasks, "_UNITS", 1)
    monkeypatch.setattr(sources, "RANGE_BYTES", 1000)
    wide = prepare(make_config(path, f"data.cache={tmp_path / 'wide'}"))
    first, second = (p.train.plan.store.meta["sources"][0]["shards"] for p in (narrow, wide))
    assert (len(first), first[0]["dtype"]) == (1, "uint16")
    assert len(second) > 4
    assert {shard["dtype"] for shard in second} == {"int32"}
    assert narrow.identity == wide.identity
    for row in range(0, 24, 8):
        a, b = (p.train.build(0, row, 8) for p in (narrow, wide))
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in a.items()} == {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in b.items()
        }


def test_several_threads_read_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_ranges, "OPEN_FILES", 2)
    store = written(tmp_path / "s", [[batch([[i, ~i]])] for i in range(20)], 100)

    def read(seed: int) -> bool:
        numbers = np.random.default_rng(seed).integers(0, 20, 500).tolist()
        return all(store.read(i).tolist() == [i, ~i] for i in numbers)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
