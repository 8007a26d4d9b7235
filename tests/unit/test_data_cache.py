"""Prepared data at a URL: shards are uploaded, other nodes read them through a bounded local folder."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from conftest import MakeConfig, comparable, instruction_rows, ledger
from s3_server import environment_of, s3_server

from myllm_ray import train
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.data import byte_ranges, shard_tasks, sources
from myllm_ray.data.cache import DataCache
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.data.tokenizer import open_tokenizer

URL = "memory://bucket/data"


@pytest.fixture(autouse=True)
def empty_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "RANGE_BYTES", 1000)
    monkeypatch.setattr(shard_tasks, "_UNITS", 1)
    monkeypatch.setattr(byte_ranges, "BLOCK", 100)
    storage = fsspec.filesystem("memory")
    if storage.exists("/bucket"):
        storage.rm("/bucket", recursive=True)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows()))
    return f"data.train.path={path}"


def at_url(tmp_path: Path, node: str, url: str = URL) -> tuple[str, str]:
    return f"data.cache={url}", f"data.local_cache={tmp_path / node}"


def refuse(*_: Any) -> Any:
    raise AssertionError("nothing is tokenized")


def micros(prepared: PreparedData) -> list[Any]:
    return [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in prepared.train.build(0, row, 8).items()}
        for row in range(0, 24, 8)
    ]


def test_another_node_reads_the_same_data(make_config: MakeConfig, rows: str, tmp_path: Path) -> None:
    own = prepare(make_config(rows))
    first = prepare(make_config(rows, *at_url(tmp_path, "one")))
    assert len(first.train.plan.store.meta["sources"][0]["shards"]) > 4
    assert first.identity == own.identity
    assert micros(first) == micros(own)
    assert not [p for p in (tmp_path / "one").rglob("*") if p.name.startswith(("tokens-0", "trained-0"))]
    second = prepare(make_config(rows, *at_url(tmp_path, "two")), map_units=refuse)
    assert second.identity == own.identity
    assert micros(second) == micros(own)


def test_a_worker_on_a_node_without_the_folder(make_config: MakeConfig, rows: str, tmp_path: Path) -> None:
    first = prepare(make_config(rows, *at_url(tmp_path, "one")))
    expected, pickled = micros(first), pickle.dumps(first)
    shutil.rmtree(tmp_path / "one")
    there: PreparedData = pickle.loads(pickled)
    assert micros(there) == expected
    assert open_tokenizer(there.tokenizer_folder).eos_token_id is not None


def test_the_local_copies_are_bounded(make_config: MakeConfig, rows: str, tmp_path: Path) -> None:
    small = prepare(make_config(rows, *at_url(tmp_path, "one"), "data.local_cache_gb=1e-6"))
    assert micros(small) == micros(prepare(make_config(rows)))
    copies = list((tmp_path / "one/blocks").iterdir())
    assert 0 < sum(path.stat().st_size for path in copies) <= 1000
    assert all(len(path.name) < 60 for path in copies), "no partial copies"


def test_a_store_that_was_replaced_or_removed(make_config: MakeConfig, rows: str, tmp_path: Path) -> None:
    """The local index follows the store at the URL."""
    first = prepare(make_config(rows, *at_url(tmp_path, "one")))
    expected, storage = micros(first), fsspec.filesystem("memory")
    storage.rm("/bucket", recursive=True)
    assert micros(prepare(make_config(rows, *at_url(tmp_path, "two")))) == expected
    again = prepare(make_config(rows, *at_url(tmp_path, "one")), map_units=refuse)
    assert micros(again) == expected
    # Without its mark a store is incomplete, for example because its driver was killed.
    for path in storage.find("/bucket"):
        if path.endswith(".complete"):
            storage.rm_file(path)
    with pytest.raises(AssertionError, match="nothing is tokenized"):
        prepare(make_config(rows, *at_url(tmp_path, "two")), map_units=refuse)
    assert micros(prepare(make_config(rows, *at_url(tmp_path, "two")))) == expected


def test_short_and_failing_answers_are_repeated(
    make_config: MakeConfig, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = micros(prepare(make_config(rows)))
    storage, count = type(fsspec.filesystem("memory")), 0
    read = storage.cat_file

    def fails(self: Any, path: str, start: int | None = None, end: int | None = None, **named: Any) -> bytes:
        nonlocal count
        count += 1
        if start is not None and count % 3 == 0:
            raise TimeoutError("503 slow down")
        found: bytes = read(self, path, start, end, **named)
        return found[: len(found) // 2] if start is not None and count % 5 == 0 else found

    monkeypatch.setattr(storage, "cat_file", fails)
    monkeypatch.setattr("myllm_ray.common.remote.FIRST_WAIT_SECONDS", 0.001)
    assert micros(prepare(make_config(rows, *at_url(tmp_path, "one")))) == expected
    assert count > 20


def test_a_run_with_its_data_at_a_url(make_config: MakeConfig, rows: str, tmp_path: Path) -> None:
    whole = train(make_config(rows, "run.name=whole")).folder
    run = train(make_config(rows, "run.name=remote", *at_url(tmp_path, "one"))).folder
    assert ledger(run) == ledger(whole)
    assert comparable(run) == comparable(whole)


def test_tokenized_data_at_a_url_is_read_through_the_local_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    storage = fsspec.filesystem("memory")
    ids = np.random.default_rng(0).integers(0, 200, 4000).astype("<u2")
    ids[::100] = 200
    storage.pipe_file("/bucket/ids.npy", ids.tobytes())
    (tmp_path / "ids.npy").write_bytes(ids.tobytes())
    named = ("trainer=pretrain", "data.train.format=tokens", "data.train.options={end_token: 200}")
    found = {}
    for path in ("memory://bucket/ids.npy", str(tmp_path / "ids.npy")):
        config = make_config(*named, f"data.train.path={path}", f"data.local_cache={tmp_path / 'local'}")
        found[path] = micros(prepare(config))
    assert len({str(rows) for rows in found.values()}) == 1
    assert list((tmp_path / "local/blocks").iterdir())


def test_what_is_refused(make_config: MakeConfig, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.cache: 'nowhere://x/.*': Protocol not known"):
        prepare(make_config(rows, *at_url(tmp_path, "one", "nowhere://x")))
    with pytest.raises(ConfigError, match="local_cache_gb"):
        make_config("data.local_cache_gb=0")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden for https://user:hunter2@host/")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", denied)
    with pytest.raises(DataError, match=r"data\.cache: .* can't be written: PermissionError: 403 .*//\*\*\*@host/"):
        prepare(make_config(rows, *at_url(tmp_path, "one")))


def test_a_file_url_is_a_shared_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(f"data.cache=file://{tmp_path}/shared")
    assert DataCache.of(config).folder == tmp_path / "shared"
    assert prepare(config).train.plan.store.folder.parent == tmp_path / "shared"


@pytest.mark.promise
@pytest.mark.timeout(300)
def test_the_same_rows_from_a_faulty_server(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_ranges, "BLOCK", 500)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in instruction_rows()))
    ids = np.random.default_rng(0).integers(0, 200, 4000).astype("<u2")
    ids[::100] = 200
    (tmp_path / "ids.npy").write_bytes(ids.tobytes())
    named = ("trainer=pretrain", "data.train.format=tokens", "data.train.options={end_token: 200}")
    rows = micros(prepare(make_config(f"data.train.path={path}")))
    tokens = micros(prepare(make_config(*named, f"data.train.path={tmp_path / 'ids.npy'}")))
    with s3_server(tmp_path) as proxy:
        for key, value in environment_of(proxy).items():
            monkeypatch.setenv(key, value)
        proxy.share = 0.1
        on_s3 = at_url(tmp_path, "node", "s3://bucket/data")
        for refused in (False, True):  # written, then read by another node
            config = make_config(f"data.train.path={path}", *on_s3)
            found = prepare(config, map_units=refuse) if refused else prepare(config)
            assert micros(found) == rows
            shutil.rmtree(tmp_path / "node")
        storage = byte_ranges.url_to_fs("s3://bucket/ids.npy")[0]
        proxy.share = 0.0
        storage.put_file(str(tmp_path / "ids.npy"), "bucket/ids.npy")
        proxy.share = 0.1
        config = make_config(*named, "data.train.path=s3://bucket/ids.npy", *on_s3)
        assert micros(prepare(config)) == tokens
        assert sum(proxy.faults.values()) > 5
