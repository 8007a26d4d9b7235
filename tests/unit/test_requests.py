"""What a callback asks the engine to do happens at the same step on every rank, whichever hook asks and whichever rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeConfig, comparable
from spawned import run_all
from torch.multiprocessing import ProcessRaisedException

from myllm_ray.common import distributed
from myllm_ray.common.types import RunState
from myllm_ray.config import ConfigError
from myllm_ray.engine.callbacks import Callback, CallbackList
from myllm_ray.engine.checkpoint import CheckpointManager
from myllm_ray.engine.pulse import Pulse, pulse_folder, request
from myllm_ray.engine.stability import Stability


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


@pytest.mark.timeout(120)
def test_two_ranks_ask_for_different_endings(make_config: MakeConfig) -> None:
    """`leave` on one and `abandon` on the other, at the same step: both ranks save. The ranks' sets iterate in different orders
    (`spawned.start_processes`): one rank began a checkpoint, the other ended without."""
    folder, = run_all(2, [make_config("accelerator.name=ddp", "batch.micro_size=1", "batch.global_size=4",
                                      callbacks=["jsonl", {"helpers:AskDifferently": {"step": 2, "what": ["leave", "abandon"]}}])])
    assert [row["step"] for row in comparable(folder)] == [1, 2]
    assert saved(folder) == ["step-00000002"]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("asks", [0, 1])
def test_every_rank_knows_why_a_run_is_left(make_config: MakeConfig, tmp_path: Path, asks: int) -> None:
    """A SIGTERM that one rank saw first was reported by the others as `asked for by another rank`."""
    run_all(2, [make_config("accelerator.name=ddp", "batch.micro_size=1", "batch.global_size=4", callbacks=[
        "jsonl", {"helpers:OneRankLeaves": {"step": 2, "asks": asks, "folder": str(tmp_path)}}])])
    assert [(tmp_path / f"left-{rank}").read_text() for rank in (0, 1)] == [f"a reason of rank {asks}"] * 2


@pytest.mark.timeout(120)
def test_metrics_that_differ_between_ranks_are_an_error(make_config: MakeConfig) -> None:
    """They were added up by position: other metrics' values, or a collective that never ends."""
    config = make_config("accelerator.name=ddp", "batch.micro_size=1", "batch.global_size=4", trainer="helpers:RankMetrics")
    with pytest.raises(ProcessRaisedException, match="the trainer's metrics differ between ranks"):
        run_all(2, [config])


def test_what_an_earlier_attempt_did_is_read_on_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank read interventions.jsonl: one whose view of the folder was older trained on steps that the others stepped over."""
    (tmp_path / "interventions.jsonl").write_text('{"step": 3, "action": "rewind", "window": 1, "reason": "loss"}\n')
    stability = Stability({"on_spike": "rewind"}, str(tmp_path))
    stability.load_interventions()
    assert stability.stepped_over(3) == "loss"
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(distributed, "from_main", lambda value: [] if value else [{"step": 5, "action": "rewind", "window": 1, "reason": "main"}])
    stability.load_interventions()
    assert (stability.stepped_over(3), stability.stepped_over(5)) == (None, "main")


def test_a_callback_of_rank_0_alone_may_not_decide() -> None:
    """`decides` on one rank only: that rank entered a collective alone."""

    class Decides(Callback):
        main_only = True

        def decides(self, state: RunState) -> bool:
            return True

    with pytest.raises(ConfigError, match=r"Decides overrides `decides`.*remove main_only"):
        CallbackList([Decides()])


@pytest.mark.parametrize("order", [("leave", "stop"), ("stop", "leave")])
def test_a_stop_comes_before_a_request_to_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]) -> None:
    """In whatever order the file system lists them."""
    for name in order:
        request(tmp_path, name, f"{name} was asked for")
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / name for name in order]))
    pulse = Pulse()
    pulse._listen(pulse_folder(tmp_path))
    assert pulse.leave == "stop was asked for"
