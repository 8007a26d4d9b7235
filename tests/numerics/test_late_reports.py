"""On an asynchronous device the values of a step are read in the next step, which changes no result of a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from conftest import MakeConfig, comparable, ledger
from test_stability import BAD, poisoned, same

from myllm_ray import train
from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.types import RunState
from myllm_ray.config import TrainingError
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.runs.replay import replay

EVENTS: list[tuple[str, int]] = []


class Recording(Callback):
    """Records the order of events."""

    def on_step_start(self, state: RunState) -> None:
        EVENTS.append(("start", state.step + 1))

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        EVENTS.append(("log", state.step))

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        EVENTS.append(("evaluate", state.step))

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        EVENTS.append(("checkpoint", state.step))

    def on_epoch_end(self, state: RunState) -> None:
        EVENTS.append(("epoch", state.step))


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_is_the_same(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    def run(name: str) -> str:
        return train(
            make_config(
                f"run.name={name}",
                "run.max_steps=13",
                f"logging.every_steps={every}",
                "evaluation.every_steps=5",
                "checkpoint={every_steps: 4, async: false}",
                callbacks=["jsonl", "test_late_reports:Recording"],
            )
        ).folder

    EVENTS.clear()
    expected, in_order = run("at-once"), [*EVENTS]
    EVENTS.clear()
    monkeypatch.setattr(Accelerator, "asynchronous", True)
    late = run("late")
    assert comparable(late) == comparable(expected)
    assert ledger(late) == ledger(expected)
    assert same(late, expected)
    assert sorted(EVENTS) == sorted(in_order), "no event is lost or made twice"
    assert EVENTS.index(("log", 2)) == EVENTS.index(("start", 3)) + 1, "step 2 is read while step 3 runs"
    for event in ("evaluate", "checkpoint", "epoch"):  # these need the values of their step
        for name, step in EVENTS:
            if name == event and ("log", step) in EVENTS and event != "evaluate":
                assert EVENTS.index(("log", step)) < EVENTS.index((name, step)), (name, step)


@pytest.mark.parametrize("every", [1, 4])
def test_a_non_finite_gradient_is_reported_with_its_step_and_never_saved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    monkeypatch.setattr(Accelerator, "asynchronous", True)
    config = poisoned(make_config, "bad", "ignore", math.nan, f"checkpoint.every_steps={every}")
    with pytest.raises(TrainingError, match=f"step {BAD}: the gradient is not finite"):
        train(config)
    folder = Path(config.run.storage) / "bad"
    assert [row["step"] for row in comparable(folder)] == [*range(1, BAD)]
    newest = CheckpointManager(folder=folder / "checkpoints").latest()
    assert newest is not None
    assert newest.name == f"step-{(BAD - 1) // every * every:08d}"


def test_a_replay_reads_the_norm_of_its_step(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Accelerator, "asynchronous", True)
    folder = train(make_config("run.max_steps=6", "checkpoint.every_steps=3")).folder
    found = replay(Path(folder), 5)
    assert found.grad_norm == pytest.approx(found.logged["grad_norm"], rel=1e-6)
    assert found.deviations == []
