"""Messages of a resume: old and new values, a jump of the learning rate, and alternatives to a resume."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeConfig

from myllm_ray import train
from myllm_ray.config import CheckpointError

AUTO = "checkpoint.resume=auto"


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Yields the messages that the package logs."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("myllm_ray"), Keep()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def test_a_resume_reports_changed_settings(make_config: MakeConfig, said: list[str]) -> None:
    train(make_config("run.max_steps=3"))
    assert train(make_config("run.max_steps=3", AUTO)).step == 3
    assert not [line for line in said if "resum" in line]
    train(make_config("run.max_steps=4", "optimizer.lr=1e-3", AUTO))
    (line, jump) = [line for line in said if "resum" in line or "jumps" in line]
    assert line == (
        "resuming after step 3 with changed settings: optimizer.lr was 0.003, now it is 0.001; "
        "run.max_steps was 3, now it is 4"
    )
    # Cosine with two warm-up steps: step 3 of 3 has the full rate, step 4 of 4 is half way down.
    assert jump == "the learning rate jumps from 0.003 in step 3 to 0.00055 in step 4"
    said.clear()
    train(make_config("run.max_steps=5", "optimizer.lr=1e-3", "scheduler.name=constant", AUTO))
    assert [line for line in said if "resuming" in line] == [
        "resuming after step 4 with changed settings: scheduler.name was 'cosine', now it is 'constant'; "
        "run.max_steps was 4, now it is 5"
    ]
    assert [line for line in said if "jumps" in line] == [
        "the learning rate jumps from 0.00055 in step 4 to 0.001 in step 5"
    ]


def test_a_finished_cosine_that_is_extended(make_config: MakeConfig, said: list[str]) -> None:
    train(make_config("run.max_steps=6", "scheduler.min_lr_ratio=0"))
    train(make_config("run.max_steps=12", "scheduler.min_lr_ratio=0", AUTO))
    (jump,) = [line for line in said if "jumps" in line]
    assert jump == "the learning rate jumps from 0.000439 in step 6 to 0.00196 in step 7"


def test_old_and_new_values_and_what_to_do(make_config: MakeConfig, tmp_path: Path) -> None:
    folder = Path(train(make_config("run.max_steps=1")).folder)
    with pytest.raises(
        CheckpointError,
        match=r"batch.global_size has changed \(it was 8, now it is 4\).*undo the change, or start a new run",
    ):
        train(make_config("batch.global_size=4", AUTO))
    for change, what in (
        ("data.train.limit=20", r"the data itself .* has changed \(data.train.limit was None, now it is 20\)"),
        ("batch.global_size=4", "it was 8, now it is 4"),
    ):
        with pytest.raises(
            CheckpointError,
            match=what + rf".*start a new stage: leave checkpoint.resume out and give model.name={folder}$",
        ):
            train(make_config(change, f"checkpoint.resume={folder}", "run.name=other"))
