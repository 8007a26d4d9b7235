"""Sweeps in Ray Tune: each trial equals the run of `train`, and the data is prepared once.

Members of a population continue from one another's checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable, ledger, read_jsonl

from myllm_ray import train
from myllm_ray.config import UserError, load_config
from myllm_ray.engine.checkpointing.manager import CheckpointManager, read_tensors
from myllm_ray.orchestration.sweeps.results import SweepResult
from myllm_ray.orchestration.sweeps.sweep import sweep

pytestmark = [pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(400)]
STEPS = 8
LR = {"optimizer.lr": {"loguniform": [1e-4, 1e-1]}}


def base_of(make_config: MakeConfig, *overrides: str) -> Any:
    return make_config(f"run.max_steps={STEPS}", *overrides)


def run_of(tmp_path: Path, name: str) -> dict[str, Any]:
    return {"name": name, "storage": str(tmp_path / "sweeps")}


def test_a_trial_equals_a_train_run_and_a_failed_trial_does_not_end_the_sweep(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Four trials run in two reused actors; two of the trials have a schedule that does not exist."""
    space = {"optimizer.lr": {"grid": [1e-3, 1e-2]}, "scheduler.name": {"grid": ["cosine", "nonsense"]}}
    cache = tmp_path / "cache"
    result = sweep(
        base_of(make_config, f"data.cache={cache}"), space, search="grid", max_concurrent=2, run=run_of(tmp_path, "s")
    )

    assert [row["status"] for row in result.trials] == ["done", "failed", "done", "failed"]
    assert all("unknown name 'nonsense'" in row["error"] for row in result.trials if row["status"] == "failed")
    assert result.best is not None
    assert result.exit_reason is None
    table = result.table
    assert list(table.columns) == [
        "trial",
        "optimizer.lr",
        "scheduler.name",
        "loss",
        "status",
        "step",
        "seconds",
        "error",
    ]
    assert table.loc[table["loss"].idxmin(), "trial"] == result.best["trial"]
    assert read_jsonl(Path(result.folder) / "results.jsonl") != []
    assert len(list(cache.glob("tokens-*"))) == 1

    for row in result.trials:  # one of them ran in an actor that had run another trial before
        if row["status"] == "done":
            again = train(
                make_config(
                    f"run.max_steps={STEPS}",
                    f"optimizer.lr={row['values']['optimizer.lr']}",
                    f"run.name=again-{row['trial']}",
                )
            )
            assert comparable(row["folder"]) == comparable(again.folder)
            assert ledger(row["folder"]) == ledger(again.folder)
    assert result.best_yaml is not None
    assert result.best_checkpoint is not None
    best = train(load_config(result.best_yaml))
    assert comparable(best.folder) == comparable(result.best["folder"])
    assert comparable(best.folder)[-1]["loss"] == result.best["score"]
    ours, theirs = (
        read_tensors(Path(result.best_checkpoint)),
        read_tensors(CheckpointManager(folder=Path(best.folder) / "checkpoints").latest()),
    )
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    kept = [row["trial"] for row in result.trials if list(Path(row["folder"]).glob("checkpoints/step-*"))]
    assert kept == [result.best["trial"]]
    assert "nonsense" in (Path(result.folder) / "report.html").read_text()

    with pytest.raises(UserError, match="--resume continues it"):
        sweep(
            base_of(make_config, f"data.cache={cache}"),
            space,
            search="grid",
            max_concurrent=2,
            run=run_of(tmp_path, "s"),
        )
    same = sweep(
        base_of(make_config, f"data.cache={cache}"),
        space,
        search="grid",
        max_concurrent=2,
        run=run_of(tmp_path, "s"),
        resume=True,
    )
    assert same.trials == result.trials  # all trials had already ended


@pytest.mark.slow
def test_all_trials_failing_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all 2 trials failed; the first: .*unknown name 'nonsense'"):
        sweep(
            base_of(make_config),
            {"scheduler.name": {"choice": ["nonsense"]}},
            trials=2,
            max_concurrent=2,
            run=run_of(tmp_path, "none"),
        )


def population(
    make_config: MakeConfig,
    tmp_path: Path,
    name: str,
    *overrides: str,
    steps: int = STEPS,
    every: int = 2,
    members: int = 4,
    at_a_time: int = 2,
) -> SweepResult:
    config = base_of(make_config, f"run.max_steps={steps}", "batch.global_size=4", "batch.micro_size=2", *overrides)
    return sweep(
        config,
        LR,
        scheduler={"pbt": {"every_steps": every}},
        trials=members,
        max_concurrent=at_a_time,
        keep="all",
        run=run_of(tmp_path, name),
    )


