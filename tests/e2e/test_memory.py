"""The stream reads data larger than its memory limit, and its peak memory does not grow with the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import json, re, resource, sys, threading, time
import numpy, pyarrow, torch
from myllm_ray.common.types import Position
from myllm_ray.config import validate
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.tokenizer import byte_tokenizer

# Import what is imported when first used: torch by the config of the trainer, pandas by pyarrow.
byte_tokenizer()("")
pyarrow.array(numpy.zeros(1))

def anonymous():
    "Returns the bytes of memory that are not backed by a file."
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

def private():
    return int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

limit = int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (private() + limit, private() + limit))
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)

thread = threading.Thread(target=watch, daemon=True)  # an error must end the process
thread.start()
config = validate(json.loads(sys.argv[1]))
spec = prepare(config).train
batches = sum(1 for _ in LocalStream(spec, 0, 1).batches(Position(), spec.steps_in_epoch(0)))
done = True
thread.join()
print(json.dumps({"grown": peak - before, "tokens": spec.plan.store.tokens, "batches": batches}))
"""
MEGABYTE = 2**20


def stream(folder: Path, megabytes: int, limit: int) -> dict[str, Any]:
    """Writes a data set, then prepares and reads it in a separate process.

    `limit` is the memory in megabytes that the process may use in addition; 0 means no limit.
    """
    path = folder / f"{megabytes}.jsonl"
    text = "the quick brown fox jumps over the lazy dog; " * 45
    with open(path, "w") as file:
        for i in range(megabytes * 512):
            file.write(json.dumps({"text": f"{i} {text}"}) + "\n")
    config = {
        "trainer": "pretrain",
        "model": {"name": "unused"},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(path), "format": "text"},
            "sequence_length": 4096,
            "cache": str(folder / "cache"),
            "shuffle": "window",
            "shuffle_window": 2048,
        },
        "batch": {"global_size": 16, "micro_size": 16},
        "run": {"max_steps": 1},
    }
    result = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(config), str(limit * MEGABYTE)],
        capture_output=True,
        text=True,
        check=False,
    )
    path.unlink()
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(json.loads(result.stdout))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_DATA")
@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    small, large = stream(tmp_path, 5, 0), stream(tmp_path, 20, 0)
    assert large["tokens"] > 3.5 * small["tokens"]
    assert large["grown"] < small["grown"] + 16 * MEGABYTE, (small, large)
    limit = 112
    limited = stream(tmp_path, 36, limit)
    assert 4 * limited["tokens"] > 1.2 * limit * MEGABYTE, "the prepared data is larger than the limit"
