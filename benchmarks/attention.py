"""Measures a training step on packed rows: attention with a mask, and attention within documents.

    python benchmarks/attention.py [--width 2048] [--documents 10] [--rounds 7] [--precision fp32] [--threads 2]

Each round makes one step (forward, backward and optimizer) with `model.attention: sdpa`, which is what `auto` uses for
short rows, and one with `per_document`, in alternating order. The rows have different cuts in each round, the same for
both. Prints the medians, and the median and the range of the ratios of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from myllm_ray.common.types import Micro
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.load import build_model
from myllm_ray.ops.segments import restarting_positions
from myllm_ray.trainers.causal_lm import CausalLMTrainer

MODEL = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def row(width: int, documents: int, seed: int) -> Micro:
    """Returns a micro-batch of one row of `width` tokens, cut into documents of random lengths."""
    generator = torch.Generator().manual_seed(seed)
    cuts = (torch.randperm(width - 1, generator=generator)[: documents - 1] + 1).sort().values
    lengths = torch.cat([torch.tensor([0]), cuts, torch.tensor([width])]).diff().tolist()
    ids = torch.randint(0, MODEL["vocab_size"], (1, width), generator=generator)  # type: ignore[call-overload]
    positions = torch.from_numpy(restarting_positions(lengths, width)).long()[None]
    return {"input_ids": ids, "labels": torch.where(positions == 0, -100, ids), "position_ids": positions}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("width", 2048), ("documents", 10), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = build_model(ModelSection(config=MODEL), byte_tokenizer(), given.width, 0)
    trainer, optimizer = CausalLMTrainer(model), torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def step(kind: str, micro: Micro) -> tuple[float, float]:
        trainer.document_kernel = "per_document" if kind == "per_document" else None
        started = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"):
            loss = trainer.train_step(trainer.prepare_micro(micro)).loss_sum
        (loss / given.width).backward()
        optimizer.step()
        return time.perf_counter() - started, float(loss.detach()) / given.width

    kinds = ("sdpa", "per_document")
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(given.rounds + 1):
        micro = row(given.width, given.documents, number)
        for kind in kinds if number % 2 else kinds[::-1]:
            seconds, loss = step(kind, micro)
            if number:  # the first round warms up
                times[kind].append(seconds)
    ratios = [b / a for a, b in zip(times["sdpa"], times["per_document"], strict=True)]
    size = f"{given.width} tokens, {given.documents} documents, {given.precision}, {given.threads} threads"
    print(f"{size}, {given.rounds} rounds, last loss {loss:.4f}")
    for kind in kinds:
        print(f"{kind:>14}: median {statistics.median(times[kind]):.3f} s")
    print(f"{'ratio':>14}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
