"""Starting on Ray: a run can be stopped before its first step; a user's error in another process is one line.

The line names the place of the error.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig

from myllm_ray import train
from myllm_ray.config import TrainingError
from myllm_ray.engine.liveness.hang_detector import stop
from myllm_ray.engine.liveness.heartbeat import read_driver, read_heartbeats
from myllm_ray.engine.run_folder import folder_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("moment", ["controller", "workers"])
def test_stop_while_workers_start(make_config: MakeConfig, moment: str) -> None:
    """Stops before Ray Train has workers (`controller`), or just before the workers train (`workers`)."""
    config = make_config(
        "accelerator.name=ddp", "scaling.workers=2", callbacks=["jsonl", {"helpers:SlowStart": {"seconds": 100}}]
    )
    folder, found = folder_of(config), dict[str, Any]()

    def work() -> None:
        limit = time.monotonic() + 60
        while time.monotonic() < limit:
            if moment == "workers" and len(read_heartbeats(folder)) == 2:
                break
            if moment == "controller" and (read_driver(folder) or {}).get("phase") == "starting 2 workers":
                time.sleep(1)
                break
            time.sleep(0.05)
        found["asked"] = time.monotonic()
        found["newest"] = stop(folder, 60)

    thread = threading.Thread(target=work)
    thread.start()
    result = train(config)
    took = time.monotonic() - found["asked"]
    thread.join()
    assert took < 25, took
    assert (result.exit.reason, result.step, result.checkpoint, found["newest"]) == ("myllm-ray stop", 0, None, "none")
    assert not (folder / ".ray").exists()
    assert (
        train(make_config("run.name=after", "accelerator.name=ddp", "scaling.workers=2", "run.max_steps=1")).step == 1
    ), "the workers are gone"


@pytest.mark.slow
def test_a_users_bug_names_its_line(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """The error is in a callback on a worker, and in a data format in a task."""
    bug = make_config("accelerator.name=ddp", "scaling.workers=2", callbacks=["jsonl", "helpers:Fails"])
    with pytest.raises(
        TrainingError,
        match=r"^worker \d of 2 that failed: ValueError: mine \(.*helpers.py:\d+ in on_step_end\); the whole "
        r"traceback: .*errors/.*\.txt$",
    ) as caught:
        train(bug)
    assert capsys.readouterr().out.splitlines().count("in step 1") == 1, "what rank 0 prints is shown"
    text = Path(str(caught.value).rpartition(": ")[2]).read_text()
    assert 'raise ValueError("mine")' in text
    assert "loop.py" in text
    bad = make_config(
        "run.name=format", "accelerator.name=ddp", "scaling.workers=2", "data.train.format=helpers:broken"
    )
    with pytest.raises(
        TrainingError,
        match=r"^KeyError: 'nothing' \(.*helpers.py:\d+ in broken\), in the row at .*rows.json: row 0; the whole ",
    ):
        train(bad)
