"""Compares the throughput of GRPO and PPO with that of TRL, in samples per second on the CPU.

    pip install -e '.[bench]'
    python benchmarks/rl.py [--rounds 3] [--steps 6] [--lengths ended] [--vocabulary 4k] [--ppo-python PYTHON]

Both sides start from the same model (6 layers of width 256), with the same prompts and batch. The model is first
trained for about a minute to end its answers after about 20 tokens, since a model that ends its answers is the usual
starting point. With `--lengths full` it is not trained, and nearly all answers have the full length. An answer has at
most 48 tokens. A step has 32 answers: with GRPO 8 for each of 4 prompts, with PPO one for each of 32 prompts. There is
a reference model with a KL term, and the reward is a function of the text. The first two steps are not counted. The
sides alternate, each in a separate process. The output is one line of JSON per comparison, with medians and the mean
length of the answers of each side.

The last version of TRL with PPO is 0.29. `--ppo-python` is the Python interpreter of a virtual environment with
trl==0.29.1 and the version of transformers that it requires. Without this option, PPO is not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import VOCABULARIES, compare, here, model_config, word_tokenizer

ANSWERS, GROUP, LONGEST, PROMPT, WORDS = 32, 8, 48, 24, 300


def prompts(vocabulary: str, count: int) -> list[list[int]]:
    """Returns `count` random prompts of token ids."""
    made = random.Random(0)
    return [[made.randrange(4, WORDS) for _ in range(PROMPT)] for _ in range(count)]


def rate(times: list[float], steps_per_batch: int = 1) -> float:
    """Returns the answers per second, from the median time of the batches after the first two."""
    times = times[steps_per_batch - 1 :: steps_per_batch]
    return ANSWERS / statistics.median(b - a for a, b in itertools.pairwise(times[1:]))


def text(ids: list[int]) -> str:
    """Returns the text of token ids."""
    return "".join(f" w{i}" for i in ids)


def judge(prompts: Any, completions: Any, **_: Any) -> list[float]:
    """Rewards each completion with the number of its distinct characters, divided by its length."""
    return [len(set(c)) / max(1, len(c)) for c in completions]


def initial_model(vocabulary: str, folder: Path, ends: bool) -> None:
    """Writes the initial model to a folder in Hugging Face format.

    Args:
        vocabulary: A key of `VOCABULARIES`.
        folder: The folder.
        ends: Whether to train the model on answers of 1 to 40 random tokens, each followed by the end token.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model_config(vocabulary)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    made = random.Random(1)
    for _ in range(100 if ends else 0):
        rows, labels = [], []
        for _ in range(8):
            length = made.randint(1, 40)
            ids = [made.randrange(4, WORDS) for _ in range(PROMPT + length)]
            rows.append([*ids, 1] + [1] * (40 - length))
            labels.append([-100] * PROMPT + ids[PROMPT:] + [1] + [-100] * (40 - length))
        loss = model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 2
    model.save_pretrained(folder)
    word_tokenizer(VOCABULARIES[vocabulary]).save_pretrained(folder)


