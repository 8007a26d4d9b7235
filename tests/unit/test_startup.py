"""A run that is starting is visible, can be stopped, and occupies its folder."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig

from myllm_ray import train
from myllm_ray.config import ConfigError, TrainerConfig
from myllm_ray.engine.liveness.hang_detector import stop
from myllm_ray.engine.liveness.heartbeat import asked, find_activity, heartbeat_folder, read_driver, request
from myllm_ray.engine.liveness.startup import Startup, StoppedAtStart
from myllm_ray.engine.run_folder import claim, folder_of

IDENTITY = {"tokens": "1", "rows": "2", "batch.global_size": 8}


def slow_format(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A format that takes one second per row."""
    time.sleep(1)
    return [("a", False), ("b", True)]


def meanwhile(folder: Path, what: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Calls `what` in another thread as soon as the run in `folder` prepares its data.

    Returns the thread and a list that gets the time of the call and its result.
    """
    found: list[Any] = []

    def work() -> None:
        limit = time.monotonic() + 100
        while (read_driver(folder) or {}).get("phase") != "preparing data" and time.monotonic() < limit:
            time.sleep(0.05)
        found.append(time.monotonic())
        found.append(what())

    thread = threading.Thread(target=work)
    thread.start()
    return thread, found


@pytest.mark.parametrize(("how", "reason"), [("stop", "myllm-ray stop"), ("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")])
def test_a_run_that_prepares_its_data_is_stopped_at_once(
    make_config: MakeConfig, tmp_path: Path, how: str, reason: str
) -> None:
    config = make_config(
        f"data.train.format={__name__}:slow_format",
        f"data.cache={tmp_path / 'cache'}",
        f"run.storage={tmp_path / 'new'}",
    )
    folder = folder_of(config)
    ask = (lambda: stop(folder, 60)) if how == "stop" else lambda: os.kill(os.getpid(), getattr(signal, how))
    thread, found = meanwhile(folder, ask)
    handler = signal.getsignal(signal.SIGTERM)
    result = train(config)
    ended = time.monotonic()
    thread.join()
    assert ended - found.pop(0) < 20, "48 rows take a second each"
    assert (result.exit.reason, result.step, result.checkpoint, result.history) == (reason, 0, None, [])
    assert found == (["none"] if how == "stop" else [None])
    assert not (tmp_path / "new").exists(), "nothing half-written"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_starting_run_occupies_its_folder(make_config: MakeConfig) -> None:
    config = make_config()
    with Startup(config, "preparing data"):
        assert find_activity(folder_of(config)) is not None
        claim(config, IDENTITY)  # the folder is occupied by this run itself
        beat = heartbeat_folder(folder_of(config)) / "driver.json"
        beat.write_text(beat.read_text().replace(f'"pid": {os.getpid()}', '"pid": 1'))
    assert find_activity(folder_of(config)) is None


def test_another_process_is_refused_meanwhile(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    monkeypatch.setattr("myllm_ray.engine.run_folder._OLD_WORKERS_SECONDS", 0.1)
    with Startup(config, "preparing data"):
        with pytest.raises(ConfigError, match=r"a run is active there \(preparing data: pid \d+ on .*myllm-ray stop"):
            Startup(config).__enter__()
        assert read_driver(folder_of(config)) is not None, "the first one stays"


def test_replacing_an_earlier_run_keeps_the_heartbeat_and_requests(make_config: MakeConfig) -> None:
    config = make_config("run.overwrite=true")
    folder = folder_of(config)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n")
    with Startup(config, "preparing data") as startup:
        claim(config, IDENTITY)
        assert not (folder / "metrics.jsonl").exists()
        assert not (folder / "checkpoints").exists()
        assert read_driver(folder) is not None
        startup._trains = True  # from here on a stop is a request, not an interruption
        request(folder, "stop", "test")
        claim(config, IDENTITY)
        assert asked(folder) == "test"


def test_in_a_thread_a_stop_is_seen_at_the_next_phase(make_config: MakeConfig) -> None:
    config: TrainerConfig = make_config()
    found: list[Any] = []

    def work() -> None:
        with Startup(config) as startup:
            request(folder_of(config), "stop", "the sweep has ended this trial")
            try:
                startup.phase("building the model")
            except StoppedAtStart as reason:
                found.append(startup.stopped(reason)["exit"].reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    assert found == ["the sweep has ended this trial"]


def test_requests_of_an_earlier_run_do_not_stop_this_one(make_config: MakeConfig) -> None:
    config = make_config("run.max_steps=1")
    request(folder_of(config), "stop", "long ago")
    assert train(config).exit is None


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_prepared(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.storage: .*can't be written"):
        train(make_config(f"run.storage={tmp_path / 'file'}"))
