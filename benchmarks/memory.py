"""Measures the peak memory of a worker with each backend and compares it with the prediction for its sharding.

    python benchmarks/memory.py [--workers 2 4] [--device cpu]

A Llama model of about 50 M parameters trains two steps of one short row with AdamW in fp32, so that weights, gradients
and moments (16 bytes per parameter) are almost all of the memory. Each backend runs in separate processes. The values
are the largest anonymous memory (RssAnon; on CUDA the memory that torch allocated), minus that before the model was
built, while the model is built and during the steps. DeepSpeed uses small buckets, and ZeRO-3 releases gathered
parameters immediately: with the defaults, which are meant for larger models, it would keep all parameters of this
model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred
from myllm_ray.verify.certificate import BACKENDS

MODEL = {
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 7,
    "num_attention_heads": 12,
}
SHARDED = {
    "ddp": (0, 16),
    "fsdp": (16, 0),
    "deepspeed-0": (0, 16),
    "deepspeed-1": (12, 8),
    "deepspeed-2": (16, 4),
    "deepspeed-3": (20, 0),
}
"""Bytes per parameter in fp32: (sharded over the workers, on every worker).

DeepSpeed stages 1 and 2 keep fp32 master weights in addition to the fp32 parameters. Stage 3 keeps a buffer for
gradients in addition to the shards.
"""

SMALL_BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": 2_000_000,
        "allgather_bucket_size": 2_000_000,
        "stage3_prefetch_bucket_size": 2_000_000,
        "stage3_max_live_parameters": 8_000_000,
        "stage3_max_reuse_distance": 0,
    }
}


def anonymous() -> int:
    """Returns the anonymous resident memory of this process in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) * 1024


def worker(rank: int, world: int, store: str, name: str, device: str, out: str) -> None:
    """Trains two steps as one rank and writes the memory in bytes to a file."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", init_method=f"file://{store}", rank=rank, world_size=world
    )
    section = {**BACKENDS[name], "device": device, "options": SMALL_BUCKETS if name.startswith("deepspeed") else {}}
    config = {"gradient_clip": None, "accelerator": section, "optimizer": {"name": "adamw", "lr": 1e-4}}
    accelerator: Accelerator = resolve("accelerators", section["name"], "name")(config)
    accelerator.setup()
    model = build_deferred(ModelSection(config=MODEL), byte_tokenizer(), 64, 0)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = torch.ones(1, 64, dtype=torch.int64, device=accelerator.device)
    before, peak, done = anonymous(), 0, False

    def watch() -> None:
        nonlocal peak
        while not done:
            peak = max(peak, anonymous())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    prepared = accelerator.prepare(model, OptimizerManager(model, config).build, SchedulerManager(config=config).build)
    building, peak = peak - before, 0
    if device == "cuda":
        building = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with accelerator.microbatch(last=True):
            accelerator.backward(prepared(input_ids=tokens, labels=tokens).nll_sum / 64)
        accelerator.optimizer_step(None)
    done = True
    thread.join()
    grown = torch.cuda.max_memory_allocated() if device == "cuda" else peak - before
    Path(f"{out}-{rank}").write_text(
        json.dumps({"parameters": parameters, "bytes": grown, "building": building}), encoding="ascii"
    )
    dist.destroy_process_group()


def main() -> None:
    """Measures all backends and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", nargs="+", default=list(SHARDED), choices=list(SHARDED))
    arguments = parser.parse_args()
    # Makes malloc return freed memory to the system immediately. Otherwise the values would include memory that it
    # caches.
    os.environ.update(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    results = []
    print(f"{'backend':12} workers    peak MB/worker    bytes/parameter  predicted  while building")
    for world in arguments.workers:
        for name in arguments.backends:
            with tempfile.TemporaryDirectory() as folder:
                mp.spawn(worker, (world, f"{folder}/store", name, arguments.device, f"{folder}/out"), nprocs=world)
                found = [json.loads(Path(f"{folder}/out-{rank}").read_text(encoding="ascii")) for rank in range(world)]
            building = max(f["building"] for f in found)
            most, parameters = max(f["bytes"] for f in found), found[0]["parameters"]
            sharded, whole = SHARDED[name]
            predicted = sharded / world + whole
            results.append(
                {
                    "backend": name,
                    "workers": world,
                    "bytes": most,
                    "bytes_per_parameter": most / parameters,
                    "predicted": predicted,
                    "building_per_parameter": building / parameters,
                }
            )
            print(
                f"{name:12} {world:7}  {most / 1e6:16.0f}  {most / parameters:17.1f}  {predicted:9.1f}  "
                f"{building / parameters:14.1f}",
                flush=True,
            )
    print(json.dumps({"parameters": parameters, "results": results}))


if __name__ == "__main__":
    main()
