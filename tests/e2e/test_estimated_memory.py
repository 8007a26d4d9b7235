"""The estimated memory of a run, compared with the peak of a process that trains it."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

ESTIMATE = """
import json, sys
from myllm_ray.config import validate
import myllm_ray.worker
from myllm_ray.verify.estimate import estimate
print(json.dumps(estimate(validate(json.load(sys.stdin))).as_json()))
"""
TRAIN = """
import json, resource, sys
from myllm_ray.config import validate
from myllm_ray.worker import run_local
run_local(validate(json.load(sys.stdin)))
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def sizes(hidden: int, layers: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}


LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 4}
GPT2_TOKENS = 50_257
RUNS: dict[str, dict[str, Any]] = {
    "untied": {"model": {"config": {**LLAMA, **sizes(512, 8)}}, "batch": [4, 4]},
    "several micro-batches": {"model": {"config": {**LLAMA, **sizes(256, 6)}}, "batch": [16, 8]},
    "tied, vocabulary of GPT-2": {
        "model": {"config": {**LLAMA, **sizes(256, 4), "vocab_size": GPT2_TOKENS, "tie_word_embeddings": True}},
        "batch": [8, 4],
    },
    "GPT-2 with dropout": {
        "model": {
            "config": {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "vocab_size": GPT2_TOKENS}
        },
        "batch": [4, 4],
    },
    "activation checkpointing": {
        "model": {"config": {**LLAMA, **sizes(512, 8)}},
        "batch": [8, 8],
        "accelerator": {"activation_checkpointing": "full"},
    },
}


def run(script: str, config: dict[str, Any]) -> dict[str, Any]:
    """Runs a script in a new process with a config, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def config_of(name: str, folder: Path) -> dict[str, Any]:
    """Returns the config of a run whose storage, and so whose prepared data, is `folder`."""
    given = {"accelerator": {}, **RUNS[name]}
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(500)]
    texts = [json.dumps({"text": " ".join(draw.choices(words, k=400))}) for _ in range(40)]
    folder.mkdir()
    (folder / "texts.jsonl").write_text("\n".join(texts))
    return {
        "trainer": "pretrain",
        "model": given["model"],
        "accelerator": given["accelerator"],
        "tokenizer": {"kind": "bytes"},
        "data": {"train": {"path": str(folder / "texts.jsonl")}, "sequence_length": 512},
        "batch": dict(zip(("global_size", "micro_size"), given["batch"], strict=True)),
        "run": {"storage": str(folder / "runs"), "max_steps": 4},
        "checkpoint": {"at_end": False},
        "callbacks": ["jsonl"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_the_peak_of_the_process(name: str, tmp_path: Path) -> None:
    """Each process prepares its own data. Both have imported the same when they measure."""
    estimated = run(ESTIMATE, config_of(name, tmp_path / "estimated"))
    measured = run(TRAIN, config_of(name, tmp_path / "trained"))["peak"]
    assert estimated["total_memory"] == pytest.approx(measured, rel=0.1), estimated["memory"]
