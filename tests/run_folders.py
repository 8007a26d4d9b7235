"""Generated folders of runs, and the command line in this process."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from myllm_ray.engine.checkpointing.verification import manifest_checksum, sha256
from myllm_ray.engine.liveness import heartbeat
from myllm_ray.engine.reporting.jsonl import MetricRanges


def write_run(folder: Path, steps: int = 3, end: str | None = "done", **config: Any) -> Path:
    """Writes the files of a run, as a run writes them."""
    folder.mkdir(parents=True)
    raw = {
        "trainer": "sft",
        "model": {"name": "m"},
        "accelerator": {"name": "ddp"},
        "scaling": {"workers": 2},
        "run": {"name": folder.name, "max_steps": 3},
        "checkpoint": {},
        **config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0"}))
    ranges = MetricRanges()
    rows = [{"step": s, "epoch": 0, "loss": 5.0 - s if s < 3 else 9.0, "time": 1.0 * s} for s in range(1, steps + 1)]
    for row in rows:
        ranges.add(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    ledger = [{"step": s, "epoch": 0, "row": s, "rows": 1, "tokens_hash": f"{s:016x}"} for s in range(1, steps + 1)]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ledger))
    (folder / "summary.json").write_text(json.dumps({"step": ranges.step, "metrics": ranges.found}))
    if end is not None:
        row = {"workers": 2, "from_step": 0, "to_step": steps, "end": end, "time": time.time()}
        (folder / "attempts.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@contextmanager
def beating(run: Path) -> Iterator[None]:
    """Writes heartbeats of a driver, as an active run does."""
    end = threading.Event()

    def work() -> None:
        beat = 0
        while not end.wait(0.1):
            beat += 1
            content = {"beat": beat, "phase": "training", "pid": os.getpid() + 1, "host": socket.gethostname()}
            heartbeat.heartbeat_folder(run).mkdir(exist_ok=True)
            heartbeat.write_atomic(heartbeat.heartbeat_folder(run) / "driver.json", json.dumps(content), durable=False)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.3)
    try:
        yield
    finally:
        end.set()
        thread.join()


def with_averages(run: Path, target: Path) -> Path:
    """Copies a run and adds the averages of its trained parameters to its checkpoint: twice the weights."""
    shutil.copytree(run, target)
    checkpoint = next((target / "checkpoints").iterdir())
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        with safe_open(checkpoint / name, "pt") as file:
            metadata, tensors = file.metadata(), {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        sharding = json.loads(metadata["DCP_SHARDING_INFO"])
        for n in [n for n in tensors if n.startswith("model.")]:
            added = "ema." + n.removeprefix("model.")
            tensors[added] = tensors[n] * 2
            sharding[added] = sharding[n]
            manifest["tensors"][added], manifest["index"][added] = manifest["tensors"][n], manifest["index"][n]
        save_file(tensors, checkpoint / name, metadata={**metadata, "DCP_SHARDING_INFO": json.dumps(sharding)})
        manifest["files"][name] = {
            "sha256": sha256(checkpoint / name),
            "bytes": (checkpoint / name).stat().st_size,
        }
    manifest["checksum"] = manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    return target
