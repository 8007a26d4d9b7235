"""Planned changes lose no step: workers that join and leave, drained nodes, and a run that is stopped on request."""

from __future__ import annotations

import re
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, comparable, ledger
from harness import BACKENDS, Job, Place, attempts_of, compare, job_config, place

from myllm_ray import train
from myllm_ray.engine.liveness.hang_detector import stop
from myllm_ray.engine.liveness.heartbeat import find_activity, read_heartbeats

LONG = (
    "run.max_steps=40",
    "checkpoint.every_steps=100",
    "callbacks=[console, jsonl, {helpers:Slow: {seconds: 0.3}}]",
    "scaling.resources_per_worker={slot: 1}",
    "scaling.max_failures=0",
    *BACKENDS["ddp"],
)


def drain(where: Place, node: Any) -> None:
    """Sends Ray's notice that `node` will be preempted, as a cloud provider does for a spot instance."""
    import ray
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION

    client = GcsClient(address=where.address)
    accepted, why = client.drain_node(
        node.node_id, DRAIN_NODE_REASON_PREEMPTION, "spot", int((time.time() + 60) * 1000)
    )
    assert accepted, why
    assert ray is not None


@pytest.mark.promise
@pytest.mark.timeout(280)
def test_workers_come_and_go_without_losing_a_step(tmp_path: Path) -> None:
    """One run with 1 -> 2 -> 1 workers: a node joins and is drained.

    Checkpoints are written only at these changes, and no step is repeated.
    """
    with place(cpus=3, slots=1) as where:
        job = Job(job_config(tmp_path, "elastic", *LONG, "scaling.workers=[1,2]"), where.address).start()
        job.until(lambda: job.steps() >= 2)
        node = where.add(cpus=1, slots=1)
        job.until(lambda: len(job.workers()) == 2)
        now = job.steps()
        job.until(lambda: job.steps() > now + 1)
        drain(where, node)
        assert job.end() == 0, job.said()
        expected = train(
            job_config(
                tmp_path, "fixed", *LONG[:2], "accelerator.name=single", "scaling.workers=0", "callbacks=[jsonl]"
            )
        )
        found = compare(job.folder, Path(expected.folder), steps=40)
        attempts = attempts_of(job.folder)
        assert [a["workers"] for a in attempts] == [1, 2, 1], attempts
        assert [a["end"].split(":")[0] for a in attempts] == ["preempted", "preempted", "done"]
        assert "2 workers fit instead of 1" in attempts[0]["end"]
        assert "is about to leave" in attempts[1]["end"]
        assert all(a["to_step"] == b["from_step"] for a, b in pairwise(attempts))
        assert (found.retrained, found.lost_or_repeated) == (0, 0)
        assert found.losses < 1e-5


