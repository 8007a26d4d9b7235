"""Trackers: config, the position in the run's files, restarts, and libraries that fail."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, read_jsonl
from tracker_classes import Recording

from myllm_ray.common.types import RunState
from myllm_ray.config import ConfigError
from myllm_ray.config.errors import UserError
from myllm_ray.engine.configured import build_callbacks
from myllm_ray.engine.reporting.trackers.base import Point, Tracker, numbered
from myllm_ray.engine.reporting.trackers.delivery import Delivery, JSONTail
from myllm_ray.engine.reporting.trackers.process import read_state
from myllm_ray.runs.candidates import config_candidates
from myllm_ray.runs.replay import replay
from myllm_ray.runs.reruns import for_rerun
from myllm_ray.verify.certificate import shrink
from myllm_ray.worker import run_local


def write_rows(folder: Path, steps: range, resumed: int = 0, factor: float = 1.0) -> None:
    """Writes metrics.jsonl as an attempt that resumes from `resumed` and logs `steps`."""
    path = folder / "metrics.jsonl"
    kept = [row for row in read_jsonl(path) if row["step"] <= resumed] if path.exists() else []
    new = [{"step": i, "epoch": 0, "loss": factor / i, "grad_norm": 1.0, "time": 1e9 + i} for i in steps]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *new]))


def deliver(folder: Path, tracker: Tracker, resumed: int = 0) -> list[dict[str, Any]]:
    """Delivers what there is, as one process does, and returns all calls so far."""
    delivery = Delivery(tracker, folder, "x", resumed)
    while delivery.deliver(final=True):
        pass
    delivery.finish("finished")
    return read_jsonl(folder / "calls.jsonl")


def steps_of(calls: list[dict[str, Any]]) -> list[int]:
    return [call["step"] for call in calls if call["call"] == "metrics"]


@pytest.mark.parametrize(
    ("tracking", "message"),
    [
        (["wandbb"], "tracking: unknown name 'wandbb'; did you mean wandb?"),
        ([{"name": "wandb", "projekt": "x"}], "tracking.wandb: unknown key projekt: did you mean project?"),
        ([{"name": "wandb", "api_key": "x"}], "credentials are read from the environment"),
        ([{"name": "mlflow", "uri": "http://me:hunter2@host"}], "credentials are read from the environment"),
        ([{"name": "mlflow", "registered_model": "m"}], "set artifacts: last"),
        ([{"project": "x"}], "the name of the tracker is missing"),
        (["helpers:KillOnce"], "must be a subclass of myllm_ray.Tracker"),
    ],
)
def test_a_wrong_config_is_one_line(make_config: MakeConfig, tracking: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_config(tracking=tracking)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "hunter2" not in str(error.value)


def test_the_callbacks_of_trackers(make_config: MakeConfig) -> None:
    config = make_config(tracking="tensorboard", callbacks=[])
    assert [type(c).__name__ for c in build_callbacks(config)] == ["JSONLCallback", "TensorBoardTracker"]
    several = [Recording(), Recording(), Recording()]
    assert [tracker.key for tracker in numbered(several)] == ["recording", "recording-2", "recording-3"]


def test_a_missing_library_is_one_line(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(UserError, match=r"needs wandb: pip install 'myllm_ray\[tracking\]'"):
        build_callbacks(make_config(tracking=["wandb"]))


def test_no_tracker_is_imported_before_it_is_used() -> None:
    code = (
        "import sys\nfrom myllm_ray.config.resolve import SHORT_NAMES, load_object\n"
        "for path in SHORT_NAMES['trackers'].values():\n    load_object(path, '')()\n"
        "import myllm_ray.engine.reporting.trackers.delivery\n"
        "assert not {'wandb', 'mlflow', 'trackio', 'tensorboard', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_points_keep_non_finite_values() -> None:
    point = Point.of({"step": 2, "time": 5.0, "loss": math.nan, "kl": math.inf, "note": "x", "flag": True})
    assert (point.step, point.time, point.metrics["kl"]) == (2, 5.0, math.inf)
    assert math.isnan(point.metrics["loss"])
    assert point.metrics.keys() == {"loss", "kl"}


def test_a_resumed_run_has_neither_gap_nor_duplicate(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 8))
    deliver(tmp_path, Recording())
    write_rows(tmp_path, range(4, 11), resumed=3)  # steps 4 to 7 are trained again
    calls = deliver(tmp_path, Recording(), 3)
    assert steps_of(calls) == list(range(1, 11))
    assert not any(call["call"] == "supersede" for call in calls)


def test_what_the_tracker_has_not_stored_is_sent_again(tmp_path: Path) -> None:
    class Forgetful(Recording):
        def open(self, run: Any, saved: dict[str, Any], step: int) -> int | None:
            super().open(run, saved, step)
            return min(step, 4)  # its process was killed before it stored steps 5 to 7

    write_rows(tmp_path, range(1, 8))
    deliver(tmp_path, Recording())
    write_rows(tmp_path, range(7, 10), resumed=6)
    calls = deliver(tmp_path, Forgetful(), 6)
    assert steps_of(calls) == [*range(1, 8), *range(5, 10)]


def test_steps_trained_again_with_other_results_start_a_new_run(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 8))
    deliver(tmp_path, Recording())
    write_rows(tmp_path, range(4, 9), resumed=3, factor=2.0)  # as after a rewind, or with another learning rate
    calls = deliver(tmp_path, Recording(), 3)
    new = calls[[call["call"] for call in calls].index("supersede") + 1 :]
    assert (new[0]["call"], new[0]["id"], new[0]["step"]) == ("open", 1, -1)
    assert steps_of(new) == list(range(1, 9))
    assert [call["loss"] for call in new if call["call"] == "metrics"][3:] == [2 / i for i in range(4, 9)]


def test_a_call_that_raises_is_made_again(tmp_path: Path) -> None:
    class Once(Recording):
        failed = False

        def log_metrics(self, points: list[Point]) -> None:
            if not Once.failed:
                Once.failed = True
                raise ConnectionError("the server is down")
            super().log_metrics(points)

    write_rows(tmp_path, range(1, 5))
    delivery = Delivery(Once(), tmp_path, "x", 0)
    with pytest.raises(ConnectionError):
        delivery.deliver()
    delivery.retry()
    delivery.deliver()
    assert steps_of(read_jsonl(tmp_path / "calls.jsonl")) == [1, 2, 3, 4]


def test_samples_are_sent_when_their_batch_is_complete(tmp_path: Path) -> None:
    write_rows(tmp_path, range(1, 3))
    answers = tmp_path / "samples.jsonl"
    answers.write_text('{"step": 2, "answer": "a"}\n{"step": 2, "ans')
    delivery = Delivery(Recording(), tmp_path, "x", 0)
    delivery.deliver()
    assert "samples" not in [call["call"] for call in read_jsonl(tmp_path / "calls.jsonl")]
    answers.write_text('{"step": 2, "answer": "a"}\n{"step": 2, "answer": "b"}\n')
    write_rows(tmp_path, range(1, 4))
    delivery.deliver()
    assert {"call": "samples", "step": 2, "rows": 2} in read_jsonl(tmp_path / "calls.jsonl")


def in_a_process(folder: Path, tracker: Tracker, resumed: int = 0) -> None:
    """Runs a tracker as the engine does."""
    state = RunState(step=resumed, folder=str(folder))
    tracker.on_train_start(state)
    tracker.on_log(state, {})
    tracker.on_train_end(state)
    tracker.close()


def test_a_tracker_that_raises_is_reported_once(tmp_path: Path, warned: list[str]) -> None:
    from tracker_classes import Broken

    write_rows(tmp_path, range(1, 5))
    in_a_process(tmp_path, Broken(wait_seconds=4))
    assert [w for w in warned if "planted" in w and "training continues" in w] == warned[:1]
    assert "4 of 4 logged steps were not delivered" in warned[1]
    assert len(warned) == 2
    assert all(
        "hunter2secret" not in text for text in [*warned, *map(Path.read_text, (tmp_path / "trackers").iterdir())]
    )


def test_a_tracker_that_hangs_is_ended_and_a_resume_sends_the_rest(tmp_path: Path, warned: list[str]) -> None:
    from tracker_classes import Hanging

    write_rows(tmp_path, range(1, 5))
    in_a_process(tmp_path, Hanging(wait_seconds=3))
    assert len(warned) == 1
    assert "4 of 4 logged steps were not delivered" in warned[0]
    recording = Recording()
    recording.key = "hanging"
    in_a_process(tmp_path, recording, 4)
    calls = read_jsonl(tmp_path / "calls.jsonl")
    assert steps_of(calls) == [1, 2, 3, 4]
    assert calls[-1] == {"call": "finish", "status": "finished"}
    assert read_state(tmp_path, "hanging")["step"] == 4


def test_a_tracker_that_crashes_is_started_again_and_then_given_up(tmp_path: Path, warned: list[str]) -> None:
    from tracker_classes import Crashing

    write_rows(tmp_path, range(1, 5))
    tracker = Crashing(wait_seconds=1)
    state = RunState(folder=str(tmp_path))
    tracker.on_train_start(state)
    while tracker._process is not None and tracker._process._process is not None:
        tracker._process._process.wait()
        tracker.on_log(state, {})
    tracker.on_train_end(state)
    tracker.close()
    assert "ended with code 3" in warned[0]
    assert "ended 4 times; no more records are sent" in warned[1]
    assert "4 of 4 logged steps were not delivered" in warned[2]
    assert len(warned) == 3


def test_tensorboard_discards_steps_that_are_trained_again(tmp_path: Path) -> None:
    """Read by TensorBoard's own reader. The second attempt has other values from step 4 on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from myllm_ray import TensorBoardTracker

    (tmp_path / "config.yaml").write_text("trainer: sft\n")
    write_rows(tmp_path, range(1, 8))
    in_a_process(tmp_path, TensorBoardTracker())
    write_rows(tmp_path, range(4, 11), resumed=3, factor=2.0)
    in_a_process(tmp_path, TensorBoardTracker(), 3)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    loss = reader.Scalars("loss")
    assert [event.step for event in loss] == list(range(1, 11))
    expected = [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert [event.value for event in loss] == pytest.approx(expected)
    assert [event.wall_time for event in loss] == [1e9 + i for i in range(1, 11)]
    assert "trainer: sft" in reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_runs_made_by_the_program_have_no_tracker(make_config: MakeConfig, tmp_path: Path) -> None:
    """They would appear beside the user's runs."""
    config = make_config("tracking=[tensorboard]", "run.max_steps=2")
    assert shrink(config, 2)[0].tracking == []
    assert for_rerun(config.model_dump(mode="json"))["tracking"] == []
    run_local(config)
    assert replay(Path(config.run.storage) / config.run.name, 2).deviations == []
    candidates, neutral = config_candidates({"tracking": []}, {"tracking": ["wandb"]})
    assert (candidates, len(neutral)) == ([], 1)


def test_lines_that_a_resumed_run_writes_again_are_read_again(tmp_path: Path) -> None:
    """Regression: after a shorter line the reader was inside the next one, which it dropped."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "time": 10.25}\n')
    tail = JSONTail(path)
    assert [row["step"] for row in tail.read(10)] == [1, 2]
    assert tail.read(10) == []
    path.write_text('{"step": 1}\n{"step": 2, "time": 11.5}\n{"step": 3}\n')
    assert [row["step"] for row in tail.read(2)] == [1, 2]
    assert tail.restarted
    assert [row["step"] for row in tail.read(2)] == [3]
    assert not tail.restarted
    path.write_text('{"step": 1}\n')
    assert [row["step"] for row in tail.read(2)] == [1]
