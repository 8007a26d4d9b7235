"""What an optimizer step sends: the collectives and their bytes do not grow with the ranks, as in docs/scaling.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CASES: list[tuple[str, int, int, dict[str, Any]]] = [
    ("fsdp", 8, 2, {}),
    ("fsdp", 1024, 2, {}),
    ("fsdp", 1024, 3, {}),
    ("fsdp", 1024, 2, {"reshard_after_forward": False}),
    ("fsdp", 1024, 2, {"replicas": 16}),
    ("ddp", 1024, 2, {}),
]
MICROS = 2
"""Micro-batches of a rank in a step."""
ENGINE = 3
"""All-reduces of the engine: the weight of the batch, the norm of the gradient, and fingerprints with requests."""
ENGINE_BYTES = 200


@pytest.mark.promise
def test_the_collectives_of_a_step_do_not_grow_with_the_ranks() -> None:
    program = str(Path(__file__).with_name("step_costs.py"))
    said = subprocess.run(
        [sys.executable, "-W", "ignore", program, json.dumps(CASES)], capture_output=True, text=True, check=True
    ).stdout
    found = [json.loads(line) for line in said.splitlines()]
    for (backend, ranks, layers, options), step in zip(CASES, found, strict=True):
        blocks, root = step["blocks"], step["root"]
        case = f"{backend} {ranks} {layers} {options}"
        if backend == "ddp":
            assert step["count"]["allreduce"] <= 2, case  # buckets of 25 MB; the first is smaller
            assert step["bytes"] == {"allreduce": blocks + root}, case
            continue
        # Blocks are gathered for the forward and for the backward pass, and the root unit once for both.
        passes = 1 if options.get("reshard_after_forward") is False else 2
        replicas = layers + 1 if "replicas" in options else 0
        assert step["count"] == {
            "allgather_base": MICROS * (passes * layers + 1),
            "reduce_scatter_base": layers + 1,  # with the last micro-batch
            "allreduce": ENGINE + replicas,
        }, case
        assert step["bytes"]["allgather_base"] == MICROS * (passes * blocks + root), case
        assert step["bytes"]["reduce_scatter_base"] == blocks + root, case
        # The shards of the gradients are summed over the groups of hybrid sharding.
        summed = (blocks + root) * options["replicas"] // ranks if replicas else 0
        assert 0 < step["bytes"]["allreduce"] - summed <= ENGINE_BYTES, case
        assert step["largest"] == max(root, blocks // layers), case
