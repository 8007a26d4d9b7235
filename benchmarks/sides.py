"""The sides of `throughput.py`: functions that train one epoch and measure its steps."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from peers import VOCABULARIES, model_config, word_tokenizer

LENGTH, ROWS = 512, 2
"""Tokens per row, and rows per optimizer step."""

Document = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer, which ends with the end-of-text token, 1."""


def documents(vocabulary: str, count: int) -> list[Document]:
    """Returns random documents with log-normal lengths, as instruction data sets have them.

    The median of prompts and of answers is 48 tokens. One answer in six is longer than 130 tokens; the longest have
    384.
    """
    made = random.Random(0)

    def tokens(spread: float, most: int) -> list[int]:
        length = min(most, max(8, round(made.lognormvariate(math.log(48), spread))))
        return [made.randrange(4, VOCABULARIES[vocabulary]) for _ in range(length)]

    return [(tokens(0.5, 128), [*tokens(1.0, 383), 1]) for _ in range(count)]


def text(ids: list[int]) -> str:
    """Returns the text of token ids."""
    return " ".join(f"w{i}" for i in ids)


class Epoch(NamedTuple):
    """One epoch of a side, without its last step, which may have fewer rows than the others or empty ones."""

    times: list[float]
    """Times at the ends of the steps except the last one, in seconds."""
    tokens: float
    """Number of tokens of the documents, without padding, in the steps between the first and the last one."""

    @property
    def rate(self) -> float:
        """Tokens per second, from the end of the first step to the end of the last one but one."""
        return self.tokens / (self.times[-1] - self.times[0])

    @property
    def undisturbed(self) -> float:
        """Tokens per second if all steps took the first quartile of their times."""
        gaps = [b - a for a, b in itertools.pairwise(self.times)]
        return self.tokens / len(gaps) / statistics.quantiles(gaps, n=4, method="inclusive")[0]


def epoch_of(made: list[Document], times: list[float], examples: int, batch: int) -> Epoch:
    """Returns an epoch of steps with `batch` of the `examples` each, except the last step, which may have fewer."""
    tokens = sum(len(p) + len(a) for p, a in made)
    return Epoch(times[:-1], tokens * batch * (len(times) - 2) / examples)


