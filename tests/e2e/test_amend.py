"""`myllm-ray amend`: an amended run is, bit for bit, the run that starts with the amended config."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import MakeConfig, comparable, ledger
from harness import killed, weights
from spawned import run_all
from typer.testing import CliRunner

from myllm_ray import train
from myllm_ray.cli import app
from myllm_ray.config import CheckpointError, ConfigError, TrainerConfig, validate
from myllm_ray.data.inspect import rows_of_step
from myllm_ray.engine.amendments import amend, record, recorded, with_recorded
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.liveness.heartbeat import find_activity
from myllm_ray.preparation import absolute, prepare_data

AUTO = "checkpoint.resume=auto"


def same(folder: str | Path, other: str | Path, steps: int) -> None:
    """Asserts that two runs have equal metrics, batches, weights and moments."""
    assert comparable(folder) == comparable(other)
    assert ledger(folder) == ledger(other)
    ours, theirs = weights(Path(folder), steps), weights(Path(other), steps)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def differs(folder: str | Path, other: str | Path, from_step: int) -> None:
    """Asserts that two runs have equal losses up to a step, and other ones or other lengths after it."""
    ours, theirs = comparable(folder), comparable(other)
    assert [r for r in ours if r["step"] <= from_step] == [r for r in theirs if r["step"] <= from_step]
    assert ours != theirs


AMENDMENTS: dict[str, tuple[int, dict[str, Any]]] = {
    "optimizer": (3, {"optimizer": {"lr": 1e-3, "weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-6}}),
    "clip": (3, {"gradient_clip": 0.01, "stability.on_spike": "skip"}),
    "schedule": (3, {"scheduler": {"name": "linear", "warmup_steps": 1}}),
    "longer": (6, {"run.max_steps": 8}),
    "shorter": (3, {"run.max_steps": 5}),
    "batch": (3, {"batch": {"global_size": 12, "micro_size": 3}}),  # an epoch of 43 rows: 24, then 12, 7 + 5 empty ones
    "evaluation": (3, {"evaluation": {"every_steps": 2, "max_batches": 1}, "logging.every_steps": 2}),
}


@pytest.mark.parametrize("name", AMENDMENTS)
def test_a_stopped_run_is_amended(make_config: MakeConfig, tmp_path: Path, name: str) -> None:
    """The run is stopped before the amendment, amended by its folder, and resumed by the config without it."""
    at, values = AMENDMENTS[name]
    early = min(at, 2)
    once = {"callbacks": ["jsonl", {"helpers:StopAt": {"step": early}}]}
    assert train(make_config(**once)).step == early
    folder = tmp_path / "runs" / "run"
    before = (folder / "config.yaml").read_text()
    assert amend(folder, at, values, 0) == at
    assert before != (folder / "config.yaml").read_text()
    result = train(make_config(AUTO))
    anew = make_config("run.name=anew", f"run.amendments={json.dumps(recorded(folder))}")
    other = train(anew)
    assert result.step == other.step == values.get("run.max_steps", 6)
    same(result.folder, other.folder, result.step)
    if name != "evaluation":
        differs(result.folder, train(make_config("run.name=plain")).folder, at)
    # The amendment is part of the config in every checkpoint, with its step.
    manifest = read_manifest(Path(result.checkpoint or ""))
    assert manifest["config"]["run"]["amendments"] == recorded(folder)
    assert [a["at"] for a in recorded(folder)] == [at]


def test_batches_of_another_size(make_config: MakeConfig) -> None:
    """Rows follow each other across the amendment, no row is skipped or repeated, and `data --step` finds them."""
    config = make_config(
        "run.amendments=[{at: 2, set: {batch.global_size: 12}}, {at: 4, set: {batch.global_size: 4}}]",
        "run.max_steps=8",
        "data.validation=null",  # 48 rows per epoch
        "data.packing=false",
        "checkpoint.every_steps=1",
    )
    rows = ledger(train(config).folder)
    assert [(r["epoch"], r["row"], r["rows"]) for r in rows] == [
        (0, 0, 8),
        (0, 8, 8),
        (0, 16, 12),
        (0, 28, 12),
        *((0, row, 4) for row in (40, 44)),
        *((1, row, 4) for row in (0, 4)),
    ]
    spec = prepare_data(absolute(config)).train
    sizes = [(0, 8), (2, 12), (4, 4)]
    for row in rows:
        position, batch, fingerprint = rows_of_step(spec, row["step"], 1, sizes)
        assert (position.epoch, position.row, len(batch)) == (row["epoch"], row["row"], row["rows"])
        assert f"{fingerprint:016x}" == row["tokens_hash"]


MOMENTS = [
    pytest.param("KillOnce", 3, marks=pytest.mark.promise),
    ("KillAtCheckpoint", 3),
    ("KillOnce", 4),
    pytest.param("KillAtCheckpoint", 4, marks=pytest.mark.promise),
]


@pytest.mark.parametrize(("kind", "step"), MOMENTS)
def test_killed_around_the_amendment(make_config: MakeConfig, tmp_path: Path, kind: str, step: int) -> None:
    """Killed in the last step before the amendment, after its checkpoint, in the next step, and after that is saved."""
    given = "run.amendments=[{at: 3, set: {optimizer.lr: 1e-3, batch.global_size: 4, run.max_steps: 7}}]"
    # Checkpoints every two steps: the one of step 3 is only due to the amendment.
    usual = (given, "checkpoint.every_steps=2")
    whole = train(make_config(*usual, "run.name=whole")).folder
    marker = str(tmp_path / "killed")
    config = make_config(*usual, AUTO, callbacks=["jsonl", {f"helpers:{kind}": {"step": step, "marker": marker}}])
    assert killed(config.model_dump(mode="json"))
    again = train(config)
    assert again.step == 7
    same(again.folder, whole, 7)


def in_the_background(config: TrainerConfig) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    return thread, results


def until(what: Callable[[], Any], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def trained(folder: Path) -> int:
    path = folder / "ledger.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_an_active_run_is_amended_now_and_later(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    slow: dict[str, Any] = {"callbacks": ["jsonl", {"helpers:Slow": {"seconds": 0.3}}]}
    thread, results = in_the_background(make_config("run.max_steps=30", **slow))
    until(lambda: trained(folder) >= 2)
    now = amend(folder, "now", {"optimizer.lr": 1e-3}, 60)
    assert now is not None
    assert 2 <= now < 30
    with pytest.raises(ConfigError, match=r"--at 1: the run has trained \d+ steps already"):
        amend(folder, 1, {"optimizer.lr": 1}, 60)
    assert amend(folder, now + 15, {"run.max_steps": now + 17}, 60) == now + 15
    thread.join(120)
    assert [result.exit for result in results] == [None]
    assert recorded(folder) == [
        {"at": now, "set": {"optimizer.lr": 1e-3}},
        {"at": now + 15, "set": {"run.max_steps": now + 17}},
    ]
    other = train(
        make_config("run.max_steps=30", "run.name=anew", f"run.amendments={json.dumps(recorded(folder))}")
    ).folder
    same(folder, other, now + 17)
    assert not (folder / ".heartbeats").exists()


def test_the_command(make_config: MakeConfig, tmp_path: Path, warned: list[str]) -> None:
    folder = Path(train(make_config()).folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["amend", str(folder), *words])
        if isinstance(result.exception, ConfigError):
            return result.exception.exit_code, str(result.exception)
        return result.exit_code, result.output

    for words, message in (
        (["--at", "3", "optimizer.lr=1"], "--at 3: the run has trained 6 steps already"),
        (["--at", "9", "optimizer.lr=1"], "--at 9: the run ends at step 6 (run.max_steps)"),
        (["--at", "soon", "optimizer.lr=1"], "--at soon: give a step or now"),
        (["optimizer.lrr=1"], "unknown key optimizer.lrr: did you mean lr?"),
        (["model.name=gpt2"], "model.name can't change within a run"),
        (["scheduler.name=linaer"], "did you mean linear?"),
        (["optimizer.lr"], "is not of the form key.sub=value"),
        ([], "give at least one new value"),
        (["--list", "optimizer.lr=1"], "give new values or --list"),
    ):
        code, said = run(*words)
        assert code == 2
        assert message in said
        assert "\n" not in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert run("--list") == (0, "no amendments\n")
    code, said = run("run.max_steps=8", "optimizer.lr=1e-3")
    assert code == 0
    assert said.startswith("amended after step 6: optimizer.lr was 0.003, now it is 0.001; run.max_steps was 6, now")
    assert run("--list")[1].startswith('step 6: {"run.max_steps": 8, "optimizer.lr": 0.001}: optimizer.lr was')
    result = train(make_config(AUTO))
    assert result.step == 8
    assert [line for line in warned if "amendment of the run at step 6" in line]


def test_the_config_and_the_run_must_agree(make_config: MakeConfig, tmp_path: Path) -> None:
    stop = {"callbacks": ["jsonl", {"helpers:StopAt": {"step": 4}}]}
    first = "run.amendments=[{at: 2, set: {optimizer.lr: 0.001}}]"
    folder = Path(train(make_config(first, **stop)).folder)
    assert amend(folder, 5, {"gradient_clip": 0.5}, 0) == 5
    with pytest.raises(ConfigError, match=r'config.yaml contains {"at": 5.*the config does not: add it, or leave'):
        train(make_config(first, AUTO))
    both = "run.amendments=[{at: 2, set: {optimizer: {lr: 0.001}}}, {at: 5, set: {gradient_clip: 0.5}}]"
    assert train(make_config(both, AUTO, **stop)).step == 6
    # Another run that resumes from the checkpoint must have the amendments that the checkpoint was trained with.
    branch = ("run.name=branch", f"checkpoint.resume={folder}/checkpoints/step-00000004", "run.max_steps=7")
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError):
        train(make_config(*branch))


def test_a_decay_branch_of_another_run(make_config: MakeConfig, tmp_path: Path) -> None:
    base = ("scheduler={name: constant, warmup_steps: 2}",)
    trunk = Path(train(make_config(*base, "checkpoint.every_steps=3", "checkpoint.keep_last=null")).folder)
    decay = "run.amendments=[{at: 3, set: {scheduler.name: linear, run.max_steps: 5}}]"
    resume = f"checkpoint.resume={trunk}/checkpoints/step-00000003"
    branch = train(make_config(*base, decay, resume, "run.name=branch"))
    anew = train(make_config(*base, decay, "run.name=anew"))
    assert [row["learning_rate"] for row in comparable(anew.folder)] == pytest.approx(
        [1.5e-3, 3e-3, 3e-3, 3e-3, 1.5e-3]
    )
    assert comparable(branch.folder) == comparable(anew.folder)[3:]
    past = "run.amendments=[{at: 2, set: {optimizer.lr: 1}}]"
    with pytest.raises(CheckpointError, match=r"it was trained with run.amendments=\[\], the config has \[{\"at\": 2"):
        train(make_config(*base, past, resume, "run.name=other"))


@pytest.mark.promise
@pytest.mark.parametrize("moment", ["request", "record", "answer"])
def test_the_process_that_takes_a_request_is_killed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed before the record changes, directly after it, and after the answer: the old or the amended config."""
    from myllm_ray.engine import amendments
    from myllm_ray.engine.liveness import heartbeat

    folder = tmp_path / "runs" / "run"
    config = make_config(AUTO, "checkpoint.every_steps=1")
    train(make_config("checkpoint.every_steps=1", callbacks=["jsonl", {"helpers:StopAt": {"step": 2}}]))
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    request = heartbeat.request

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def recorded_then_killed(*given: Any) -> None:
        record(*given)
        kill()

    def answered_then_killed(run: Path, name: str, text: str) -> None:
        request(run, name, text)
        kill()

    if moment == "answer":
        monkeypatch.setattr(amendments, "request", answered_then_killed)
    else:
        monkeypatch.setattr(amendments, "record", kill if moment == "request" else recorded_then_killed)
    # The request arrives while the run starts, so that the first segment of the resumed run finds it.
    claim = amendments.take_requests

    def with_request(given: TrainerConfig) -> TrainerConfig:
        request(folder, "amend-1", json.dumps({"at": "now", "set": {"optimizer.lr": 1e-3}}))
        return claim(given)

    monkeypatch.setattr("myllm_ray.worker.take_requests", with_request)
    assert killed(config.model_dump(mode="json"))
    monkeypatch.undo()
    assert find_activity(folder) is None
    now = yaml.safe_load((folder / "config.yaml").read_text())
    wanted = [] if moment == "request" else [{"at": 2, "set": {"optimizer.lr": 0.001}}]
    assert now["run"].pop("amendments") == wanted
    kept["run"].pop("amendments")
    kept["checkpoint"]["resume"] = "auto"
    kept["callbacks"] = ["jsonl"]
    assert now == kept
    again = train(config)
    assert again.step == 6
    other = train(make_config(f"run.amendments={json.dumps(wanted)}", "run.name=anew"))
    assert comparable(again.folder) == comparable(other.folder)