def check_population(result: SweepResult, every: int) -> int:
    """Checks that every exchange starts bitwise from the donor's checkpoint; returns the number of exchanges."""
    exchanges = 0
    rows = {row["trial"]: comparable(row["folder"]) for row in result.trials}
    for trial in result.trials:
        for entry in (
            read_jsonl(Path(trial["folder"]) / "lineage.jsonl")
            if (Path(trial["folder"]) / "lineage.jsonl").exists()
            else []
        ):
            exchanges += 1
            step = entry["step"]
            assert step % every == 0
            assert entry["from"] != trial["trial"]
            taken = Path(trial["folder"]) / "checkpoints" / f"step-{step:08d}"
            given = Path(result.folder) / "trials" / entry["from"] / "checkpoints" / f"step-{step:08d}"
            if taken.exists() and given.exists():  # both keep only their newest checkpoints
                ours, theirs = read_tensors(taken), read_tensors(given)
                assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
            # Up to the exchange the metrics are the member's own. The next step starts from the donor's weights,
            # on the same batch, with another learning rate.
            own = {row["step"]: row for row in rows[trial["trial"]]}
            donor = {row["step"]: row for row in rows[entry["from"]]}
            if step + 1 in own and not any(e["step"] == step for e in lineage_of(result, entry["from"])):
                assert own[step + 1]["loss"] == donor[step + 1]["loss"]  # the same weights, before their next update
    return exchanges


def lineage_of(result: SweepResult, trial: str) -> list[dict[str, Any]]:
    path = Path(result.folder) / "trials" / trial / "lineage.jsonl"
    return read_jsonl(path) if path.exists() else []


@pytest.mark.promise
def test_a_population_continues_from_its_best_members_and_is_reproducible(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    first = population(make_config, tmp_path, "first")
    assert check_population(first, 2) >= 1
    assert all([r["step"] for r in comparable(row["folder"])] == list(range(1, STEPS + 1)) for row in first.trials)
    second = population(make_config, tmp_path, "second", at_a_time=1)
    strip = ("seconds", "folder")
    assert [{k: v for k, v in r.items() if k not in strip} for r in second.trials] == [
        {k: v for k, v in r.items() if k not in strip} for r in first.trials
    ]
    for one, other in zip(first.trials, second.trials, strict=True):
        assert comparable(one["folder"]) == comparable(other["folder"])


@pytest.mark.promise
def test_trials_start_from_a_checkpoint_and_stop_early(make_config: MakeConfig, tmp_path: Path) -> None:
    """Compares decay schedules that start from one stable phase, as in WSD; the worse ones are stopped."""
    phase = train(make_config("run.name=stable", "run.max_steps=4", "scheduler.name=constant"))
    forked = sweep(
        base_of(make_config, "run.max_steps=10", "scheduler.name=polynomial"),
        {"scheduler.power": {"choice": [0.5, 1.0, 2.0]}, "optimizer.lr": {"choice": [1e-6, 3e-3]}},
        trials=6,
        metric="learning_rate",
        mode="max",
        scheduler={"asha": {"grace_steps": 6, "reduction_factor": 2}},
        max_concurrent=2,
        fork_from=phase.folder,
        run=run_of(tmp_path, "forked"),
    )
    assert {row["status"] for row in forked.trials} == {"done", "stopped"}
    for row in forked.trials:
        assert [r["step"] for r in comparable(row["folder"])] == list(range(5, row["step"] + 1)), row
        assert ledger(row["folder"])[0]["step"] == 5
    first_losses = {comparable(row["folder"])[0]["loss"] for row in forked.trials}
    assert len(first_losses) == 1  # one set of weights, one batch
    assert forked.best is not None
    assert forked.best["status"] == "done"


@pytest.mark.slow
def test_optuna_learns_from_earlier_trials_and_resumes(make_config: MakeConfig, tmp_path: Path) -> None:
    def search(trials: int, name: str, resume: bool = False) -> SweepResult:
        return sweep(
            base_of(make_config, "run.max_steps=2"),
            LR,
            search="optuna",
            trials=trials,
            max_concurrent=1,
            run=run_of(tmp_path, name),
            resume=resume,
        )

    whole = search(4, "whole")
    assert [row["status"] for row in whole.trials] == ["done"] * 4
    assert len({row["values"]["optimizer.lr"] for row in whole.trials}) == 4
    search(2, "cut")
    cut = search(4, "cut", resume=True)
    assert [row["trial"] for row in cut.trials] == ["0000", "0001", "0002", "0003"]
    assert [row["values"] for row in cut.trials[:2]] == [row["values"] for row in whole.trials[:2]]
    assert len({json.dumps(row["values"]) for row in cut.trials}) == 4  # the sampler knows the first two


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_population_of_worker_groups(make_config: MakeConfig, tmp_path: Path) -> None:
    """4 members, 60 steps, once with ddp on 2 workers and once in one process per member.

    Both have the same exchanges and, up to rounding, the same losses.
    """
    common = ("run.max_steps=60", "logging.every_steps=1")
    alone = population(make_config, tmp_path, "alone", *common, steps=60, every=12)
    assert check_population(alone, 12) >= 2
    groups = population(
        make_config, tmp_path, "groups", *common, "scaling.workers=2", "accelerator.name=ddp", steps=60, every=12
    )
    assert check_population(groups, 12) >= 2
    assert [lineage_of(groups, row["trial"]) for row in groups.trials] == [
        lineage_of(alone, row["trial"]) for row in alone.trials
    ]
    for one, other in zip(groups.trials, alone.trials, strict=True):
        assert [r["loss"] for r in comparable(one["folder"])] == pytest.approx(
            [r["loss"] for r in comparable(other["folder"])], rel=1e-3
        )
