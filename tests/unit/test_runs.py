"""`myllm-ray runs ls` and `show`: lists of generated folders, and what a tiny real run records."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import MakeConfig
from e2e.test_cli import call
from run_folders import beating, write_run

from myllm_ray import cli
from myllm_ray.config import ConfigError
from myllm_ray.engine.environment import source_hash
from myllm_ray.engine.liveness import heartbeat
from myllm_ray.runs.folder import RunFolder, size_of, tail_rows
from myllm_ray.runs.listing import Activity, best_of, list_runs, select
from myllm_ray.runs.overview import differing, overview
from myllm_ray.worker import run_local


def test_the_status_of_each_run(tmp_path: Path) -> None:
    for name, steps, end in (
        ("finished", 3, "done"),
        ("stopped", 2, "done"),
        ("aborted", 2, "aborted: a bad trial"),
        ("preempted", 2, "preempted: SIGTERM"),
        ("failed", 2, "failed: ValueError: mine"),
        ("killed", 2, None),
        ("old", 3, None),
    ):
        write_run(tmp_path / name, steps, end)
    write_run(tmp_path / "of-epochs", 2, None, run={"name": "of-epochs", "epochs": 1, "max_steps": None})
    write_run(tmp_path / "active", 1, None)
    write_run(tmp_path / "dead", 2, "failed: a worker died")  # and its driver was killed in the next attempt
    heartbeat.heartbeat_folder(tmp_path / "dead").mkdir()
    (tmp_path / "dead" / ".heartbeats" / "rank-00000.json").write_text(
        json.dumps({"rank": 0, "beat": 3, "phase": "backward", "host": "n1"})
    )
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("a: [")
    (tmp_path / "damaged" / "environment.json").write_text("{}")
    (tmp_path / ".data").mkdir()
    (tmp_path / "notes").mkdir()
    with beating(tmp_path / "active"):
        found = {s.name: s for s in list_runs(tmp_path)}
    assert {name: s.status for name, s in found.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "aborted": "stopped",
        "preempted": "preempted",
        "failed": "failed",
        "killed": "dead",
        "old": "finished",
        "of-epochs": "ended",
        "active": "active",
        "dead": "dead",
        "damaged": "unreadable",
    }
    assert found["failed"].reason == "ValueError: mine"
    assert found["active"].reason == "training"
    assert "backward on n1" in str(found["dead"].reason)
    assert "config.yaml: can't be read" in str(found["damaged"].reason)
    assert (found["stopped"].step, found["stopped"].total_steps) == (2, 3)
    assert (found["finished"].metric, found["finished"].best, found["finished"].best_step) == ("loss", 3.0, 2)
    assert (found["finished"].backend, found["finished"].workers) == ("ddp", "2")


def test_an_amended_length(tmp_path: Path) -> None:
    """The number of steps and the status are those of the amended config."""
    shorter = {"max_steps": 1000, "amendments": [{"at": 1, "set": {"run.max_steps": 3}}]}
    assert RunFolder(write_run(tmp_path / "a", 3, run=shorter)).total_steps == 3
    longer = {"max_steps": 3, "amendments": [{"at": 3, "set": {"run.max_steps": 9}}]}
    write_run(tmp_path / "b", 5, end=None, run=longer)
    found = {s.name: (s.status, s.total_steps) for s in list_runs(tmp_path)}
    assert found == {"a": ("finished", 3), "b": ("dead", 9)}


def test_the_best_value_is_that_of_keep_best(tmp_path: Path) -> None:
    """`checkpoint.keep_best` keeps the lowest value of any metric."""
    folder = write_run(tmp_path / "a", checkpoint={"keep_best": "reward"})
    rows = [{"step": step, "reward": value} for step, value in ((1, 5.0), (2, 1.0), (3, 7.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").unlink()
    assert best_of(RunFolder(folder)) == ("reward", 1.0, 2)
    assert best_of(RunFolder(folder), "reward")[1] == 1.0


def test_a_second_look_does_not_wait(tmp_path: Path) -> None:
    write_run(tmp_path / "active", 1, None)
    activity = Activity()
    with beating(tmp_path / "active"):
        assert activity.active([tmp_path / "active"])[tmp_path / "active"] is not None
        time.sleep(1.2)
        started = time.monotonic()
        assert activity.active([tmp_path / "active"])[tmp_path / "active"] is not None
        assert time.monotonic() - started < 1


def test_the_summary_is_continued_by_the_end_of_the_metrics(tmp_path: Path) -> None:
    """After a kill, the summary is older than the metrics: the later lines count, too."""
    run = write_run(tmp_path / "r")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 4, "loss": 0.5}) + "\n" + '{"step": 5, "lo')
    found = list_runs(tmp_path)[0]
    assert (found.best, found.best_step) == (0.5, 4)
    named = list_runs(tmp_path, metric="nothing")[0]
    assert (named.metric, named.best) == ("nothing", None)


def test_a_list_reads_little_of_long_runs(tmp_path: Path) -> None:
    """1,000 runs whose records have 1 MB: the list reads some kilobytes of each."""
    lines = 5_000
    metrics = "".join(
        json.dumps({"step": s, "loss": 1 / s, "learning_rate": 1e-3, "x": "y" * 100}) + "\n" for s in range(1, lines)
    )
    ledger = "".join(
        json.dumps({"step": s, "epoch": 0, "row": s, "tokens_hash": "0" * 16}) + "\n" for s in range(1, lines)
    )
    first = write_run(tmp_path / "run-0000")
    (first / "metrics.jsonl").write_text(metrics)
    (first / "ledger.jsonl").write_text(ledger)
    for number in range(1, 1000):
        folder = tmp_path / f"run-{number:04}"
        folder.mkdir()
        for path in first.iterdir():
            os.link(path, folder / path.name)  # one copy on disk; read through 1,000 names
    before = _read_bytes()
    started = time.monotonic()
    found = list_runs(tmp_path)
    seconds = time.monotonic() - started
    assert len(found) == 1000
    assert {s.step for s in found} == {lines - 1}
    assert found[0].bytes > len(metrics)
    per_run = (_read_bytes() - before) / 1000
    assert per_run < 40_000 < len(metrics) / 10, per_run
    assert seconds < 60, seconds


def _read_bytes() -> int:
    """Returns the number of bytes that this process has read with system calls."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar"):
            return int(line.split()[1])
    raise AssertionError("no rchar")