@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    "how", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGINT")), "command"]
)
def test_a_run_that_is_requested_to_stop_saves_first(
    tmp_path: Path, how: str, make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is 75, and the resumed run equals the whole run; in this process (0 workers), and once on Ray."""
    on_ray = how == "SIGTERM"
    options = (
        ("scaling.resources_per_worker={slot: 1}", *BACKENDS["ddp"])
        if on_ray
        else ("scaling.workers=0", "accelerator.name=single")
    )
    common = ("checkpoint.every_steps=100", "callbacks=[console, jsonl, {helpers:Slow: {seconds: 0.2}}]", *options)

    def run(address: str | None) -> Path:
        job = Job(job_config(tmp_path, "stopped", *common), address).start()
        job.until(lambda: job.steps() >= 3)
        if on_ray:  # the driver writes the heartbeats of all ranks, and no rank lists the folder
            job.until(lambda: len(read_heartbeats(job.folder)) == 2)
            names = {p.name for p in (job.folder / ".heartbeats").glob("rank*") if not p.name.endswith(".tmp")}
            assert names == {"rank-00000.json", "ranks.json"}
        if how == "command":
            assert stop(job.folder, 60) == str(job.folder / "checkpoints" / f"step-{job.steps():08d}")
        else:
            job.process.send_signal(getattr(signal, how))
        assert job.end() == 75, job.said()
        said = job.said()
        assert re.search(
            r"stopped early \((SIGTERM|Ctrl-C|myllm-ray stop)\); to resume: the same command with", said
        ), said
        assert "Traceback" not in said
        steps = job.steps()
        assert [p.name for p in sorted((job.folder / "checkpoints").iterdir())] == [f"step-{steps:08d}"]
        assert not (job.folder / ".heartbeats").exists()
        assert job.start().end() == 0, job.said()
        assert f"resuming from step {steps}" in job.said()
        return job.folder

    if on_ray:
        with place(cpus=3, slots=2) as where:
            folder = run(where.address)
    else:
        folder = run(None)
    whole = train(
        job_config(tmp_path, "whole", "scaling.workers=0", "accelerator.name=single", "callbacks=[jsonl]")
    ).folder
    assert ledger(folder) == ledger(whole)
    if on_ray:
        assert [r["loss"] for r in comparable(folder)] == pytest.approx(
            [r["loss"] for r in comparable(whole)], rel=1e-5
        )
    else:
        assert comparable(folder) == comparable(whole)


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    job = Job(
        job_config(
            tmp_path,
            "twice",
            "scaling.workers=0",
            "accelerator.name=single",
            "callbacks=[console, jsonl, {helpers:Slow: {seconds: 60}}]",
        ),
        None,
    ).start()
    job.until(lambda: "training 16 steps" in job.said())
    job.until(lambda: find_activity(job.folder))
    for _ in range(2):
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert job.end(40) == 130, job.said()  # much shorter than a step
    assert "stopped without saving" in job.said()
    assert "Traceback" not in job.said()


def test_two_runs_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from myllm_ray.config import ConfigError
    from myllm_ray.engine import run_folder

    monkeypatch.setattr(run_folder, "_OLD_WORKERS_SECONDS", 0.5)
    config = job_config(
        tmp_path,
        "same",
        "scaling.workers=0",
        "accelerator.name=single",
        "callbacks=[jsonl, {helpers:Slow: {seconds: 0.5}}]",
    )
    job = Job(config, None).start()
    try:
        job.until(lambda: job.steps() >= 1)
        with pytest.raises(
            ConfigError, match=r"a run is active there \((rank 0|training): pid \d+ on .*\); stop it \(myllm-ray stop "
        ):
            train(config)
    finally:
        job.process.kill()
        job.end()


@pytest.mark.timeout(280)
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["data", "forward"])
def test_a_rank_that_sleeps_is_named(tmp_path: Path, phase: str, ray_cluster: None) -> None:
    """Rank 1 sleeps once, much longer than hang_seconds.

    The log names rank and phase, the stacks are written, and the run recovers.
    """
    import logging

    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    config = job_config(
        tmp_path,
        "sleeps",
        *BACKENDS["ddp"],
        "checkpoint.every_steps=4",
        "stability.hang_seconds=12",
        "scaling.max_failures=1",
        "callbacks=[jsonl]",
    )
    config["trainer"] = "helpers:Sleeper"
    config["options"] = {"rank": 1, "step": 6, "phase": phase, "marker": str(tmp_path / "slept")}
    handler = Lines()
    logging.getLogger("myllm_ray").addHandler(handler)
    try:
        result = train(config)
    finally:
        logging.getLogger("myllm_ray").removeHandler(handler)
    assert result.step == 16
    said = next(line for line in lines if "has made no progress" in line)
    assert re.search(rf"rank 1 has made no progress for \d+ s, in phase {phase} of step 6 \(pid \d+ on ", said), said
    (folder,) = (Path(result.folder) / "stacks").iterdir()
    assert "time.sleep" in (text := (folder / "rank-00001.txt").read_text()) or "helpers.py" in text
    assert (folder / "rank-00000.txt").exists()
    whole = train(
        {**job_config(tmp_path, "whole", "scaling.workers=0", "accelerator.name=single", "callbacks=[jsonl]")}
    ).folder
    assert ledger(result.folder) == ledger(whole)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_rewind_on_ray(tmp_path: Path, ray_cluster: None) -> None:
    """A poisoned batch in step 7: the next worker group starts from step 4 and skips it; no failure is counted."""
    from myllm_ray.common.types import Position
    from myllm_ray.config import validate
    from myllm_ray.data.prepare import prepare
    from myllm_ray.data.stream import LocalStream
    from myllm_ray.preparation import absolute

    bad: set[int] = set()  # step 7, and the steps of later epochs that contain one of its rows again

    def poisoned(name: str, *overrides: str) -> dict[str, Any]:
        config = job_config(tmp_path, name, "stability.on_spike=rewind", "callbacks=[jsonl]", *overrides)
        stream = LocalStream(
            prepare(absolute(validate({**config, "accelerator": {"name": "single"}, "scaling": {"workers": 0}}))).train
        )
        hashes = [
            {hash(tuple(m["input_ids"].flatten().tolist())) for m in batch.micros}
            for batch in stream.batches(Position(), config["run"]["max_steps"])
        ]
        bad.update(step for step, found in enumerate(hashes, 1) if found & hashes[6])
        return {**config, "trainer": "helpers:Poisoned", "options": {"marks": list(hashes[6]), "factor": "nan"}}

    on_ray = train(poisoned("ray", *BACKENDS["ddp"], "scaling.max_failures=0"))
    local = train(poisoned("local", "accelerator.name=single", "scaling.workers=0", "scaling.max_failures=0"))
    assert ledger(on_ray.folder) == ledger(local.folder)
    assert [row["step"] for row in ledger(on_ray.folder) if "left_out" in row] == sorted(bad)
    assert [a["end"].split(":")[0] for a in attempts_of(Path(on_ray.folder))] == [*["rewind"] * len(bad), "done"]
    losses = [[r.get("loss", 0.0) for r in comparable(f)] for f in (on_ray.folder, local.folder)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_workers_that_find_damage_start_again_from_the_checkpoint_before(tmp_path: Path) -> None:
    """The driver checks only the structure of a checkpoint; the group that finds the damage does not train."""
    constant = "scheduler={name: constant}"  # the number of steps changes
    slots = ("scaling.resources_per_worker={slot: 1}", "scaling.max_failures=0")
    common = (constant, "checkpoint.keep_last=null", *slots)
    with place(cpus=2, slots=2) as where:
        job = Job(job_config(tmp_path, "hurt", *common, "run.max_steps=8", *BACKENDS["ddp"]), where.address).start()
        assert job.end() == 0, job.said()
        *_, before, newest = sorted((job.folder / "checkpoints").iterdir())
        file = next(newest.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"\xff")
        job = Job(job_config(tmp_path, "hurt", *common, "run.max_steps=12", *BACKENDS["ddp"]), where.address).start()
        assert job.end() == 0, job.said()
        ends = [a["end"].partition(":")[0] for a in attempts_of(job.folder)]
        assert ends == ["done", "rewind", "done"]
        assert attempts_of(job.folder)[-1]["from_step"] == int(before.name[-8:])
        expected = train(
            job_config(tmp_path, "whole", constant, "run.max_steps=12", "accelerator.name=single", "scaling.workers=0")
        )
        found = compare(job.folder, Path(expected.folder), steps=12)
        assert found.lost_or_repeated == 0
        assert found.losses < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_actor_of_the_heartbeats_is_killed(tmp_path: Path) -> None:
    """It starts again, the ranks do not wait for it, and a later request reaches them."""
    import psutil

    with place(cpus=3, slots=2) as where:
        job = Job(job_config(tmp_path, "job", *LONG), where.address).start()
        job.until(lambda: job.steps() >= 3 and len(read_heartbeats(job.folder)) == 2)
        (link,) = [p for p in psutil.process_iter() if p.name().startswith("ray::DriverLink")]
        link.kill()
        beats = read_heartbeats(job.folder)
        job.until(lambda: all(beat != beats[rank] for rank, beat in read_heartbeats(job.folder).items()))
        assert stop(job.folder, 60) == str(job.folder / "checkpoints" / f"step-{job.steps():08d}")
        assert job.end() == 75, job.said()
    assert "Traceback" not in job.said()
    assert len(attempts_of(job.folder)) == 1
