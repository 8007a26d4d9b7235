"""`myllm-ray replay` makes a step again: the same loss, split over rows and documents."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, instruction_rows, read_jsonl

from myllm_ray.common.types import Position
from myllm_ray.config import ConfigError, DataError, TrainingError
from myllm_ray.runs.replay import Replay, replay
from myllm_ray.verify.runs import Runner, Variant
from myllm_ray.worker import run_local

from .test_cli import call

POISONED = 17


def poisoned_rows(folder: Path) -> Path:
    """Rows of ordinary words, and one whose answer is random characters."""
    rows = instruction_rows(40)
    rows[POISONED]["output"] = "".join(random.Random(3).choices("QZXJ#@!%&*09|~^", k=60))
    path = folder / "poisoned.json"
    path.write_text(json.dumps(rows))
    return path


def content_of(folder: Path) -> dict[str, tuple[str, int]]:
    """Returns the hash and the modification time of every file."""
    return {
        str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def step_with(replayed: Replay, document: int, steps: int) -> int:
    """Returns the last step whose batch contains a document."""
    spec, found = replayed.prepared.train, 0
    for number, (epoch, row) in enumerate(spec.positions(Position(), steps), 1):
        rows = spec.plan.rows(epoch, row, row + spec.global_size)
        if any(segment.document == document for row in rows for segment in row):
            found = number
    assert found, "the document is in no batch"
    return found


def check(found: Replay, run: Path) -> None:
    """The parts add up to the step, and the step is the one that the run logged."""
    logged = next(row for row in read_jsonl(run / "metrics.jsonl") if row["step"] == found.step)
    assert found.loss == pytest.approx(logged["loss"], rel=1e-6)
    assert found.grad_norm == pytest.approx(logged["grad_norm"], rel=1e-5)
    assert found.deviations == []
    rows = found.parts.rows
    assert sum(row.loss_sum for row in rows) / found.parts.weight == pytest.approx(found.loss, rel=1e-6)
    assert sum(row.share for row in rows) == pytest.approx(1, abs=1e-6)
    assert sum(row.grad_share for row in rows) == pytest.approx(1, abs=1e-5)
    assert math.hypot(*(norm for _, norm in found.parts.layers)) == pytest.approx(found.grad_norm, rel=1e-5)
    for row in rows:
        if row.documents:
            assert sum(d.loss_sum for d in row.documents) == pytest.approx(row.loss_sum, rel=1e-5, abs=1e-6)
            assert sum(d.targets for d in row.documents) == row.weight


def test_a_step_of_adapters(make_config: MakeConfig) -> None:
    """The checkpoint to begin with holds only the adapters."""
    config = make_config("run.max_steps=4", "checkpoint.every_steps=2", "model.lora={rank: 4}", "data.validation=null")
    run_local(config)
    run = Path(config.run.storage) / config.run.name
    check(replay(run, 4), run)


@pytest.fixture
def poisoned(make_config: MakeConfig, tmp_path: Path) -> Any:
    return make_config(
        f"data.train.path={poisoned_rows(tmp_path)}",
        "run.max_steps=24",
        "optimizer.lr=1e-2",
        "batch.global_size=4",
        "checkpoint.every_steps=4",
        "checkpoint.keep_last=9",
    )


def test_the_poisoned_row_is_first(
    poisoned: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = Path(run_local(poisoned)["folder"])
    before = content_of(run)
    step = step_with(replay(run, 2, gradients=False), POISONED, 24)
    found = replay(run, step)
    check(found, run)
    assert (step - 1) // 4 * 4 == found.start
    worst = found.parts.ranked[0]
    assert POISONED in [document.document for document in worst.documents]
    assert worst.loss_sum == max(row.loss_sum for row in found.parts.rows)
    assert max(worst.documents, key=lambda document: document.loss_sum).document == POISONED
    code, text, _ = call(
        capsys, monkeypatch, "replay", run, "--step", step, "--drop", worst.row, "--output", tmp_path / "step.json"
    )
    assert code == 0
    assert "Q" in text.split(f"row {worst.row}: ")[1], "its text is shown"
    written = json.loads((tmp_path / "step.json").read_text())
    without = written["parts"]["without"]
    assert without["loss"] < written["loss"]
    others = [row for row in found.parts.rows if row is not worst]
    weight = sum(row.weight for row in others)
    assert without["loss"] == pytest.approx(sum(row.loss_sum for row in others) / weight, rel=1e-6)
    assert content_of(run) == before, "the run's folder is only read"


def test_all_rows_dropped_but_one(poisoned: Any) -> None:
    """What is left is the step of that row alone, whose loss and norm come from its own backward pass."""
    run = Path(run_local(poisoned)["folder"])
    rows = replay(run, 6).parts.rows
    kept = rows[1]
    parts = replay(run, 6, drop=[row.row for row in rows if row is not kept]).parts
    assert parts.without is not None
    assert parts.without.loss == pytest.approx(kept.loss, rel=1e-6)
    assert parts.without.grad_norm == pytest.approx(kept.grad_norm * parts.weight / kept.weight, rel=1e-5)


@pytest.mark.promise
@pytest.mark.timeout(600)
def test_a_step_of_two_workers_is_made_again_in_one_process(poisoned: Any, tmp_path: Path, fork_server: None) -> None:
    (trace,) = Runner(poisoned, tmp_path / "fsdp").run([Variant("fsdp", 2, 1, '{"name": "fsdp"}')])
    assert trace.error is None
    check(replay(trace.folder, 7), trace.folder)


RUNS = {
    "dpo": ("trainer=dpo", "data.train={source: brackets, format: preference, limit: 40}"),
    "reward": ("trainer=reward", "data.train={source: brackets, format: preference, limit: 40}"),
    "ppo": (
        "trainer=ppo",
        "data.train={source: brackets, format: prompt, limit: 40}",
        "rollout.max_new_tokens=6",
        "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2, kl_target: 0.5}",
    ),
    "grpo": (
        "trainer=grpo",
        "data.train={source: brackets, format: prompt, limit: 40}",
        "rollout.max_new_tokens=6",
        "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}",
    ),
}


@pytest.mark.parametrize(
    "kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("reward", "ppo")), "grpo"]
)
def test_other_trainers(make_config: MakeConfig, kind: str) -> None:
    run = Path(run_local(make_config(*RUNS[kind], "run.max_steps=4", "checkpoint.every_steps=2"))["folder"])
    check(replay(run, 4), run)


def test_a_step_that_ended_the_run_can_be_replayed(make_config: MakeConfig) -> None:
    config = make_config("optimizer.lr=1e30", "gradient_clip=null", "scheduler.warmup_steps=0")
    with pytest.raises(TrainingError, match="the gradient is not finite"):
        run_local(config)
    run = Path(config.run.storage) / config.run.name
    step = read_jsonl(run / "ledger.jsonl")[-1]["step"]
    found = replay(run, step)
    assert not math.isfinite(found.grad_norm)
    assert not math.isfinite(found.parts.ranked[0].grad_norm)
    text = json.dumps(found.as_json(), allow_nan=False)
    assert json.loads(text)["grad_norm"] is None


def test_wrong_inputs_are_one_line(poisoned: Any, tmp_path: Path) -> None:
    poisoned.run.max_steps = 2
    run = Path(run_local(poisoned)["folder"])
    with pytest.raises(ConfigError, match=r"--step 3: .* has no such step; the steps in its ledger.jsonl: 1 to 2"):
        replay(run, 3)
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it has no config.yaml"):
        replay(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"--drop 99: step 2 has rows 4 to 7"):
        replay(run, 2, drop=[99])
    with pytest.raises(ConfigError, match=r"--drop: no row with a weight is left in the step"):
        replay(run, 2, drop=[4, 5, 6, 7], gradients=False)
    rows = json.loads(Path(poisoned.data.train.path).read_text())
    rows[0]["output"] = "changed"
    Path(poisoned.data.train.path).write_text(json.dumps([*rows, *rows]))
    with pytest.raises(DataError, match=r"its batch is not that of the run .*: the data has changed"):
        replay(run, 2)


def test_a_step_after_an_amendment(make_config: MakeConfig) -> None:
    """The step has the config and the batch of its segment; the step before the amendment has those before."""
    amended = "run.amendments=[{at: 2, set: {optimizer.lr: 1e-3, batch.global_size: 12, batch.micro_size: 3}}]"
    run = Path(
        run_local(make_config("run.max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep_last=9", amended))[
            "folder"
        ]
    )
    for step in (2, 3, 4):
        before = content_of(run)
        found = replay(run, step)
        check(found, run)
        assert (len(found.parts.rows), found.deviations) == (8 if step == 2 else 12, [])
        assert content_of(run) == before
    for number in (1, 2, 3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{number:08d}")
    found = replay(run, 4)  # both segments are trained again
    check(found, run)
    assert (found.start, len(found.parts.rows)) == (0, 12)