def test_the_tail_of_a_file_with_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"step": s, "text": "x" * 5000}) + "\n" for s in range(4)))
    assert [r["step"] for r in tail_rows(path, 100)] == [3] or tail_rows(path, 100)[-1]["step"] == 3
    assert tail_rows(tmp_path / "none.jsonl") == []


def test_sizes_follow_no_links(tmp_path: Path) -> None:
    run = write_run(tmp_path / "r")
    plain = size_of(run)
    (run / "big").write_bytes(bytes(10_000))
    os.link(run / "big", run / "same")
    (run / "link").symlink_to(tmp_path)
    assert plain + 10_000 <= size_of(run) < plain + 11_000


def test_sorting_and_filters(tmp_path: Path) -> None:
    write_run(tmp_path / "lr-1")
    write_run(tmp_path / "lr-2", 1, "failed: x", trainer="dpo")
    write_run(tmp_path / "other", 2, "done")
    found = list_runs(tmp_path)
    assert [s.name for s in select(found, "name")] == ["lr-1", "lr-2", "other"]
    assert [s.name for s in select(found, "step")] == ["lr-1", "other", "lr-2"]
    assert [s.name for s in select(found, "step", reverse=True)] == ["lr-2", "other", "lr-1"]
    assert [s.best for s in select(found, "best")] == [3.0, 3.0, 4.0]
    assert [s.name for s in select(found, statuses=["failed"])] == ["lr-2"]
    assert [s.name for s in select(found, trainer="sft", name="lr-*")] == ["lr-1"]
    with pytest.raises(ConfigError, match="--sort: unknown value 'x'; choose from age"):
        select(found, "x")
    with pytest.raises(ConfigError, match="--status: unknown value 'done'"):
        select(found, statuses=["done"])


