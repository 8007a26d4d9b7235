"""Training with preferences or rewards improves a small model that a short supervised run leaves mostly wrong.

Uses three fixed seeds; run with `make test-slow`. With LEARNING_OUT=FILE each run also appends its curve to FILE as a
JSON line, from which tests/learning/draw.py draws docs/learning.svg.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from myllm_ray import train
from myllm_ray.cli.export import export
from myllm_ray.config import validate

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
SFT_STEPS = {"arithmetic": 60, "brackets": 30}
ONLINE: dict[tuple[str, str], dict[str, Any]] = {
    ("grpo", "arithmetic"): {"steps": 400, "batch": (32, 32), "lr": 3e-4, "settings": {"group_size": 8}, "new": 4},
    ("grpo", "brackets"): {"steps": 300, "batch": (16, 16), "lr": 3e-4, "settings": {"group_size": 8}, "new": 10},
    ("ppo", "arithmetic"): {
        "steps": 600,
        "batch": (64, 64),
        "lr": 3e-4,
        "settings": {"epochs": 2, "kl_weight": 0.01},
        "new": 4,
    },
    ("ppo", "brackets"): {
        "steps": 600,
        "batch": (64, 64),
        "lr": 3e-4,
        "settings": {"epochs": 2, "kl_weight": 0.01},
        "new": 10,
    },
}


def sft(folder: Path, task: str, seed: int) -> str:
    """Trains a short supervised run; returns the folder of the exported model."""
    raw = {
        "trainer": "sft",
        "model": {"config": MODEL},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"source": task, "format": "prompt_completion"},
            "sequence_length": 32,
            "packing": False,
            "cache": str(folder / "data"),
        },
        "batch": {"global_size": 32, "micro_size": 32},
        "optimizer": {"lr": 1e-3},
        "callbacks": ["jsonl"],
        "run": {"name": f"sft-{task}-{seed}", "storage": str(folder), "max_steps": SFT_STEPS[task], "seed": seed},
    }
    result = train(validate(raw))
    export(Path(result.folder), folder / f"model-{task}-{seed}")
    return str(folder / f"model-{task}-{seed}")


def remember(name: str, task: str, seed: int, history: list[dict[str, Any]], metric: str, seconds: float) -> None:
    if path := os.environ.get("LEARNING_OUT"):
        curve = [(row["step"], round(row[metric], 4)) for row in history if metric in row]
        with open(path, "a") as file:
            file.write(
                json.dumps(
                    {
                        "trainer": name,
                        "task": task,
                        "seed": seed,
                        "metric": metric,
                        "seconds": round(seconds, 1),
                        "curve": curve,
                    }
                )
                + "\n"
            )


@pytest.mark.timeout(480)
@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_learns_preferences(tmp_path: Path, seed: int) -> None:
    """Held-out preference accuracy rises from 50 % to over 85 %."""
    model = sft(tmp_path, "brackets", seed)
    started = time.perf_counter()
    raw = {
        "trainer": "dpo",
        "model": {"name": model},
        "tokenizer": {"path": model},
        "data": {
            "train": {"source": "brackets", "format": "preference"},
            "validation": {"split": 0.2},
            "sequence_length": 32,
            "cache": str(tmp_path / "data"),
        },
        "batch": {"global_size": 32, "micro_size": 32},
        "optimizer": {"lr": 3e-4},
        "scheduler": {"name": "cosine", "warmup_steps": 10},
        "run": {"name": "dpo", "storage": str(tmp_path), "max_steps": 200, "seed": seed},
        "callbacks": ["jsonl"],
        "evaluation": {"every_steps": 25, "at_start": True},
        "dpo": {"beta": 0.1},
    }
    history = train(validate(raw)).history
    accuracy = [row["validation_rewards/accuracies"] for row in history if "validation_rewards/accuracies" in row]
    remember("dpo", "brackets", seed, history, "validation_rewards/accuracies", time.perf_counter() - started)
    assert accuracy[0] == pytest.approx(0.5, abs=0.05)
    assert accuracy[-1] > 0.85


@pytest.mark.timeout(480)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "task"), ONLINE)
def test_rewards_improve(tmp_path: Path, name: str, task: str, seed: int) -> None:
    """Training closes at least half of the gap to the perfect mean reward of 1."""
    how, model = ONLINE[name, task], sft(tmp_path, task, seed)
    started = time.perf_counter()
    raw = {
        "trainer": name,
        "model": {"name": model},
        "tokenizer": {"path": model},
        "data": {
            "train": {"source": task, "format": "prompt"},
            "sequence_length": 16 + how["new"],
            "cache": str(tmp_path / "data"),
        },
        "batch": {"global_size": how["batch"][0], "micro_size": how["batch"][1]},
        "optimizer": {"lr": how["lr"]},
        "scheduler": {"name": "linear", "warmup_steps": 10, "min_lr_ratio": 0.1},
        "run": {"name": name, "storage": str(tmp_path), "max_steps": how["steps"], "seed": seed},
        "callbacks": ["jsonl"],
        "rollout": {"max_new_tokens": how["new"]},
        "checkpoint": {"at_end": False},
        name: {"reward": f"myllm_ray.data.builtin.tasks:{task}_reward", **how["settings"]},
    }
    history = train(validate(raw)).history
    remember(name, task, seed, history, "reward", time.perf_counter() - started)
    rewards = [row["reward"] for row in history]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-20:]) / 20
    assert first < 0.5, "the supervised run was meant to leave it wrong most of the time"
    assert last >= first + 0.5 * (1 - first), (first, last)
