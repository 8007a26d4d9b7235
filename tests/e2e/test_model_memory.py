"""Peak memory of whole runs, each in a process of its own: full fine-tuning, LoRA and QLoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig

RUN = """
import json, resource, sys
from myllm_ray.config import validate
from myllm_ray.worker import run_local

summary = run_local(validate(json.loads(sys.argv[1])))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak, "loss": summary["metrics"]["loss"]}))
"""
HUNDRED_MILLION = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 16384,
    "tie_word_embeddings": True,
}
"""97.5 million parameters."""
GEMMA_270M = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}


def peak(make_config: MakeConfig, name: str, config: dict[str, Any], length: int, **model: Any) -> int:
    """Returns the peak resident memory in bytes of three steps of SFT, with one row per step."""
    run = make_config(
        f"run.name={name}",
        f"data.sequence_length={length}",
        "data.validation=null",
        "batch={global_size: 1, micro_size: 1}",
        "run.max_steps=3",
        "checkpoint.at_end=false",
        model={"config": config, **model},
    )
    command = [sys.executable, "-c", RUN, run.model_dump_json(by_alias=True)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["loss"] > 0
    print(f"{name}: {found['peak'] / 2**30:.2f} GiB")
    return int(found["peak"])


@pytest.mark.slow
def test_qlora_needs_less_than_45_percent_of_full_fine_tuning(make_config: MakeConfig) -> None:
    full = peak(make_config, "full", HUNDRED_MILLION, 128)
    qlora = peak(make_config, "qlora", HUNDRED_MILLION, 128, lora={"rank": 8}, quantize="nf4")
    assert qlora < 0.45 * full


@pytest.mark.slow
def test_lora_of_a_model_with_a_large_vocabulary_fits_in_6_gib(make_config: MakeConfig) -> None:
    assert peak(make_config, "gemma", GEMMA_270M, 512, lora={"rank": 8}) < 6 * 2**30
