"""The checkpoint mirror at a URL: uploaded with every save, with the same retention, fetched if the folder is gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import MakeConfig, comparable, ledger

from myllm_ray import train
from myllm_ray.config import CheckpointError, ConfigError
from myllm_ray.engine.checkpointing.remote_store import RemoteCheckpointStore

URL = "memory://bucket/runs"
COMMON = ("run.max_steps=9", "checkpoint.every_steps=2", f"checkpoint.mirror={URL}", "checkpoint.resume=auto")


@pytest.fixture(autouse=True)
def empty_bucket() -> None:
    storage = fsspec.filesystem("memory")
    if storage.exists("/bucket"):
        storage.rm("/bucket", recursive=True)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_resumes_from_its_mirror(make_config: MakeConfig, background: str) -> None:
    whole = train(make_config("run.name=whole", *COMMON)).folder
    overrides = (*COMMON, f"checkpoint.async={background}", "run.name=moved")
    folder = Path(train(make_config(*overrides, callbacks=["jsonl", {"helpers:StopAt": {"step": 5}}])).folder)
    mirror = RemoteCheckpointStore(f"{URL}/moved")
    assert mirror.names() == ["step-00000004", "step-00000005"], "thinned out like the folder"
    fsspec.filesystem("memory").pipe("/bucket/runs/moved/step-00000008/half", b"no manifest: does not count")
    shutil.rmtree(folder / "checkpoints")
    again = train(make_config(*overrides))
    assert comparable(again.folder) == comparable(whole)


def test_a_download_that_was_interrupted_is_made_again(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: with a complete checkpoint, or a complete ledger, the other records were never downloaded."""
    whole = train(make_config("run.name=whole", *COMMON)).folder
    stop = {"helpers:StopAt": {"step": 5}}
    folder = Path(train(make_config("run.name=moved", *COMMON, callbacks=["jsonl", stop])).folder)
    shutil.rmtree(folder)
    storage = type(fsspec.filesystem("memory"))
    get = storage.get_file

    def fails(self: object, path: str, *arguments: object, **named: object) -> None:
        if path.endswith("metrics.jsonl"):
            raise PermissionError("403 Forbidden")
        get(self, path, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "get_file", fails)
        with pytest.raises(CheckpointError, match="can't be read: PermissionError: 403 Forbidden"):
            train(make_config("run.name=moved", *COMMON))
    again = train(make_config("run.name=moved", *COMMON)).folder
    assert comparable(again) == comparable(whole)
    assert ledger(again) == ledger(whole)


def test_a_damaged_checkpoint_in_the_mirror_is_skipped(
    make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(make_config("run.name=whole", *COMMON)).folder
    stop = {"helpers:StopAt": {"step": 5}}
    folder = Path(train(make_config("run.name=hurt", *COMMON, callbacks=["jsonl", stop])).folder)
    shutil.rmtree(folder / "checkpoints")
    storage = fsspec.filesystem("memory")
    (path,) = [p for p in storage.find("/bucket/runs/hurt/step-00000005") if p.endswith(".safetensors")]
    storage.pipe(path, storage.cat(path)[:-1])
    assert comparable(train(make_config("run.name=hurt", *COMMON)).folder) == comparable(whole)


def test_an_earlier_run_in_the_mirror_is_replaced_only_with_overwrite(make_config: MakeConfig) -> None:
    folder = train(make_config(*COMMON)).folder
    shutil.rmtree(folder)
    fresh = (*COMMON, "checkpoint.resume=never")
    with pytest.raises(ConfigError, match="contains an earlier run"):
        train(make_config(*fresh))
    train(make_config(*fresh, "run.overwrite=true", "run.max_steps=2"))
    assert RemoteCheckpointStore(f"{URL}/run").names() == ["step-00000002"]
    (records,) = [p for p in fsspec.filesystem("memory").find("/bucket/runs/run/records") if p.endswith("ledger.jsonl")]
    assert fsspec.filesystem("memory").cat(records).count(b"\n") == 2, "those of the new run"


def test_a_mirror_that_fails(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: 'nowhere://x/run': Protocol not known"):
        train(make_config("checkpoint.mirror=nowhere://x"))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden for https://user:hunter2@host/")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", refuse)
    with pytest.raises(
        CheckpointError, match=r"can't be written: PermissionError: 403 Forbidden for https://\*\*\*@host/"
    ):
        train(make_config("checkpoint.mirror=memory://bucket/runs", "run.name=x"))


def test_a_removal_whose_answer_was_lost(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the client repeats the request, finds nothing, and the run ended with a FileNotFoundError."""
    storage = type(fsspec.filesystem("memory"))
    removed = []

    def repeated(remove: Any) -> Any:
        def removes(self: object, path: str, *given: object, **named: object) -> None:
            remove(self, path, *given, **named)
            if not path.endswith(".safetensors"):
                removed.append(path.rpartition("/")[2])
                raise FileNotFoundError(path)

        return removes

    for name in ("rm", "rm_file"):
        monkeypatch.setattr(storage, name, repeated(getattr(storage, name)))
    train(make_config(*COMMON, "checkpoint.keep_last=1"))
    assert RemoteCheckpointStore(f"{URL}/run").names() == ["step-00000009"]
    assert {"manifest.json", "step-00000002"} <= set(removed)
    assert [
        p for p in fsspec.filesystem("memory").find("/bucket/runs/run") if "/step-" in p and "-00000009" not in p
    ] == []
