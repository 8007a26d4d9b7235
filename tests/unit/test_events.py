"""`events.jsonl`: what is in it, that it survives kills, and that every event is documented."""

from __future__ import annotations

import ast
import json
import logging
import re
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, MakeConfig, read_jsonl

from myllm_ray import train
from myllm_ray.common.types import Position, RunState
from myllm_ray.config import ConfigError
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.events import (
    EVENTS,
    STREAMED,
    Event,
    EventLog,
    listening,
    make_event,
    recorded_warnings,
)
from myllm_ray.preparation import absolute


def names(folder: str | Path) -> list[str]:
    return [row["event"] for row in read_jsonl(Path(folder) / "events.jsonl")]


class Warns(Callback):
    """Logs a warning at step 2, as a part of the package."""

    def on_step_end(self, state: RunState) -> None:
        if state.step == 2:
            logging.getLogger("myllm_ray.test").warning("step %d is odd", 2)


def test_the_events_of_a_run_and_of_its_resumed_part(make_config: MakeConfig) -> None:
    common = ("evaluation.every_steps=4", "checkpoint.every_steps=2")
    warns = {f"{__name__}:Warns": {}}
    folder = train(make_config("run.max_steps=4", *common, callbacks=[warns, "jsonl"])).folder
    rows = read_jsonl(Path(folder) / "events.jsonl")
    found = [row["event"] for row in rows]
    assert found[:2] == ["start", "phase"]
    assert found[-1] == "end"
    kept = [event for event in found if event not in ("start", "phase", "end")]
    assert kept == ["train_start", "warning", "checkpoint", "evaluation", "checkpoint", "epoch", "attempt"]
    phases = [row["phase"] for row in rows if row["event"] == "phase"]
    assert phases == ["starting", "preparing data", "building the model", "training"]
    assert len({row["run"] for row in rows}) == 1
    for row in rows:
        assert list(row)[:6] == ["version", "time", "run", "rank", "step", "event"]
        assert row["version"] == 1
        assert datetime.fromisoformat(row["time"]).utcoffset().total_seconds() == 0  # type: ignore[union-attr]
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    by_name: dict[str, Any] = {row["event"]: row for row in rows}
    assert (by_name["warning"]["text"], by_name["warning"]["level"]) == ("step 2 is odd", "warning")
    assert (by_name["evaluation"]["step"], by_name["evaluation"]["rank"]) == (4, 0)
    assert by_name["evaluation"]["metrics"]["validation_loss"] > 0
    assert by_name["end"] | {"time": ""} == {
        "version": 1,
        "time": "",
        "run": rows[0]["run"],
        "rank": None,
        "step": 4,
        "event": "end",
        "status": "done",
        "reason": None,
        "checkpoint": str(Path(folder) / "checkpoints" / "step-00000004"),
    }

    again = train(make_config("run.max_steps=6", *common, "checkpoint.resume=auto")).folder
    resumed = read_jsonl(Path(again) / "events.jsonl")
    assert resumed[: len(rows)] == rows, "a resumed run appends"
    assert {row["run"] for row in resumed} == {rows[0]["run"]}, "the id is kept"
    starts = [row["step"] for row in resumed if row["event"] == "train_start"]
    assert starts == [0, 4]