def test_a_sweep_and_its_trials(tmp_path: Path) -> None:
    sweep = tmp_path / "s"
    write_run(sweep / "trials" / "0000")
    write_run(sweep / "trials" / "0001", 1, "failed: x")
    (sweep / "sweep.yaml").write_text(yaml.safe_dump({"base": {"trainer": "sft"}, "metric": "loss", "trials": 3}))
    rows = [{"trial": "0000", "status": "done", "score": 3.0, "step": 2}, {"trial": "0001", "status": "failed"}]
    (sweep / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = list_runs(tmp_path)[0]
    assert (found.kind, found.step, found.total_steps, found.best, found.status) == ("sweep", 2, 3, 3.0, "stopped")
    assert found.trials == []
    assert [t.name for t in list_runs(tmp_path, trials=True)[0].trials] == ["0000", "0001"]


def test_the_command_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "mine")
    code, out, _ = call(capsys, monkeypatch, "runs", "ls", tmp_path / "runs")
    assert code == 0
    for part in ("mine", "sft", "finished", "3/3", "loss 3 @ 2", "2 × ddp"):
        assert part in out, (part, out)
    code, out, _ = call(capsys, monkeypatch, "runs", "ls", tmp_path / "runs", "--json")
    assert json.loads(out)["name"] == "mine"
    code, out, _ = call(capsys, monkeypatch, "runs", "ls", tmp_path / "runs", "--status", "active")
    assert "no runs" in out
    for arguments, said in (
        (["ls", tmp_path / "none"], "no such folder"),
        (["ls", run], "is the folder of a run"),
        (["ls", tmp_path / "runs", "--watch", "--json"], "--watch refreshes a table"),
        (["show", tmp_path], "is not the folder of a run"),
        (["show", run / "config.yaml"], "is a file"),
        (["rm", run, "--keep-last", "1"], "add --checkpoints-only"),
    ):
        code, _, err = call(capsys, monkeypatch, "runs", *arguments)
        assert code == 2
        assert said in err
        assert err.count("\n") == 1


def test_watch_refreshes_until_it_is_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "first")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        write_run(tmp_path / "second")

    monkeypatch.setattr("myllm_ray.cli.runs.time.sleep", sleep)
    code, out, _ = call(capsys, monkeypatch, "runs", "ls", tmp_path, "--watch")
    assert code == 0
    assert len(waits) == 2
    assert "second" in out


def test_only_keys_that_differ_from_their_defaults(make_config: MakeConfig) -> None:
    raw = make_config().model_dump(mode="json")
    found = differing(raw)
    assert found["optimizer.lr"] == 3e-3
    assert found["batch.micro_size"] == 2
    assert "optimizer.name" not in found  # adamw is the default
    assert "checkpoint.keep_last" not in found
    assert not any(key.startswith(("stability", "evaluation", "checkpoint")) for key in found), found


def test_a_real_run_records_its_environment_and_its_end(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("run.max_steps=2", "checkpoint.every_steps=1", "checkpoint.keep_best=loss")
    folder = Path(run_local(config)["folder"])
    run = RunFolder(folder)
    environment = run.environment
    assert environment["interpreter"]["executable"] == sys.executable
    assert environment["packages"]["torch"] == environment["torch"]
    assert environment["code"]["myllm_ray"]["hash"] == source_hash(Path(cli.__file__).parents[1])
    assert environment["hardware"]["threads"] >= 1
    assert environment["data"]["tokens"]
    assert environment["plan"] == {"steps": 2, "tokenizer": environment["plan"]["tokenizer"]}
    assert [(r["from_step"], r["to_step"], r["end"]) for r in run.attempts] == [(0, 2, "done")]
    found = overview(run)
    assert (found.summary.status, found.summary.step, found.summary.total_steps) == ("finished", 2, 2)
    assert [c["step"] for c in found.checkpoints] == [1, 2]
    assert sum(c["best"] for c in found.checkpoints) == 1
    assert {m.name for m in found.metrics} >= {"loss", "grad_norm", "learning_rate", "validation_loss"}

    resumed = make_config("run.max_steps=3", "checkpoint.resume=auto", "callbacks=[jsonl, helpers:Fails]")
    with pytest.raises(ValueError, match="mine"):
        run_local(resumed)
    again = RunFolder(folder)
    assert [(r["from_step"], r["end"]) for r in again.attempts] == [(0, "done"), (2, "failed: ValueError: mine")]
    assert list_runs(folder.parent)[0].status == "failed"
    assert again.environment["code"]["helpers"]["hash"]  # the file of the custom callback


def test_secrets_of_the_environment_are_masked(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("OMP_DYNAMIC", "false")
    folder = Path(run_local(make_config("run.max_steps=1", "checkpoint.at_end=false"))["folder"])
    variables = RunFolder(folder).environment["variables"]
    assert variables["OMP_DYNAMIC"] == "false"
    assert "abcdefgh" not in (folder / "environment.json").read_text()
