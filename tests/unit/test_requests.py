"""What a callback asks the engine to do happens at the same step on every rank, whichever hook asks and whichever rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeConfig, comparable
from spawned import run_all

from myllm_ray.engine.checkpoint import CheckpointManager


def saved(folder: Path) -> list[str]:
    return [path.name for path in CheckpointManager(folder=folder / "checkpoints").all()]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [1, 2])
def test_rank_0_alone_asks_while_it_logs(make_config: MakeConfig, world: int) -> None:
    """On two processes this waited for ever: rank 0 was on its way to a checkpoint, the other to the next step's gradients."""

    def ask(name: str, what: str) -> object:
        return make_config(f"run.name={name}", "accelerator.name=ddp", "batch.micro_size=1", "batch.global_size=4",
                           callbacks=["jsonl", {"helpers:AskInLog": {"step": 3, "what": what}}])

    stopped, kept, abandoned = run_all(world, [ask("stop", "stop"), ask("save", "save"), ask("abandon", "abandon")])  # type: ignore[list-item]
    assert [row["step"] for row in comparable(stopped)] == [1, 2, 3, 4]
    assert saved(stopped) == ["step-00000004"]
    assert len(comparable(kept)) == 6
    assert saved(kept) == ["step-00000004", "step-00000006"]
    assert [row["step"] for row in comparable(abandoned)] == [1, 2, 3, 4]
    assert saved(abandoned) == []
