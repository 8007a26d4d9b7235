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
SIZES: dict[str, dict[str, Any]] = {
    "activations": {"hidden_size": 512, "layers": 8, "micro_size": 4, "global_size": 4},
    "several micro-batches": {"hidden_size": 256, "layers": 6, "micro_size": 8, "global_size": 16},
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


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_estimate_is_below_the_peak_of_the_process(name: str, tmp_path: Path) -> None:
    """Both processes have imported the same. The peak also contains what the allocator of the CPU keeps."""
    draw, size = random.Random(0), SIZES[name]
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(500)]
    texts = [json.dumps({"text": " ".join(draw.choices(words, k=400))}) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    hidden = size["hidden_size"]
    config = {
        "trainer": "pretrain",
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": hidden,
                "intermediate_size": hidden * 11 // 4,
                "num_hidden_layers": size["layers"],
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
            }
        },
        "tokenizer": {"kind": "bytes"},
        "data": {"train": {"path": str(tmp_path / "texts.jsonl")}, "sequence_length": 512},
        "batch": {"global_size": size["global_size"], "micro_size": size["micro_size"]},
        "run": {"storage": str(tmp_path / "runs"), "max_steps": 3},
        "checkpoint": {"at_end": False},
        "callbacks": ["jsonl"],
    }
    estimated, measured = run(ESTIMATE, config), run(TRAIN, config)["peak"]
    assert 0.6 < estimated["total_memory"] / measured < 1.05, estimated["memory"]
