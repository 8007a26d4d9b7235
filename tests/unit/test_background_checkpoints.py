"""Checkpoints written in the background: the same content, one write at a time, and no lost errors."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import MakeConfig, comparable
from spawned import BACKENDS, run_all

from myllm_ray.common.types import RunState
from myllm_ray.config import CheckpointError
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpointing import manager as module
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest, read_tensors
from myllm_ray.worker import run_local

EVERY = ("checkpoint.every_steps=2", "checkpoint.keep_last=null", "data.validation=null")


class Told(Callback):
    """Records the names of the checkpoints that a run reports."""

    seen: ClassVar[list[str]] = []

    def on_checkpoint(self, state: RunState, path: str) -> None:
        assert find_damage(Path(path)) is None, "told when it is whole"
        Told.seen.append(Path(path).name)


@pytest.mark.parametrize("world", [1, 2])
def test_background_checkpoints_equal_synchronous_ones(make_config: MakeConfig, world: int) -> None:
    names = ("single",) if world == 1 else ("ddp", "fsdp", "deepspeed-2")
    runs = [
        make_config(f"run.name={n}-{mode}", *BACKENDS[n], *EVERY, f"checkpoint.async={mode}")
        for n in names
        for mode in ("true", "false")
    ]
    folders = run_all(world, runs)
    for background, at_once in zip(folders[::2], folders[1::2], strict=True):
        assert comparable(background) == comparable(at_once)
        for step in (2, 4, 6):
            name = f"checkpoints/step-{step:08d}"
            assert find_damage(background / name) is None
            found, wanted = read_tensors(background / name), read_tensors(at_once / name)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[k], wanted[k]) for k in wanted)
            assert read_manifest(background / name)["position"] == read_manifest(at_once / name)["position"]


def test_what_is_written_is_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training may change the tensors while they are being written; a second save waits for the first."""
    go, writing = threading.Event(), []
    write = module.write

    def slow(final: Path, *rest: Any) -> None:
        writing.append(final.name)
        go.wait(30)
        write(final, *rest)

    monkeypatch.setattr(module, "write", slow)
    manager = CheckpointManager(folder=tmp_path, background=True)
    live = {"model.w": torch.full((4, 4), 1.0)}
    manager.save(1, live, {})
    live["model.w"].fill_(2.0)
    assert manager.all() == []
    second = threading.Thread(target=manager.save, args=(2, live, {}))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "at most one in flight"
    assert writing == ["step-00000001"]
    go.set()
    second.join()
    manager.wait()
    assert [p.name for p in manager.committed()] == ["step-00000001", "step-00000002"]
    assert [read_tensors(p)["model.w"][0, 0].item() for p in manager.all()] == [1.0, 2.0]


def test_callbacks_run_when_the_checkpoint_is_complete(make_config: MakeConfig) -> None:
    Told.seen = []
    config = make_config(*EVERY, "checkpoint.async=true", callbacks=["jsonl", f"{__name__}:Told"])
    run_local(config)
    assert Told.seen == ["step-00000002", "step-00000004", "step-00000006"]


class InTheWay(Callback):
    """Creates a file at the path where the checkpoint of a step is to be written."""

    def __init__(self, step: int, folder: str):
        self.step, self.folder = step, Path(folder)

    def on_step_start(self, state: RunState) -> None:
        if state.step == self.step - 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f".step-{self.step:08d}.tmp").write_text("in the way")


@pytest.mark.parametrize(("step", "last"), [(4, 5), (6, 6)])
def test_an_error_is_raised_at_the_next_step_and_at_the_end(
    make_config: MakeConfig, tmp_path: Path, step: int, last: int
) -> None:
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    config = make_config(
        *EVERY,
        "checkpoint.async=true",
        callbacks=["jsonl", {f"{__name__}:InTheWay": {"step": step, "folder": str(checkpoints)}}],
    )
    with pytest.raises(CheckpointError, match=rf"step-0000000{step}: can't be written: .*exists") as caught:
        run_local(config)
    assert "\n" not in str(caught.value)
    assert comparable(checkpoints.parent)[-1]["step"] <= last
    whole = [p.name for p in CheckpointManager(folder=checkpoints).all()]
    assert whole == [f"step-0000000{s}" for s in (2, 4, 6) if s < step], "earlier ones stay"
