"""Measures tokens per second and model FLOPs utilization (MFU) of pretraining on one GPU, beside TRL and torchtitan.

    python benchmarks/one_gpu.py [--peak 989] [--steps 12] [--torchtitan 'COMMAND'] [--out FILE]

The model has the shape of Llama 3.2 1B, in bf16 with fp32 master weights, on random documents of 200 to 3000 tokens.
Rows have 4096 tokens (4 per step) and 32768 tokens (1 per step), and each row contains several documents. The sides are
`ours` (accelerator single, `model.attention: sdpa`), `compiled` (the same with `accelerator.compile: blocks`) and `trl`
(SFTTrainer with packing, in bf16), each in a process of its own; the first three steps are not counted.

MFU is tokens/s × FLOPs per token / peak. The FLOPs per token are 6 × parameters of the matrices + 6 × layers × hidden
size × mean document length (causal attention inside documents, forward and backward; Chowdhery et al., 2022,
arXiv:2204.02311, with half of the attention because of the causal mask). `--peak` is the bf16 peak of the GPU in
TFLOP/s; the default is that of an H100 SXM.

`--torchtitan` is a command that trains the same shape with torchtitan 0.3 (`torchrun --nproc-per-node 1 -m
torchtitan.train --module llama3 --config ...`). The script reads `tps:` from the lines that it prints. It is run for
each row length, with `{length}` and `{steps}` replaced.

The script has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from peers import here, interleave, measure, word_tokenizer

SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LAYOUTS = {4096: 4, 32768: 1}
"""Rows per step by row length."""
WARM = 3
WORDS = 4096
"""Number of distinct tokens in the documents."""


def documents(tokens: int) -> list[list[int]]:
    """Returns random documents of 200 to 3000 tokens with at least `tokens` tokens in total."""
    made, found, total = random.Random(0), [], 0
    while total < tokens:
        found.append([made.randrange(4, WORDS) for _ in range(made.randint(200, 3000))])
        total += len(found[-1])
    return found


def flops_per_token(made: list[list[int]]) -> float:
    """Returns the FLOPs of the forward and backward pass per token."""
    width, layers, head = SHAPE["hidden_size"], SHAPE["num_hidden_layers"], SHAPE["head_dim"]
    attention = width * head * (2 * SHAPE["num_attention_heads"] + 2 * SHAPE["num_key_value_heads"])
    matrices = layers * (attention + 3 * width * SHAPE["intermediate_size"]) + width * SHAPE["vocab_size"]
    # A token attends to half of its document on average: the mean over tokens, not over documents.
    mean = sum(len(d) ** 2 for d in made) / sum(len(d) for d in made)
    return 6.0 * matrices + 6.0 * layers * width * mean


def ours(side: str, length: int, made: list[list[int]], steps: int, folder: Path) -> list[float]:
    """Trains with this package and returns the times at the ends of the steps."""
    import torch

    from myllm_ray.common.types import RunState
    from myllm_ray.config.load import validate
    from myllm_ray.engine.callbacks import Callback
    from myllm_ray.worker import run_local

    times: list[float] = []

    class Clock(Callback):
        def on_batch_end(self, state: RunState) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    word_tokenizer(WORDS).save_pretrained(folder / "tokenizer")
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps({'text': ' '.join(f'w{i}' for i in d)})}\n" for d in made))
    config = {
        "trainer": "pretrain",
        "model": {"config": SHAPE, "attention": "sdpa"},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "data": {"train": {"path": str(data)}, "validation": None, "sequence_length": length},
        "batch": {"global_size": LAYOUTS[length], "micro_size": 1},
        "optimizer": {"name": "adamw", "lr": 1e-4, "fused": True},
        "accelerator": {
            "name": "single",
            "device": "cuda",
            "precision": "bf16",
            "compile": "blocks" if side == "compiled" else "none",
        },
        "scaling": {"workers": 0},
        "run": {"name": "bench", "storage": str(folder), "max_steps": steps},
        "checkpoint": {"at_end": False},
        "gradient_clip": 1.0,
    }
    run_local(validate(config), [Clock()])
    return times


def trl(length: int, made: list[list[int]], steps: int, folder: Path) -> list[float]:
    """Trains with TRL's SFTTrainer and returns the times at the ends of the steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), dtype=torch.float32)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=LAYOUTS[length],
        max_steps=steps,
        max_length=length,
        packing=True,
        bf16=True,
        learning_rate=1e-4,
        optim="adamw_torch_fused",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_steps=10_000,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": d} for d in made]),
        processing_class=word_tokenizer(WORDS),
        callbacks=[Clock()],
    )
    trainer.train()
    return times


def run_side(side: str, length: int, steps: int) -> dict[str, float]:
    """Runs one side and returns its tokens per second and its peak memory in GB."""
    import torch

    made = documents(length * LAYOUTS[length] * (steps + 2))
    with tempfile.TemporaryDirectory() as name:
        times = (
            trl(length, made, steps, Path(name)) if side == "trl" else ours(side, length, made, steps, Path(name))
        )[WARM - 1 :]
    return {
        "rate": length * LAYOUTS[length] * (len(times) - 1) / (times[-1] - times[0]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def torchtitan(command: str, length: int, steps: int) -> dict[str, float]:
    """Runs a command of torchtitan and returns the median of the tokens per second that it prints."""
    done = subprocess.run(
        command.replace("{length}", str(length)).replace("{steps}", str(steps)),
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    found = [float(v.replace(",", "")) for v in re.findall(r"tps: ([\d,.]+)", plain)]
    if done.returncode or len(found) <= WARM:
        sys.exit(f"{command} failed, or printed no tps:\n{plain[-2000:]}")
    return {"rate": statistics.median(found[WARM:])}


def main() -> None:
    """Measures all sides, or one side with `--side`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", type=float, default=989.0, help="bf16 peak of the GPU in TFLOP/s, without sparsity")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--torchtitan", metavar="COMMAND")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run_side(given.side, given.length, given.steps)))
        return
    sides = ["ours", "compiled", *(["trl"] if importlib.util.find_spec("trl") else [])]
    if "trl" not in sides:
        print("trl is not installed and not measured: pip install -e '.[bench]'", file=sys.stderr)
    results: dict[str, Any] = {}
    print("| row | | tokens/s | MFU | peak memory, GB |\n|---|---|---|---|---|")
    for length, rows in LAYOUTS.items():
        flops = flops_per_token(documents(length * rows * (given.steps + 2)))
        options = ("--length", str(length), "--steps", str(given.steps))
        calls: dict[str, Any] = {side: partial(measure, here(__file__), side, "gpt2", None, *options) for side in sides}
        if given.torchtitan:
            calls["torchtitan"] = partial(torchtitan, given.torchtitan, length, given.steps)
        for side, found in interleave(calls, given.rounds).items():
            rate = statistics.median(r["rate"] for r in found)
            mfu = rate * flops / (given.peak * 1e12)
            memory = found[-1].get("peak_gb")
            results[f"{length}/{side}"] = {"rates": [r["rate"] for r in found], "mfu": mfu, "peak_gb": memory}
            print(f"| {length} | {side} | {rate:,.0f} | {mfu:.1%} | {'' if memory is None else f'{memory:.1f}'} |")
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
