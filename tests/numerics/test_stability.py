"""Poisoned batches are detected before a weight changes, and then skipped or rewinding.

The result is equal on every backend and repeatable.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable, ledger, read_jsonl
from spawned import BACKENDS, SHARED, run_all

from myllm_ray import train
from myllm_ray.common.types import Position
from myllm_ray.config import ConfigError, TrainerConfig, TrainingError
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.engine.checkpointing.manager import CheckpointManager, read_tensors
from myllm_ray.engine.stability import SpikeDetector
from myllm_ray.preparation import absolute
from myllm_ray.runs.replay import replay

BAD = 7
COMMON = ("run.max_steps=10", "evaluation.at_end=false", "checkpoint.every_steps=4", "stability.min_history=3")


def marks_of_step(config: TrainerConfig, step: int) -> list[int]:
    """Returns the hashes by which the helper trainer identifies the micro-batches of a step."""
    *_, batch = LocalStream(prepare(absolute(config)).train).batches(Position(), step)
    return [
        hash(tuple(micro["input_ids"].flatten().tolist())) for micro in batch.micros if (micro["labels"] >= 0).any()
    ]


def poisoned(make_config: MakeConfig, name: str, policy: str, factor: float, *more: str) -> TrainerConfig:
    marks = marks_of_step(make_config(*COMMON), BAD)
    return make_config(
        *COMMON,
        f"run.name={name}",
        f"stability.on_spike={policy}",
        *more,
        trainer="helpers:Poisoned",
        options={"marks": marks, "factor": str(factor)},
    )


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    newest = CheckpointManager(folder=Path(folder) / "checkpoints").latest()
    assert newest is not None
    return read_tensors(newest)


def same(a: str | Path, b: str | Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def left_out(folder: str | Path) -> list[int]:
    return [row["step"] for row in ledger(folder) if "left_out" in row]


def without_records(folder: str | Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "skipped_steps"} for row in comparable(folder)]


@pytest.mark.parametrize("factor", [math.nan, 1e5], ids=["nan", "spike"])
def test_skip_and_rewind_leave_out_one_step_and_nothing_else(make_config: MakeConfig, factor: float) -> None:
    clean = train(
        make_config(*COMMON, "run.name=clean", trainer="helpers:Poisoned", options={"marks": [], "factor": "1"})
    ).folder
    skipped = train(poisoned(make_config, "skipped", "skip", factor)).folder
    rewinding = train(poisoned(make_config, "rewinding", "rewind", factor)).folder
    for folder in (skipped, rewinding):
        assert left_out(folder) == [BAD]
        assert [r["action"] for r in read_jsonl(Path(folder) / "interventions.jsonl")] == [
            Path(folder).name.replace("skipped", "skip").replace("rewinding", "rewind")
        ]
        assert without_records(folder)[: BAD - 1] == without_records(clean)[: BAD - 1]
        strip = [{k: v for k, v in row.items() if k != "left_out"} for row in ledger(folder)]
        assert strip == ledger(clean), "the same batches in every step"
    assert same(skipped, rewinding)
    assert not same(skipped, clean)
    assert without_records(skipped)[BAD:] == without_records(rewinding)[BAD:]
    again = train(poisoned(make_config, "again", "rewind", factor)).folder
    assert comparable(again) == comparable(rewinding)
    assert ledger(again) == ledger(rewinding)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_replay_leaves_out_the_same_step(make_config: MakeConfig, policy: str) -> None:
    run = Path(train(poisoned(make_config, policy, policy, math.nan)).folder)
    before = (run / "interventions.jsonl").read_bytes()
    found = replay(run, BAD + 1)
    assert found.start < BAD - 1, "the bad step is one of the repeated ones"
    assert found.loss == pytest.approx(found.logged["loss"], rel=1e-6)
    assert found.deviations == []
    assert (run / "interventions.jsonl").read_bytes() == before
    if policy == "rewind":  # its second attempt did not compute the step
        with pytest.raises(ConfigError, match=f"--step {BAD}: the run left it out: "):
            replay(run, BAD)


@pytest.mark.parametrize("stop", [5, 8])
def test_a_resume_before_or_after_the_bad_step_changes_nothing(make_config: MakeConfig, stop: int) -> None:
    whole = train(poisoned(make_config, "whole", "rewind", math.nan)).folder
    cut = poisoned(make_config, "cut", "rewind", math.nan, "checkpoint.resume=auto")
    cut.callbacks = ["jsonl", {"helpers:StopAt": {"step": stop}}]
    train(cut)
    folder = train(poisoned(make_config, "cut", "rewind", math.nan, "checkpoint.resume=auto")).folder
    assert comparable(folder) == comparable(whole)
    assert ledger(folder) == ledger(whole)
    assert same(folder, whole)


def test_a_wider_window_is_stepped_over(make_config: MakeConfig) -> None:
    folder = train(poisoned(make_config, "wide", "rewind", math.nan, "stability.window=3")).folder
    assert left_out(folder) == [5, 6, 7]
    assert [r["step"] for r in comparable(folder)] == list(range(1, 11))


def test_stop_and_too_many_interventions(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match=r"step 7: the loss is not finite .* stability.on_spike=stop"):
        train(poisoned(make_config, "stopped", "stop", math.nan))
    bad_from_7_on = [s for step in range(7, 11) for s in marks_of_step(make_config(*COMMON), step)]
    config = poisoned(make_config, "many", "skip", math.nan, "stability.max_interventions=2")
    config.options = {"marks": bad_from_7_on, "factor": "nan"}
    with pytest.raises(TrainingError, match=r"step 9: .* 2 steps were already skipped \(stability.max_interventions\)"):
        train(config)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "backends",
    [
        pytest.param(["fsdp", "deepspeed-2"], id="two", marks=pytest.mark.slow),
        pytest.param(SHARED, id="all", marks=pytest.mark.promise),
    ],
)
def test_every_backend_leaves_out_the_same_step(make_config: MakeConfig, backends: list[str]) -> None:
    """Includes backends that compute the gradient norm inside their step (ZeRO)."""
    cases = {"skip-nan": ("skip", math.nan), "skip-spike": ("skip", 1e5), "rewind-spike": ("rewind", 1e5)}

    def configs(backend: str, options: list[str]) -> list[TrainerConfig]:
        return [poisoned(make_config, f"{case}.{backend}", *how, *options) for case, how in cases.items()]

    expected = dict(zip(cases, run_all(1, configs("single", [])), strict=True))
    assert [left_out(f) for f in expected.values()] == [[BAD]] * 3
    for folder in run_all(2, [c for name in backends for c in configs(name, BACKENDS[name])]):
        reference = expected[folder.name.partition(".")[0]]
        assert left_out(folder) == [BAD], folder.name
        ours, theirs = ([r.get("loss", -1.0) for r in comparable(f)] for f in (folder, reference))
        assert ours == pytest.approx(theirs, rel=1e-5), folder.name
        found = weights(folder)
        for key, tensor in weights(reference).items():
            if key.startswith("model."):
                torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4 * float(tensor.abs().max()))


def test_the_detector_by_hand() -> None:
    """The mean is 2 and the deviation sqrt(2/3), so the limit, 2 + 3 deviations, is 4.449."""
    detector = SpikeDetector(zscore=3.0, history=3, min_history=3)
    for loss in (1.0, 2.0, 3.0):
        assert detector.judge(loss, 1.0) is None
    assert detector.judge(4.46, 1.0) == "the loss 4.46 is 3.0 standard deviations above the last 3 steps"
    assert detector.judge(math.inf, 1.0) == "the loss is not finite (inf)"
    other = SpikeDetector(zscore=3.0, history=3, min_history=3)
    other.load_state_dict(detector.state_dict())
    assert other.judge(4.44, 1.0) is None, "bad steps are not among those it judges by"
    assert "gradient norm" in str(other.judge(3.0, 1.5)), "the smallest deviation of a constant: 1 % of its mean"