def test_amendments_of_rollouts(make_config: MakeConfig, tmp_path: Path) -> None:
    """A trainer with several optimizer steps per batch: an amendment between batches, of the batch size too."""
    raw: dict[str, Any] = make_config().model_dump(mode="json")
    del raw["sft"]
    raw |= {
        "trainer": "grpo",
        "data": {"train": {"source": "brackets", "format": "prompt"}, "sequence_length": 32},
        "batch": {"global_size": 4, "micro_size": 2},
        "grpo": {"group_size": 2, "epochs": 2, "reward": "helpers:variety"},
        "rollout": {"max_new_tokens": 4},
    }
    raw["data"]["cache"] = str(tmp_path / "cache")
    raw["run"] |= {"max_steps": 6, "amendments": [{"at": 2, "set": {"optimizer.lr": 1e-3, "batch.global_size": 2}}]}
    whole = train(validate(raw))
    assert whole.step == 6
    assert [row["rows"] for row in ledger(whole.folder)] == [4, 4, 2, 2, 2, 2]
    raw["run"]["name"] = "killed"
    raw["checkpoint"] |= {"resume": "auto"}
    raw["callbacks"] = ["jsonl", {"helpers:KillOnce": {"step": 4, "marker": str(tmp_path / "killed")}}]
    assert killed(raw)
    assert comparable(train(validate(raw)).folder) == comparable(whole.folder)


@pytest.mark.promise
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_on_two_processes(make_config: MakeConfig, tmp_path: Path, backend: str) -> None:
    """Two processes: amended when stopped, with the amendments from the start, and one process within rounding."""
    usual = (f"accelerator.name={backend}", "run.max_steps=7")
    at, values = 3, {"optimizer.lr": 1e-3, "batch": {"global_size": 12}, "scheduler": {"name": "linear"}}
    stop: dict[str, Any] = {"callbacks": ["jsonl", {"helpers:StopAt": {"step": 2}}]}
    (stopped,) = run_all(2, [make_config(*usual, **stop)])
    assert amend(stopped, at, values, 0) == at
    given = f"run.amendments={json.dumps(recorded(stopped))}"
    resumed, anew = run_all(2, [with_recorded(make_config(*usual, AUTO)), make_config(*usual, given, "run.name=anew")])
    same(resumed, anew, 7)
    (alone,) = run_all(1, [make_config("run.max_steps=7", given, "run.name=alone")])
    assert [r["tokens_hash"] for r in ledger(alone)] == [r["tokens_hash"] for r in ledger(anew)]
    for ours, theirs in zip(comparable(anew), comparable(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["learning_rate"] == theirs["learning_rate"]