def ours(workload: str, vocabulary: str, made: list[Document], folder: Path) -> Epoch:
    """Trains with this package."""
    from myllm_ray.common.types import RunState
    from myllm_ray.config.load import validate
    from myllm_ray.engine.callbacks import Callback
    from myllm_ray.worker import run_local

    times: list[float] = []
    targets: list[float] = []

    class Clock(Callback):
        def on_batch_end(self, state: RunState) -> None:
            times.append(time.perf_counter())

        def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
            targets.append(metrics["tokens"])

    tokenizer = folder / "tokenizer"
    word_tokenizer(VOCABULARIES[vocabulary]).save_pretrained(tokenizer)
    rows = [
        {"prompt": text(p), "completion": f" {text(a[:-1])}"}
        if workload == "sft"
        else {"text": f"{text(p)} {text(a[:-1])}"}
        for p, a in made
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = {
        "trainer": workload,
        "model": {"config": model_config(vocabulary)},
        "tokenizer": {"path": str(tokenizer)},
        "data": {
            "train": {"path": str(data), "format": "prompt_completion" if workload == "sft" else "text"},
            "validation": None,
            "sequence_length": LENGTH,
        },
        "batch": {"global_size": ROWS, "micro_size": ROWS},
        "optimizer": {"name": "adamw", "lr": 1e-4, "fused": True},
        "accelerator": {"name": "single", "device": "cpu"},
        "scaling": {"workers": 0, "cpus_per_worker": threads()},
        "run": {"name": "bench", "storage": str(folder), "epochs": 1},
        "checkpoint": {"at_end": False},
        "gradient_clip": 1.0,
    }
    run_local(validate(config), [Clock()])
    assert len(times) == len(targets)
    # The metric `tokens` counts targets: those of answers, or all tokens except the first one of each document.
    all_targets = sum(len(a) if workload == "sft" else len(p) + len(a) - 1 for p, a in made)
    return Epoch(times[:-1], sum(targets[1:-1]) / all_targets * sum(len(p) + len(a) for p, a in made))


def threads() -> int:
    """Returns the number of threads of every side."""
    import torch

    return torch.get_num_threads()


def model_of(vocabulary: str) -> Any:
    """Returns the model of the peers, in training mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(vocabulary)), dtype=torch.float32)


def rows_of(workload: str, made: list[Document]) -> list[dict[str, list[int]]]:
    """Returns rows of `LENGTH` tokens: the documents in order, cut (pretraining) or packed in whole (SFT)."""
    rows: list[dict[str, list[int]]] = [{"input_ids": [], "labels": [], "position_ids": []}]
    for prompt, answer in made:
        ids, labels = [*prompt, *answer], [*([-100] * len(prompt)), *answer]
        place = list(range(len(ids)))
        if workload == "pretrain":
            labels = [-100, *ids[1:]]
        elif len(rows[-1]["input_ids"]) + len(ids) > LENGTH:
            rows.append({"input_ids": [], "labels": [], "position_ids": []})
        while ids:
            room = LENGTH - len(rows[-1]["input_ids"])
            for name, values in (("input_ids", ids), ("labels", labels), ("position_ids", place)):
                rows[-1][name] += values[:room]
            ids, labels, place = ids[room:], labels[room:], place[room:]
            if ids:
                rows.append({"input_ids": [], "labels": [], "position_ids": []})
                place = list(range(len(ids)))
    for row in rows:
        rest = LENGTH - len(row["input_ids"])
        row["input_ids"] += [1] * rest
        row["labels"] += [-100] * rest
        row["position_ids"] += range(rest)
    return rows


def bare(workload: str, vocabulary: str, made: list[Document]) -> Epoch:
    """Trains with a loop in plain PyTorch."""
    import torch
    from torch.nn import functional

    rows = rows_of(workload, made)
    model = model_of(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times = []
    for first in range(0, len(rows), ROWS):
        ids, labels, positions = (
            torch.tensor([row[name] for row in rows[first : first + ROWS]])
            for name in ("input_ids", "labels", "position_ids")
        )
        hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        kept = labels[:, 1:] != -100
        loss = functional.cross_entropy(model.lm_head(hidden[:, :-1][kept]), labels[:, 1:][kept])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
    return epoch_of(made, times, len(rows), ROWS)


def in_ray(vocabulary: str, made: list[Document], folder: Path, count: int) -> Epoch:
    """Trains with the bare loop in Ray's TorchTrainer."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    out, scripts = folder / "times.json", str(Path(__file__).resolve().parent)

    def loop() -> None:
        import torch

        sys.path.insert(0, scripts)
        from sides import bare

        torch.set_num_threads(count)
        out.write_text(json.dumps(bare("pretrain", vocabulary, made)))

    ray.init(num_cpus=count, include_dashboard=False, log_to_driver=False)
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": count})
    TorchTrainer(loop, scaling_config=scaling, run_config=RunConfig(storage_path=str(folder), name="peer")).fit()
    ray.shutdown()
    return Epoch(*json.loads(out.read_text()))


def with_trainer(side: str, workload: str, vocabulary: str, made: list[Document], folder: Path) -> Epoch:
    """Trains with transformers' Trainer or TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    tokenizer = word_tokenizer(VOCABULARIES[vocabulary])
    packed = rows_of(workload, made)
    # As many examples a step as the packed rows of a step contain, on average.
    padded = round(len(made) / (len(packed) / ROWS))
    options: dict[str, Any] = {
        "output_dir": str(folder / "peer"),
        "num_train_epochs": 1,
        "learning_rate": 1e-4,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
    }
    model = model_of(vocabulary)
    if side == "hf":
        if workload == "pretrain":
            rows = [{"input_ids": r["input_ids"], "labels": r["labels"]} for r in packed]
        else:
            rows = [{"input_ids": [*p, *a], "labels": [*([-100] * len(p)), *a]} for p, a in made]
        arguments = TrainingArguments(
            per_device_train_batch_size=ROWS if workload == "pretrain" else padded, label_names=["labels"], **options
        )
        trainer: Any = Trainer(
            model,
            arguments,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=Dataset.from_list(rows),
            callbacks=[Clock()],
        )
    else:
        from trl import SFTConfig, SFTTrainer

        rows = [{"input_ids": [*p, *a], "completion_mask": [*([0] * len(p)), *([1] * len(a))]} for p, a in made]
        settings = SFTConfig(
            per_device_train_batch_size=ROWS if side == "trl-packed" else padded,
            packing=side == "trl-packed",
            max_length=LENGTH,
            **options,
        )
        trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    trainer.train()
    batch = trainer.args.per_device_train_batch_size
    return epoch_of(made, times, len(trainer.train_dataset), batch)