def test_a_refused_run_writes_no_events_and_a_failed_one_says_why(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train(make_config("model.config.hidden_size=7"))
    assert not (tmp_path / "runs" / "run").exists()
    with pytest.raises(ZeroDivisionError):
        train(make_config(callbacks=[f"{__name__}:Fails"]))
    last = read_jsonl(tmp_path / "runs" / "run" / "events.jsonl")[-1]
    assert (last["event"], last["status"], last["reason"]) == ("end", "failed", "ZeroDivisionError: no")


class Fails(Callback):
    def on_step_end(self, state: RunState) -> None:
        raise ZeroDivisionError("no")


def test_interventions_and_rewinds_are_events(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """A rewind ends an attempt in the process: the console shows one run, with one restart."""
    plain = ("data.packing=false", "batch.micro_size=8", "checkpoint.every_steps=2", "run.max_steps=4")
    *_, batch = LocalStream(prepare(absolute(make_config(*plain))).train).batches(Position(), 3)
    marks = [hash(tuple(micro["input_ids"].flatten().tolist())) for micro in batch.micros]
    folder = train(
        make_config(
            *plain,
            "stability.on_spike=rewind",
            trainer="helpers:Poisoned",
            options={"marks": marks, "factor": "nan"},
            callbacks=["jsonl", "console"],
        )
    ).folder
    rows = [row for row in read_jsonl(Path(folder) / "events.jsonl") if row["event"] == "intervention"]
    expected = read_jsonl(Path(folder) / "interventions.jsonl")
    assert [{key: row[key] for key in expected[0]} for row in rows] == expected
    found = names(folder)
    assert [found.count(name) for name in ("start", "train_start", "restart", "end")] == [1, 2, 1, 1]
    out = capsys.readouterr().out
    assert [out.count(text) for text in ("training 4 steps", "resuming from step 2", "step 4/4", "done: 4 steps")] == [
        2,
        1,
        1,
        1,
    ]


def test_a_torn_last_line_does_not_damage_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(json.dumps({"run": "abc", "event": "start"}) + '\n{"run": "abc", "eve')
    events = EventLog(tmp_path)
    events.emit("phase", phase="early")
    assert path.read_text().endswith("eve"), "nothing is written before `open`"
    events.open()
    events.emit("phase", phase="late")
    events.close()
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [(row["run"], row.get("phase")) for row in rows] == [("abc", None), ("abc", "early"), ("abc", "late")]


def test_lines_of_several_writers_are_whole(tmp_path: Path) -> None:
    logs = [EventLog(tmp_path, rank) for rank in (None, 0)]
    for one in logs:
        one.open()

    def write(one: EventLog) -> None:
        for i in range(200):
            one.emit("warning", i, text="x" * 500)

    threads = [threading.Thread(target=write, args=(one,)) for one in logs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_jsonl(tmp_path / "events.jsonl")) == 800


def test_secrets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = EventLog(tmp_path)
    events.open()
    events.emit("warning", text="HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz012345 is wrong")
    assert "hf_abcdefghij" not in (tmp_path / "events.jsonl").read_text()


def test_a_listener_that_fails_is_removed_with_one_warning(warned: list[str]) -> None:
    seen: list[Event] = []

    def fails(event: Event) -> None:
        raise RuntimeError("broken display")

    log = EventLog(None)
    with listening(fails, seen.append), recorded_warnings(log):
        log.emit("phase", phase="a")
        log.emit("phase", phase="b")
    assert [event["event"] for event in seen] == ["phase", "warning", "phase"]
    assert len(warned) == 1
    assert "broken display" in warned[0]


def emitted() -> dict[str, set[str]]:
    """Returns the names of events that the package's code emits: {`EVENTS` or `STREAMED`: names}."""
    found: dict[str, set[str]] = {"emit": set(), "make_event": set()}
    for path in sorted((ROOT / "myllm_ray").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                owner = getattr(
                    getattr(node.func, "value", None), "attr", getattr(getattr(node.func, "value", None), "id", "")
                )
                if name == "make_event" or (name == "emit" and "events" in owner):
                    found[name].add(str(node.args[0].value))
    return found


def test_every_event_that_is_emitted_is_documented_and_the_other_way_round() -> None:
    found = emitted()
    assert found["emit"] == set(EVENTS)
    assert found["make_event"] - set(EVENTS) >= set(STREAMED) - {"message"}, "`message` is a variable in terminal.py"
    assert not set(EVENTS) & set(STREAMED)
    with pytest.raises(KeyError):
        make_event("unknown")
    page = (ROOT / "docs" / "terminal.md").read_text()
    tables = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("## OpenTelemetry")[0], re.M))
    assert tables == {**EVENTS, **STREAMED}, "docs/terminal.md lists the events with these descriptions"
