"""Losses, gradient norms and batch fingerprints of every trainer, compared with those of the last `make golden`.

A refactoring leaves them identical. A commit that changes them runs `make golden` and states the reason.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, MakeConfig, comparable, instruction_rows, ledger
from spawned import BACKENDS, run_all

FILE = ROOT / "tests" / "golden" / "golden.json"
STEPS = 8
COMMON = ("data.validation=null", "checkpoint.at_end=false", f"run.max_steps={STEPS}")
PAIRS = ("data.sequence_length=32", "optimizer.lr=1e-3", "data.train={source: brackets, format: preference}")
PROMPTS = (
    "data.sequence_length=32",
    "optimizer.lr=1e-3",
    "data.train={source: brackets, format: prompt, limit: 30}",
    "rollout.max_new_tokens=8",
    f"rollout.stop={json.dumps(list('aeinorst([{'))}",
)
GPT2 = (
    "model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, "
    "resid_pdrop: 0.1, embd_pdrop: 0.1, attn_pdrop: 0.1}"
)
EXPERTS = (
    "model.config={model_type: mixtral, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 2, num_key_value_heads: 1, num_local_experts: 4, num_experts_per_tok: 2}"
)
RUNS: dict[str, tuple[str, ...]] = {
    "pretrain": ("trainer=pretrain", "data.train={{path: {texts}, format: text}}", "data.sequence_length=64"),
    "sft": ("trainer=sft",),
    "sft with dropout": ("trainer=sft", GPT2),
    "sft with experts": ("trainer=sft", EXPERTS),
    "reward": ("trainer=reward", *PAIRS),
    "dpo": ("trainer=dpo", "dpo.beta=0.5", *PAIRS),
    "kto": ("trainer=dpo", "dpo={loss: kto, beta: 0.5}", *PAIRS[:2], "data.train={source: brackets, format: unpaired}"),
    "ppo": ("trainer=ppo", "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2, kl_target: 0.5}", *PROMPTS),
    "grpo": ("trainer=grpo", "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}", *PROMPTS),
}
WAYS = {"single": 1, "fsdp": 2, "deepspeed-2": 2}
"""Backends, with their number of workers."""


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Any:
    """Yields the content of the golden file; with --update-golden, an empty dictionary that is written at the end."""
    if not request.config.getoption("--update-golden"):
        yield json.loads(FILE.read_text())
        return
    written: dict[str, Any] = {"made_on": machine_of(), "runs": {}}
    yield written
    runs = [f"{json.dumps(name)}: {json.dumps(written['runs'][name])}" for name in sorted(written["runs"])]
    FILE.write_text('{"made_on": ' + json.dumps(written["made_on"]) + ',\n"runs": {\n' + ",\n".join(runs) + "\n}}\n")


def machine_of() -> dict[str, str]:
    """Returns what determines the last bits of a sum: libraries choose their kernels by the CPU."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    cpu = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
    named = " ".join(cpu.get(name, "") for name in ("model name", "cpu family", "model", "stepping"))
    return {
        "cpu": named,
        "flags": hashlib.sha256(cpu.get("flags", "").encode()).hexdigest()[:16],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def steps_of(folder: Path) -> dict[str, list[Any]]:
    rows = comparable(folder)
    return {
        "loss": [row["loss"] for row in rows],
        "grad_norm": [row.get("grad_norm") for row in rows],
        "tokens_hash": [row["tokens_hash"] for row in ledger(folder)],
    }


@pytest.mark.parametrize(
    "way", ["single", *(pytest.param(way, marks=pytest.mark.promise) for way in WAYS if way != "single")]
)
def test_curves_equal_the_golden_ones(
    make_config: MakeConfig, golden: dict[str, Any], tmp_path: Path, way: str
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": " ".join(row.values())}) for row in instruction_rows()))
    configs = [
        make_config(
            *COMMON,
            *(o.format(texts=texts) if "{texts}" in o else o for o in overrides),
            *BACKENDS[way],
            f"run.name={name.replace(' ', '-')}",
        )
        for name, overrides in RUNS.items()
    ]
    for name, folder in zip(RUNS, run_all(WAYS[way], configs), strict=True):
        found, key = steps_of(folder), f"{name}, {way}"
        assert len(found["loss"]) == len(found["tokens_hash"]) == STEPS
        expected = golden["runs"].setdefault(key, found)
        if golden["made_on"] == machine_of():
            assert found == expected, key
        else:  # another summation order: equal within rounding, on the same batches
            assert found["tokens_hash"] == expected["tokens_hash"], key
            for quantity in ("loss", "grad_norm"):
                assert found[quantity] == pytest.approx(expected[quantity], rel=1e-3, abs=1e-6), (key, quantity)
