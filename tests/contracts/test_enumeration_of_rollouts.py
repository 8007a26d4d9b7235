"""Every combination of rollout settings on every backend; see test_enumeration.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig, comparable
from enumeration import Job, _process, compare, failures, options, report, run, start
from spawned import BACKENDS, start_processes

from myllm_ray.config import validate
from myllm_ray.config.sections import Section
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.ppo import PPOTrainer

ROLLOUTS = [
    "data.sequence_length=32",
    "data.train.format=prompt",
    "data.validation.format=prompt",
    "batch={global_size: 4, micro_size: 1}",
    "optimizer={name: sgd, lr: 0.1}",
    "scheduler={name: constant}",
    "checkpoint.at_end=false",
    "gradient_clip=null",
    f"rollout={{max_new_tokens: 5, stop: {json.dumps(list('aeinorst'))}}}",
]


def rollout_overrides(trainer: str, settings: dict[str, Any], *further: str) -> list[str]:
    given = {
        "reward": ["helpers:variety"],
        "kl_weight": 0.05,
        **settings,
        **({"group_size": 3} if trainer == "grpo" else {}),
    }
    return [
        *ROLLOUTS,
        f"trainer={trainer}",
        f"{trainer}={json.dumps(given)}",
        f"run.max_steps={2 * settings['epochs'] * settings['minibatches']}",
        *further,
    ]


def check_rollouts(
    make_config: MakeConfig,
    files: tuple[Path, Path, Path],
    trainer: str,
    combinations: list[tuple[dict[str, Any], str]],
) -> tuple[int, dict[str, str], list[str]]:
    """Compares each combination in one process with a run on a backend with one answer per forward pass."""
    local: list[Job] = []
    shared: list[Job] = []
    pairs: list[tuple[Path, Path]] = []
    refused: dict[str, str] = {}
    for number, (settings, backend) in enumerate(combinations):
        plain = start(make_config, files, rollout_overrides(trainer, settings, f"run.name={trainer}-{number}-plain"))
        other = start(
            make_config,
            files,
            rollout_overrides(
                trainer, settings, f"run.name={trainer}-{number}-{backend}", "rollout.micro_size=1", *BACKENDS[backend]
            ),
        )
        if isinstance(plain, str) or isinstance(other, str):
            refused[f"{settings}"] = plain if isinstance(plain, str) else str(other)
            continue
        local.append(plain)
        (local if backend == "single" else shared).append(other)
        pairs.append((folder_of(validate(other[0])), folder_of(validate(plain[0]))))
    run(local)
    if shared:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_process, (2, f"{folder}/store", shared), 2)
    return len(pairs), refused, [line for other, plain in pairs for line in (*failures(plain), *compare(other, plain))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(("trainer", "section"), [("ppo", PPOTrainer.Config), ("grpo", GRPOTrainer.Config)])
def test_rollouts_everywhere(
    make_config: MakeConfig,
    preference_files: tuple[Path, Path, Path],
    capsys: pytest.CaptureFixture[str],
    trainer: str,
    section: type[Section],
    part: int,
) -> None:
    """The backends alternate, so that each value of each setting runs on each backend."""
    names = list(BACKENDS)
    chosen = [(settings, names[(i + i // 8 + i // 64) % len(names)]) for i, settings in enumerate(options(section))]
    trained, refused, wrong = check_rollouts(make_config, preference_files, trainer, chosen[part::4])
    report(capsys, trainer, trained, refused)
    assert wrong == []


def test_rollouts_in_one_process(make_config: MakeConfig, preference_files: tuple[Path, Path, Path]) -> None:
    """A quick subset: the last combination of each trainer."""
    for trainer, section in (("ppo", PPOTrainer.Config), ("grpo", GRPOTrainer.Config)):
        trained, _, wrong = check_rollouts(make_config, preference_files, trainer, [(options(section)[-1], "single")])
        assert (trained, wrong) == (1, [])
    rows = comparable(Path(make_config().run.storage) / "grpo-0-plain")
    assert 0 < sum(row["ended"] for row in rows) < len(rows), "some answers end and some do not"
