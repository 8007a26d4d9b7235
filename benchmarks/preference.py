"""Compares the throughput of DPO with that of TRL, in pairs per second on the CPU.

    pip install -e '.[bench]'
    python benchmarks/preference.py [--rounds 3] [--steps 12] [--precision fp32]

Both sides train the same model (6 layers of width 256) on the same random pairs (prompts of 32 to 96 tokens, answers of
24 to 72 tokens) with 8 pairs per step and a frozen copy of the model as the reference. The first step is not counted.
The sides alternate, each in a separate process. The output is one line of JSON with medians per comparison.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import ALLOCATOR, VOCABULARIES, compare, here, model_config, word_tokenizer

BATCH = 8


def pairs(vocabulary: str, count: int) -> list[dict[str, list[int]]]:
    """Returns random pairs of token ids. Each answer ends with the end-of-text token, 1."""
    made = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [made.randrange(4, VOCABULARIES[vocabulary]) for _ in range(made.randint(least, most))]

    return [
        {"prompt": tokens(32, 96), "chosen": [*tokens(24, 72), 1], "rejected": [*tokens(24, 72), 1]}
        for _ in range(count)
    ]


def rate(times: list[float]) -> float:
    """Returns the pairs per second, from the median time of the steps after the first one."""
    return BATCH / statistics.median(b - a for a, b in itertools.pairwise(times))


def ours(vocabulary: str, steps: int, precision: str) -> float:
    """Trains with this package and returns the pairs per second."""
    import torch

    from myllm_ray.accelerators.single import SingleGPUAccelerator
    from myllm_ray.common.allocator import keep_large_blocks
    from myllm_ray.common.types import RunState
    from myllm_ray.config.sections import ModelSection
    from myllm_ray.data.tokenizer import byte_tokenizer
    from myllm_ray.engine.callbacks import Callback
    from myllm_ray.engine.loop import TrainerEngine
    from myllm_ray.engine.optimizer import OptimizerManager
    from myllm_ray.models.load import build_model
    from myllm_ray.models.sharing import shares_prompts
    from myllm_ray.ops.pairs import pair_row
    from myllm_ray.trainers.dpo import DPOTrainer

    keep_large_blocks()
    section = ModelSection(config=model_config(vocabulary))
    model, reference = (build_model(section, byte_tokenizer(), 1024, 0) for _ in range(2))
    times: list[float] = []

    class Clock(Callback):
        def on_step_end(self, state: RunState) -> None:
            times.append(time.perf_counter())

    rows = [pair_row(p["prompt"], p["chosen"], p["rejected"]) for p in pairs(vocabulary, BATCH * steps)]
    trainer = DPOTrainer(model, rows, reference=reference, shared_prompt=shares_prompts(section, 1024))
    config = {
        "max_steps": steps,
        "batch_size": BATCH,
        "gradient_clip": 1.0,
        "optimizer": {"name": "adamw", "lr": 1e-6},
        "accelerator": {"precision": precision},
    }
    torch.set_num_threads(torch.get_num_threads())
    engine = TrainerEngine(
        trainer, SingleGPUAccelerator(config), OptimizerManager(model, config), callbacks=[Clock()], config=config
    )
    engine.setup()
    engine.train()
    return rate(times)


def peer(vocabulary: str, steps: int, precision: str) -> float:
    """Trains with TRL and returns the pairs per second."""
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = word_tokenizer(VOCABULARIES[vocabulary])
    given = model_config(vocabulary)
    torch.manual_seed(0)
    model, reference = (AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)) for _ in range(2))
    reference.load_state_dict(model.state_dict())
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    def text(ids: list[int]) -> str:
        return "".join(f" w{i}" for i in ids)

    rows = [
        {"prompt": text(p["prompt"]), "chosen": text(p["chosen"][:-1]), "rejected": text(p["rejected"][:-1])}
        for p in pairs(vocabulary, BATCH * steps)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-6,
            report_to="none",
            bf16=precision == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            max_length=None,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        trainer = DPOTrainer(
            model,
            reference,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        found = trainer.train_dataset[0]
        lengths = {k: len(v) for k, v in found.items() if k.endswith("ids")}
        wanted = pairs(vocabulary, 1)[0]
        assert len(wanted["prompt"]) in lengths.values() or "input_ids" in lengths, lengths
        trainer.train()
    return rate(times)


def main() -> None:
    """Runs the comparisons, or one side of a comparison with `--side`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", choices=list(VOCABULARIES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = ours if arguments.side == "ours" else peer
        print(json.dumps({"rate": side(arguments.vocabulary, arguments.steps, arguments.precision)}))
        return
    options = ("--steps", str(arguments.steps), "--precision", arguments.precision)
    script = here(__file__)
    assert Path(script).exists()
    for vocabulary in VOCABULARIES:
        for environment in (None, ALLOCATOR) if vocabulary == "gpt2" else (None,):
            compare("dpo", script, vocabulary, arguments.rounds, "pairs/s", options, options, environment)


if __name__ == "__main__":
    main()
