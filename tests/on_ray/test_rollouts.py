"""Preference and rollout trainers on Ray: the same runs as in one process, with and without a killed worker.

Also tests the pools of actors that sample and compute rewards.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeConfig, comparable, ledger, read_jsonl

from myllm_ray import train
from myllm_ray.config.errors import TrainingError
from myllm_ray.trainers.rewards import FunctionReward

pytestmark = pytest.mark.usefixtures("ray_cluster")

GRPO = ("trainer=grpo", "data.train={source: brackets, format: prompt, limit: 40}", "rollout.max_new_tokens=8")
PPO = ("trainer=ppo", *GRPO[1:], "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2, kl_target: 0.5}")
PAIRS = ("data.train={source: brackets, format: preference}",)
TRAINERS: dict[str, tuple[str, ...]] = {
    "reward": ("trainer=reward", *PAIRS),
    "dpo": ("trainer=dpo", "dpo.beta=0.5", *PAIRS),
    "ppo": PPO,
    "grpo": (*GRPO, "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}"),
}
COMMON = (
    "data.validation=null",
    "data.sequence_length=32",
    "run.max_steps=8",
    "optimizer.lr=1e-3",
    "logging.samples_every_steps=2",
    "checkpoint.every_steps=4",
)


@pytest.mark.promise
def test_a_reward_pool_splits_batches_and_replaces_hung_actors() -> None:
    from myllm_ray.orchestration.actor_pools import RewardActors

    pool = RewardActors(
        FunctionReward.Config(function="helpers:judge", workers=2, timeout=2)
    )  # starting an actor takes longer than the timeout
    answers = ["a", "bb", "ccc", "dddd", "eeeee"]
    assert pool(["p"] * 5, answers, {"n": list(range(5))}) == [1, 2, 3, 4, 5]
    with pytest.raises(TrainingError, match="returned nothing within 2 s"):
        pool(["p"] * 2, ["a", "!"], {})
    assert pool(["p"] * 5, answers, {}) == [1, 2, 3, 4, 5], "the actor that hung was replaced"
    with pytest.raises(TrainingError, match="raised ValueError: a question"):
        pool(["p"] * 2, ["?", "a"], {})


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", TRAINERS)
def test_two_workers_killed_or_not(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    """Two workers with ddp, killed after step 6, and with fsdp have the losses of one process.

    The killed ddp run is bitwise equal to the undisturbed ddp run.
    """
    local = train(make_config(*COMMON, *TRAINERS[kind], "run.name=local")).folder
    kill = {"helpers:KillOnce": {"step": 6, "marker": str(tmp_path / "killed")}}
    ddp = ("accelerator.name=ddp", "scaling.workers=2", "scaling.max_failures=1")
    killed = train(make_config(*COMMON, *TRAINERS[kind], *ddp, "run.name=killed", callbacks=["jsonl", kill])).folder
    assert (tmp_path / "killed").exists()
    fsdp = train(
        make_config(*COMMON, *TRAINERS[kind], "accelerator.name=fsdp", "scaling.workers=2", "run.name=fsdp")
    ).folder
    whole = train(make_config(*COMMON, *TRAINERS[kind], *ddp, "run.name=whole")).folder
    assert comparable(killed) == comparable(whole)
    for folder in (killed, fsdp):
        assert ledger(folder) == ledger(local)
        for row, other in zip(comparable(folder), comparable(local), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=2e-5)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "kind", [pytest.param("grpo", marks=pytest.mark.promise), pytest.param("ppo", marks=pytest.mark.slow)]
)
def test_actors_sample_ahead_deterministically(make_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    """Actors sample with weights that are exactly one batch old, and a pool computes the rewards.

    A run that is killed and resumed is bitwise the same, including the batch that was sampled ahead.
    """
    reward = "{function: 'helpers:variety', workers: 2}"
    own = [o.replace("'helpers:variety'", reward) for o in TRAINERS[kind]]
    options = (
        *COMMON,
        *own,
        "accelerator.name=ddp",
        "scaling.workers=1",
        "rollout.placement=actors",
        "scaling.max_failures=1",
    )
    whole = train(make_config(*options, "run.name=whole")).folder
    kill = {"helpers:KillOnce": {"step": 6, "marker": str(tmp_path / "killed")}}
    killed = train(make_config(*options, "run.name=killed", callbacks=["jsonl", kill])).folder
    assert (tmp_path / "killed").exists()
    assert comparable(killed) == comparable(whole)
    assert read_jsonl(Path(killed) / "samples.jsonl") == read_jsonl(Path(whole) / "samples.jsonl")
    local = train(make_config(*COMMON, *TRAINERS[kind], "run.name=local")).folder
    rows, others = comparable(whole), comparable(local)
    assert rows[0]["reward"] == pytest.approx(others[0]["reward"]), (
        "the first batch is sampled with the first weights either way"
    )
    assert [r["importance_ratio"] for r in rows] != [r["importance_ratio"] for r in others]
