"""The channel between a trial and Tune, and the file with its placement group."""

from __future__ import annotations

from pathlib import Path

import pytest


def test_an_interrupted_trial_saves_and_a_stopped_one_does_not(tmp_path: Path) -> None:
    """Regression: Ctrl-C ended a trial that waited for Tune without a checkpoint, and --resume restarted it."""
    from myllm_ray.engine.liveness.heartbeat import request
    from myllm_ray.orchestration.sweeps.trial_channel import ABORT, CONTINUE, PREEMPT, TrialChannel

    channel = TrialChannel(str(tmp_path / "trial"))
    for verdict in (CONTINUE, ABORT):
        channel.answer(verdict)
        assert channel.report(1, {"loss": 1.0}) == verdict
    request(tmp_path / "trial", "abort", "the scheduler")
    assert channel.report(2, {"loss": 1.0}) == ABORT
    request(tmp_path / "trial", "stop", "Ctrl-C")
    channel.answer(ABORT)
    assert channel.report(3, {"loss": 1.0}) == PREEMPT
    assert channel.poll(0.0) == (1, {"loss": 1.0})


def test_the_file_with_a_placement_group_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver may read the file at any time. Regression: an empty file named no group to remove."""
    from threading import Thread
    from types import SimpleNamespace

    from myllm_ray.common.types import RunState
    from myllm_ray.orchestration.sweeps import trial_channel as channel

    given = "0123456789abcdef" * 2
    group = SimpleNamespace(id=SimpleNamespace(hex=lambda: given))
    monkeypatch.setattr(channel.ray.util, "get_current_placement_group", lambda: group)
    reporter = channel.TrialReporter(object.__new__(channel.RemoteTrialChannel), "loss", 1)
    state, path, seen = RunState(folder=str(tmp_path)), tmp_path / channel.PLACEMENT_GROUP, set()
    path.write_text(given)
    writer = Thread(target=lambda: [reporter.on_train_start(state) for _ in range(2000)])
    writer.start()
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen == {given}
