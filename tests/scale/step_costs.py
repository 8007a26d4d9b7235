"""Prints what one optimizer step sends, as JSON, for a rank of a process group whose collectives do nothing.

    python step_costs.py '[["fsdp", 1024, 2, {"replicas": 16}]]'

The trainer, the engine and the accelerator are the real ones, on a tiny model. The number of collectives does not
depend on the sizes of the tensors, and the bytes are proportional to the parameters.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.sharding import largest_shard
from myllm_ray.common import distributed
from myllm_ray.common.modules import repeated_blocks
from myllm_ray.common.types import Batch, Position
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.models.load import build_model
from myllm_ray.trainers.pretrain import PretrainTrainer

WIDTH, STEPS, MICROS = 128, 2, 2


class Messages(TorchDispatchMode):
    """Counts the collectives of the process group, and the bytes of the largest tensor of each."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            size = max(t.numel() * t.element_size() for t in tree_leaves(args) if isinstance(t, torch.Tensor))
            name = str(func).split(".")[1].strip("_")
            self.found[name] += 1
            self.bytes[name] += size
            self.largest = max(self.largest, size)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d.allreduce_.default and dist.get_backend() == "fake":
            for tensor in args[0]:  # as if all ranks had the same values
                tensor.mul_(dist.get_world_size())
        return result


class Rows:
    """The same micro-batches in each step: rows of random tokens."""

    sources: ClassVar[list[str]] = []

    def steps_in_epoch(self, epoch: int) -> int:
        return STEPS

    def batches(self, start: Position, steps: int) -> Any:
        ids = torch.randint(0, 250, (2, 32), generator=torch.Generator().manual_seed(0))
        micro = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(32).expand(2, 32)}
        for step in range(steps):
            yield Batch([dict(micro) for _ in range(MICROS)], Position(0, step), Position(0, step + 1), 0)


def measured(backend: str, layers: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Trains `STEPS` steps and returns the collectives of the last one."""
    config = {
        "max_steps": STEPS,
        "gradient_clip": 1.0,
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "accelerator": {"name": backend, "options": settings},
        "checkpoint": {"at_end": False},
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 2 * WIDTH}
    llama = {"model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": layers, **heads}
    model = build_model(ModelSection(config={**llama, "tie_word_embeddings": False}), byte_tokenizer(), 64, 0)
    accelerator: Accelerator = resolve("accelerators", backend, "accelerator.name")(config)
    sizes = padded(model, accelerator.shards)
    engine = TrainerEngine(
        PretrainTrainer(model), accelerator, OptimizerManager(model, config), config=config, stream=Rows()
    )
    engine.setup()
    steps: list[Messages] = []
    run_step = engine._train_batch

    def counted(*given: Any) -> Any:
        with Messages() as messages:
            steps.append(messages)
            return run_step(*given)

    engine._train_batch = counted  # type: ignore[method-assign]
    engine.train()
    last = steps[-1]
    return {"count": dict(last.found), "bytes": dict(last.bytes), "largest": last.largest, **sizes}


def padded(model: torch.nn.Module, shards: int) -> dict[str, int]:
    """Returns the bytes of the blocks and of the other parameters, padded so that the ranks divide them."""
    blocks = {id(p) for block in repeated_blocks(model) for p in block.parameters()}
    found = {"blocks": 0, "root": 0}
    for parameter in model.parameters():
        size = parameter.element_size() * shards * largest_shard(parameter.shape, shards)
        found["blocks" if id(parameter) in blocks else "root"] += size
    return found


def main() -> None:
    """Measures the cases in the argument, a list of (backend, ranks, layers, options), and prints the results."""
    distributed.timeout = lambda: None  # type: ignore[assignment]  # the fake group has none
    for backend, ranks, layers, options in json.loads(sys.argv[1]):
        if backend == "ddp":  # DDP needs results, and its messages do not depend on the number of ranks
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
        print(json.dumps(measured(backend, layers, options)), flush=True)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
