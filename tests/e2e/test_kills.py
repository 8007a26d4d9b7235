"""SIGKILL where an off-by-one error would appear: around the end of an epoch and of the run.

No batch is skipped or trained twice. (verl #7401: an epoch is skipped after a resume on its boundary.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import comparable, ledger
from harness import EPOCH, STEPS, job_config, killed

from myllm_ray import train


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def whole(shared: Path) -> str:
    return train(
        job_config(shared, "whole", "scaling.workers=0", "accelerator.name=single", "callbacks=[jsonl]")
    ).folder


@pytest.mark.parametrize(
    ("moment", "callback"),
    [
        ("the last step of an epoch, trained", {"helpers:KillOnce": {"step": EPOCH}}),
        ("the last step of an epoch, saved", {"helpers:KillAtCheckpoint": {"step": EPOCH}}),
        ("the first step of the next", {"helpers:KillOnce": {"step": EPOCH + 1}}),
        ("the first step of the next, saved", {"helpers:KillAtCheckpoint": {"step": EPOCH + 1}}),
        ("the last step of the run, trained", {"helpers:KillOnce": {"step": STEPS}}),
        ("the last step of the run, saved", {"helpers:KillAtCheckpoint": {"step": STEPS}}),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
def test_killed_at(shared: Path, whole: str, moment: str, callback: dict[str, dict[str, Any]]) -> None:
    name = moment.replace(" ", "-").replace(",", "")
    (options,) = callback.values()
    every = "checkpoint.every_steps=1" if "saved" in moment else "checkpoint.every_steps=3"
    config = job_config(shared, name, "scaling.workers=0", "accelerator.name=single", every)
    config["callbacks"] = ["jsonl", {kind: {**options, "marker": str(shared / f"{name}.killed")} for kind in callback}]
    assert killed(config)
    again = train(config)
    assert again.step == STEPS
    assert comparable(again.folder) == comparable(whole)
    assert ledger(again.folder) == ledger(whole)
