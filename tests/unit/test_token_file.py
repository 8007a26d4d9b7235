"""The files of a token store: 16 and 32 bits per token give the same documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import MakeConfig
from hypothesis import given
from hypothesis import strategies as st

from myllm_ray.config.errors import DataError
from myllm_ray.data import store as storing
from myllm_ray.data.prepare import prepare
from myllm_ray.data.store import TokenStore, write_store
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
    sources = [("a", [batch([], ""), batch(documents[:2], kind), batch(documents[2:], kind)], None)]
    for name, size in (("wide", None), ("other", vocabulary)):
        write_store(tmp_path / name, sources, {}, size)  # type: ignore[arg-type]
    wide, other = TokenStore(tmp_path / "wide"), TokenStore(tmp_path / "other")
    assert other.meta["sources"][0]["dtype"] == dtype
    assert other.content_hash == wide.content_hash
    assert other.targets(np.arange(4)).tolist() == wide.targets(np.arange(4)).tolist()
    assert [other.read(i).tolist() for i in range(4)] == documents
    assert other.read(0, 1, 2).tolist() == [65535, ~0]


def test_a_store_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [("a", [batch([[1, ~2], [3]])], None)], {})
    meta = json.loads((tmp_path / "s/meta.json").read_text())
    del meta["sources"][0]["dtype"]
    (tmp_path / "s/meta.json").write_text(json.dumps(meta))
    assert [TokenStore(tmp_path / "s").read(i).tolist() for i in range(2)] == [[1, ~2], [3]]


def test_a_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [("a", [batch([[1, ~2, 3, 4], [3]])], None)], {}, 100)
    for name, size in (("trained-0.bits", 0), ("tokens-0.u16", 6)):
        with open(tmp_path / "s" / name, "r+b") as file:
            file.truncate(size)
        with pytest.raises(DataError, match=r"tokens-0.u16 is shorter than its index; delete .*/s"):
            TokenStore(tmp_path / "s").read(1)


def test_an_id_above_the_vocabulary_is_refused(tmp_path: Path) -> None:
    for token in (2**16, ~(2**16)):
        with pytest.raises(DataError, match="token id 65536"):
            write_store(tmp_path / "s", [("a", [batch([[1, token]])], None)], {}, 2**16)
    assert list(tmp_path.iterdir()) == []


def test_micro_batches_are_the_same(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = prepare(make_config(f"data.cache={tmp_path / 'narrow'}"))
    monkeypatch.setattr(storing, "NARROW", 0)
    wide = prepare(make_config(f"data.cache={tmp_path / 'wide'}"))
    assert [p.train.plan.store.meta["sources"][0]["dtype"] for p in (narrow, wide)] == ["uint16", "int32"]
    assert narrow.identity == wide.identity
    for row in range(0, 24, 8):
        a, b = (p.train.build(0, row, 8) for p in (narrow, wide))
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in a.items()} == {
            k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in b.items()
        }