def ours(algorithm: str, vocabulary: str, steps: int, folder: Path) -> tuple[float, float]:
    """Trains with this package; returns the answers per second and their mean length in tokens."""
    import torch

    from myllm_ray.accelerators.single import SingleGPUAccelerator
    from myllm_ray.common.allocator import keep_large_blocks
    from myllm_ray.common.types import RunState
    from myllm_ray.config.sections import ModelSection
    from myllm_ray.config.trainers import RolloutSection
    from myllm_ray.engine.callbacks import Callback
    from myllm_ray.engine.loop import TrainerEngine
    from myllm_ray.engine.optimizer import OptimizerManager
    from myllm_ray.models.generate import HFSampler
    from myllm_ray.models.load import build_model
    from myllm_ray.trainers.grpo import GRPOTrainer
    from myllm_ray.trainers.ppo import PPOTrainer
    from myllm_ray.trainers.rewards import FunctionReward

    keep_large_blocks()
    tokenizer = word_tokenizer(VOCABULARIES[vocabulary])
    section = ModelSection(name=str(folder))
    times: list[float] = []
    lengths: list[float] = []

    class Clock(Callback):
        def on_step_end(self, state: RunState) -> None:
            times.append(time.perf_counter())

        def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
            lengths.append(metrics["length"])

    sampler = HFSampler(tokenizer, RolloutSection(max_new_tokens=LONGEST))
    reward = FunctionReward(FunctionReward.Config(function="judge"), judge)
    group = GROUP if algorithm == "grpo" else 1
    rows = [
        {"input_ids": p, "segment_ids": [0] * PROMPT, "documents": [i], "places": [i % (ANSWERS // group)]}
        for i, p in enumerate(prompts(vocabulary, ANSWERS // group * steps))
    ]
    model = build_model(section, tokenizer, 1024, 0, "causal_lm" if algorithm == "grpo" else "actor_critic")
    reference = build_model(section, tokenizer, 1024, 0)
    if algorithm == "grpo":
        trainer: Any = GRPOTrainer(
            model, rows, sampler=sampler, rewards=[reward], reference=reference, group_size=GROUP, kl_weight=0.04
        )
    else:
        trainer = PPOTrainer(
            model, rows, sampler=sampler, rewards=[reward], reference=reference, epochs=1, kl_weight=0.05
        )
    config = {
        "max_steps": steps,
        "batch_size": ANSWERS // group,
        "gradient_clip": 1.0,
        "optimizer": {"name": "adamw", "lr": 1e-6},
    }
    torch.set_num_threads(torch.get_num_threads())
    engine = TrainerEngine(
        trainer, SingleGPUAccelerator(config), OptimizerManager(model, config), callbacks=[Clock()], config=config
    )
    engine.setup()
    engine.train()
    return rate(times), statistics.mean(lengths)


def peer_grpo(vocabulary: str, steps: int, model: Path) -> tuple[float, float]:
    """Trains with GRPO of TRL; returns the answers per second and their mean length in tokens."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=ANSWERS,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            max_steps=steps,
            learning_rate=1e-6,
            beta=0.04,
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        rows = [{"prompt": text(p)} for p in prompts(vocabulary, ANSWERS // GROUP * steps)]
        trainer = GRPOTrainer(
            str(model),
            reward_funcs=judge,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(VOCABULARIES[vocabulary]),
            callbacks=[Clock()],
        )
        trainer.train()
        logged = [
            row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row
        ]
    return rate(times), statistics.mean(logged)


def peer_ppo(vocabulary: str, steps: int, model: Path) -> tuple[float, float]:
    """Trains with PPO of TRL 0.29; returns the answers per second and NaN instead of their mean length.

    PPO of TRL requires a reward model. A tiny model is used, so that its time is negligible.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    given = {**model_config(vocabulary), "pad_token_id": 2}
    torch.manual_seed(0)
    policy, reference = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    value.config.pad_token_id = 2
    small = {
        **given,
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    judge_model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**small, num_labels=1))
    tokenizer = word_tokenizer(VOCABULARIES[vocabulary])
    tokenizer.padding_side = "left"
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            times.append(time.perf_counter())

    rows = Dataset.from_list([{"input_ids": p} for p in prompts(vocabulary, ANSWERS * steps)])
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=ANSWERS,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=1,
            local_rollout_forward_batch_size=ANSWERS,
            response_length=LONGEST,
            total_episodes=ANSWERS * steps,
            learning_rate=1e-6,
            report_to="none",
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            num_sample_generations=0,
            stop_token="eos",
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=judge_model,
            value_model=value,
            train_dataset=rows,
            eval_dataset=rows.select(range(2)),
            callbacks=[Clock()],
        )
        trainer.train()
    return rate(times), float("nan")  # TRL does not log the lengths with PPO


def main() -> None:
    """Runs the comparisons, or one side of a comparison with `--side`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--ppo-python", help="Python interpreter of an environment with trl==0.29.1")
    parser.add_argument("--algorithm", choices=["grpo", "ppo"])
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--vocabulary", choices=list(VOCABULARIES))
    parser.add_argument("--lengths", choices=["ended", "full"], default="ended")
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.side == "ours":
            found, length = ours(arguments.algorithm, arguments.vocabulary, arguments.steps, arguments.model)
        else:
            peer = peer_grpo if arguments.algorithm == "grpo" else peer_ppo
            found, length = peer(arguments.vocabulary, arguments.steps, arguments.model)
        print(json.dumps({"rate": found, "length": None if math.isnan(length) else round(length, 1)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary in [arguments.vocabulary] if arguments.vocabulary else VOCABULARIES:
            model = Path(folder) / vocabulary
            initial_model(vocabulary, model, arguments.lengths == "ended")
            for algorithm in (
                [arguments.algorithm] if arguments.algorithm else ["grpo", *(["ppo"] if arguments.ppo_python else [])]
            ):
                options = ("--steps", str(arguments.steps), "--algorithm", algorithm, "--model", str(model))
                python = arguments.ppo_python if algorithm == "ppo" else None
                compare(
                    algorithm,
                    here(__file__),
                    vocabulary,
                    arguments.rounds,
                    "samples/s",
                    options,
                    options,
                    peer_python=python,
                )


if __name__ == "__main__":
    main()
