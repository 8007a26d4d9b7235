"""The verification of checkpoints: every rank its share, and what a run does when it finds damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable

from myllm_ray.cli import main
from myllm_ray.common import distributed
from myllm_ray.config import CheckpointError
from myllm_ray.engine.checkpointing import files, verification
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.checkpointing.verification import SET_ASIDE, damaged_files, find_damage, verify
from myllm_ray.engine.run_folder import checkpoints_of, resume_point, verified_start
from myllm_ray.preparation import absolute
from myllm_ray.worker import run_local

SAVES = ("checkpoint.every_steps=2", "checkpoint.resume=auto", "checkpoint.keep_last=null", "data.validation=null")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of 7 files."""
    monkeypatch.setattr(files, "FILE_BYTES", 1)
    return CheckpointManager(folder=tmp_path).save(1, {f"model.{i}": torch.full((3,), float(i)) for i in range(7)}, {})


def test_the_structure_is_checked_without_reading_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "sha256", lambda path: pytest.fail("a file was read"))
    assert find_damage(folder, contents=False) is None
    file = sorted(folder.glob("*.safetensors"))[3]
    file.write_bytes(file.read_bytes()[:-1])
    assert "its size differs" in str(find_damage(folder, contents=False))


def test_every_damaged_file_is_found(folder: Path) -> None:
    paths = sorted(folder.glob("*.safetensors"))
    for path in paths[1:4]:
        flip_a_bit(path)
    manifest = verification.read_manifest(folder)
    assert list(damaged_files(folder, manifest, manifest["files"])) == [p.name for p in paths[1:4]]


def test_ranks_share_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    original = verification.sha256
    monkeypatch.setattr(verification, "sha256", lambda path: read[-1].append(path.name) or original(path))
    manifest = verification.read_manifest(folder)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "from_main", lambda value: (manifest, None))
    monkeypatch.setattr(distributed, "gather_objects", lambda value, group=None: [value])
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        read.append([])
        assert verify(folder) == (manifest, None)
    assert sorted(name for names in read for name in names) == sorted(manifest["files"])
    assert [len(names) for names in read] == [3, 2, 2]


def test_damage_that_only_another_rank_sees_is_not_set_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared file system may show a file to a rank too late: the checkpoint is not damaged."""
    name = min(p.name for p in folder.glob("*.safetensors"))
    seen = (name, f"{name} can't be read")
    monkeypatch.setattr(distributed, "gather_objects", lambda value, group=None: [value, seen])
    with pytest.raises(CheckpointError, match="rank 0 reads it without an error"):
        verify(folder)
    flip_a_bit(folder / name)
    assert verify(folder) == ({}, f"{folder}: file {name} is damaged (its checksum differs)")


def test_a_run_falls_back_to_the_checkpoint_before(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    whole = run_local(make_config("run.name=whole", *SAVES))["folder"]
    stop = {"helpers:StopAt": {"step": 4}}
    config = absolute(make_config("run.name=hurt", *SAVES, callbacks=["jsonl", stop]))
    run_local(config)
    newest = checkpoints_of(config).all()[-1]
    flip_a_bit(next(newest.glob("*.safetensors")))
    assert resume_point(config) == newest, "its structure is valid"
    assert comparable(run_local(make_config("run.name=hurt", *SAVES))["folder"]) == comparable(whole)
    assert find_damage(newest) is None, "the step is saved again"


def test_a_launcher_chooses_again_after_damage(make_config: MakeConfig, tmp_path: Path) -> None:
    """A group that was started for a damaged checkpoint does not train from another step."""
    config = absolute(make_config(*SAVES))
    run_local(config)
    *_, before, newest = checkpoints_of(config).all()
    flip_a_bit(next(newest.glob("*.safetensors")))
    start, manifest, damage = verified_start(config, newest)
    assert (start, manifest["step"]) == (None, 6)
    assert "its checksum differs" in str(damage)
    assert (newest / SET_ASIDE).exists()
    assert resume_point(config) == before
    start, manifest, damage = verified_start(config, before)
    assert (start, manifest["step"], damage) == (before, 4, None)


def test_a_damaged_checkpoint_of_another_run_is_an_error(make_config: MakeConfig) -> None:
    first = absolute(make_config("run.name=first", *SAVES))
    run_local(first)
    newest = checkpoints_of(first).all()[-1]
    flip_a_bit(next(newest.glob("*.safetensors")))
    second = ("run.name=second", "data.validation=null", "run.max_steps=8", f"checkpoint.resume={newest}")
    with pytest.raises(CheckpointError, match="is damaged"):
        run_local(make_config(*second))
    with pytest.raises(CheckpointError, match="is damaged"):
        verified_start(absolute(make_config(*second)), None)
    assert newest in checkpoints_of(first).all(), "it is not changed"


def call(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    monkeypatch.setattr("sys.argv", ["myllm-ray", "verify-checkpoint", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def test_the_command_lists_damaged_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager = CheckpointManager(folder=tmp_path / "checkpoints")
    first, second = (manager.save(step, {"model.w": torch.ones(3)}, {}) for step in (1, 2))
    assert call(monkeypatch, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"{first}: 1 file, " in out
    assert f"{second}: 1 file, " in out
    flip_a_bit(next(second.glob("*.safetensors")))
    assert call(monkeypatch, tmp_path) == 1
    out = capsys.readouterr().out
    assert f"{first}: 1 file, " in out
    assert f"{second}: file rank-00000-1.safetensors is damaged (its checksum differs)" in out
    assert (call(monkeypatch, first), call(monkeypatch, second)) == (0, 1)
    assert call(monkeypatch, tmp_path / "nowhere") == 2
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert call(monkeypatch, tmp_path / "empty") == 2
