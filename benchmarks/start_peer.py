"""The peer of benchmarks/start.py: a plain TorchTrainer with the same model and rows, without this package.

    python benchmarks/start_peer.py JOB.json

The file contains the arguments (see `start.py`). Rank 0 appends the time of each step to a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def loop(job: dict[str, Any]) -> None:
    """Trains a worker's part of the rows with AdamW, a linear schedule and a clipped gradient."""
    import time

    import numpy as np
    import torch
    from ray.train.torch import prepare_model
    from transformers import AutoConfig, AutoModelForCausalLM

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(0)
    model = prepare_model(AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["model"])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, job["steps"])
    rows = np.memmap(job["tokens"], np.int32, "r").reshape(-1, job["length"])
    order = np.random.default_rng(0).permutation(len(rows))
    with open(job["times"], "a", encoding="utf-8") as times:
        for step in range(job["steps"]):
            first = step * job["batch"] % len(rows)
            batch = rows[order[first + rank : first + job["batch"] : world]]
            ids = torch.from_numpy(batch.astype(np.int64))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if rank == 0:
                print(f"step {step + 1} loss {loss.item():.4f}", file=sys.stderr)
                times.write(f"{time.time()}\n")
                times.flush()
    if rank == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, job["checkpoint"])


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    TorchTrainer(
        loop,
        train_loop_config=job,
        scaling_config=ScalingConfig(num_workers=job["workers"]),
        run_config=RunConfig(storage_path=job["storage"]),
    ).fit()
