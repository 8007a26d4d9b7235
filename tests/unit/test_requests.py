"""A request of a callback takes effect at the same step on every rank, whichever hook and rank it comes from."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeConfig, comparable
from spawned import run_all
from torch.multiprocessing import ProcessRaisedException

from myllm_ray.common import distributed
from myllm_ray.common.types import RunState
from myllm_ray.config import ConfigError
from myllm_ray.config.stability_section import StabilitySection
from myllm_ray.engine.callbacks import Callback, CallbackList
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.liveness.heartbeat import Heartbeat, read_requests, request
from myllm_ray.engine.stability import Stability


def saved(folder: Path) -> list[str]:
    return [path.name for path in CheckpointManager(folder=folder / "checkpoints").all()]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("world", [1, 2])
def test_rank_0_alone_asks_while_it_logs(make_config: MakeConfig, world: int) -> None:
    """Regression: two processes deadlocked.

    Rank 0 entered the checkpoint, and the other rank entered the gradient all-reduce of the next step.
    """

    def ask(name: str, what: str) -> object:
        return make_config(
            f"run.name={name}",
            "accelerator.name=ddp",
            "batch.micro_size=1",
            "batch.global_size=4",
            callbacks=["jsonl", {"helpers:AskInLog": {"step": 3, "what": what}}],
        )

    stopped, kept, aborted = run_all(world, [ask("stop", "stop"), ask("save", "save"), ask("abort", "abort")])  # type: ignore[list-item]
    assert [row["step"] for row in comparable(stopped)] == [1, 2, 3, 4]
    assert saved(stopped) == ["step-00000004"]
    assert len(comparable(kept)) == 6
    assert saved(kept) == ["step-00000004", "step-00000006"]
    assert [row["step"] for row in comparable(aborted)] == [1, 2, 3, 4]
    assert saved(aborted) == []


@pytest.mark.timeout(120)
def test_two_ranks_ask_for_different_endings(make_config: MakeConfig) -> None:
    """`preempt` on one rank and `abort` on the other, at the same step: both ranks save.

    Regression: sets iterate in a different order on each rank (`spawned.start_processes`). One rank began a checkpoint,
    and the other one ended without it.
    """
    (folder,) = run_all(
        2,
        [
            make_config(
                "accelerator.name=ddp",
                "batch.micro_size=1",
                "batch.global_size=4",
                callbacks=["jsonl", {"helpers:AskDifferently": {"step": 2, "what": ["preempt", "abort"]}}],
            )
        ],
    )
    assert [row["step"] for row in comparable(folder)] == [1, 2]
    assert saved(folder) == ["step-00000002"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("asks", [0, 1])
def test_every_rank_knows_why_a_run_is_left(make_config: MakeConfig, tmp_path: Path, asks: int) -> None:
    """Regression: the other ranks reported a SIGTERM that one rank received first as `asked for by another rank`."""
    run_all(
        2,
        [
            make_config(
                "accelerator.name=ddp",
                "batch.micro_size=1",
                "batch.global_size=4",
                callbacks=["jsonl", {"helpers:OneRankLeaves": {"step": 2, "asks": asks, "folder": str(tmp_path)}}],
            )
        ],
    )
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == [f"a reason of rank {asks}"] * 2


@pytest.mark.timeout(120)
def test_metrics_that_differ_between_ranks_are_an_error(make_config: MakeConfig) -> None:
    """Regression: metrics were summed by position, which mixed their values or blocked a collective without limit."""
    config = make_config(
        "accelerator.name=ddp", "batch.micro_size=1", "batch.global_size=4", trainer="helpers:RankMetrics"
    )
    with pytest.raises(ProcessRaisedException, match="the trainer's metrics differ between ranks"):
        run_all(2, [config])


def test_what_an_earlier_attempt_did_is_read_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: each rank read interventions.jsonl.

    A rank with an older view of the folder trained on steps that the others skipped.
    """
    (tmp_path / "interventions.jsonl").write_text('{"step": 3, "action": "rewind", "window": 1, "reason": "loss"}\n')
    stability = Stability(StabilitySection(on_spike="rewind"), str(tmp_path))
    stability.load_interventions()
    assert stability.stepped_over(3) == "loss"
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(
        distributed,
        "from_main",
        lambda value: [] if value else [{"step": 5, "action": "rewind", "window": 1, "reason": "main"}],
    )
    stability.load_interventions()
    assert (stability.stepped_over(3), stability.stepped_over(5)) == (None, "main")


def test_a_callback_of_rank_0_alone_may_not_decide() -> None:
    """Regression: with `decides` on one rank only, that rank entered a collective alone."""

    class Decides(Callback):
        main_only = True

        def decides(self, state: RunState) -> bool:
            return True

    with pytest.raises(ConfigError, match=r"Decides overrides `decides`.*remove main_only"):
        CallbackList([Decides()])


@pytest.mark.parametrize("order", [("preempt", "stop"), ("stop", "preempt")])
def test_a_stop_comes_before_a_request_to_preempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    """The result does not depend on the order in which the file system lists the requests."""
    for name in order:
        request(tmp_path, name, f"{name} was asked for")
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / name for name in order]))
    heartbeat = Heartbeat()
    heartbeat._receive(read_requests(tmp_path))
    assert heartbeat.preempt == "stop was asked for"
