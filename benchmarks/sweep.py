"""Compares the overhead per trial of this package's sweep with that of Ray Tune with Ray Train.

    python benchmarks/sweep.py [--trials 5] [--rounds 2]

Both run one trial at a time, with the same small Llama model and the same number of steps. The overhead is the wall
time of the whole sweep (including the start of the first actor and its imports, but not the start of Ray), minus the
time between the first and the last step of all trials, divided by the number of trials. The rounds are interleaved, and
the results are medians. The last line is JSON.

The Ray Tune code follows Ray's guide "Hyperparameter tuning with Ray Tune" for Ray Train: a Tune function whose trial
runs a `TorchTrainer`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from myllm_ray.orchestration import session  # noqa: F401  (sets what Ray reads at import)

# isort: split
import ray
import torch
from ray import tune
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from myllm_ray import sweep
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback

MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
STEPS, ROWS, LENGTH = 30, 8, 128


class Clock(Callback):
    """A callback that writes the duration of the training in seconds to a file."""

    main_only = True

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_step_start(self, state: RunState) -> None:
        if state.step == 0:
            self.started = time.perf_counter()

    def on_step_end(self, state: RunState) -> None:
        if state.step == state.total_steps:
            (self.folder / f"{time.time_ns()}").write_text(str(time.perf_counter() - self.started))


def ours(folder: Path, trials: int) -> None:
    """Runs a sweep with this package."""
    words = random.Random(0)
    data = folder / "text.jsonl"
    data.write_text(
        "\n".join(
            json.dumps({"text": " ".join(words.choices(["red", "green", "stone", "river"], k=200))}) for _ in range(200)
        )
    )
    base = {
        "trainer": "pretrain",
        "model": {"config": MODEL},
        "tokenizer": {"kind": "bytes"},
        "batch": {"global_size": ROWS, "micro_size": ROWS},
        "data": {"train": {"path": str(data), "format": "text"}, "sequence_length": LENGTH},
        "run": {"max_steps": STEPS},
        "callbacks": [{"sweep:Clock": {"folder": str(folder / "clock")}}],
    }
    result = sweep(
        base,
        {"optimizer.lr": tune.loguniform(1e-4, 1e-2)},
        trials=trials,
        max_concurrent=1,
        run={"name": f"sweep-{time.time_ns()}", "storage": str(folder)},
    )
    assert [row["status"] for row in result.trials] == ["done"] * trials


def recipe(folder: Path, trials: int) -> None:
    """Runs a sweep with Ray Tune and Ray Train."""

    def train(config: dict[str, Any]) -> None:
        from ray.train.torch import prepare_model
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(MODEL)
        model = prepare_model(
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(settings.pop("model_type"), vocab_size=259, **settings)
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        started = time.perf_counter()
        for _ in range(STEPS):
            rows = torch.randint(0, 259, (ROWS, LENGTH))
            loss = model(input_ids=rows, labels=rows).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        (folder / "clock" / f"{time.time_ns()}").write_text(str(time.perf_counter() - started))
        ray.train.report({"loss": float(loss)})

    def trial(config: dict[str, Any]) -> None:
        trainer = TorchTrainer(
            train,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(
                name=f"{os.getpid()}-{time.time_ns()}", storage_path=str(folder), callbacks=[TuneReportCallback()]
            ),
        )
        trainer.fit()

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.01}),
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=1, metric="loss", mode="min"),
        run_config=tune.RunConfig(storage_path=str(folder), name=f"recipe-{time.time_ns()}", verbose=0),
    )
    assert not tuner.fit().errors


def overhead(way: Any, trials: int) -> float:
    """Runs a sweep and returns its overhead per trial in seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "clock").mkdir()
        started = time.perf_counter()
        way(folder, trials)
        wall = time.perf_counter() - started
        trained = [float(path.read_text()) for path in (folder / "clock").iterdir()]
        assert len(trained) == trials
        print(f"{way.__name__:7} {wall:6.1f} s for {trials} trials, {sum(trained):5.1f} s of them training", flush=True)
        return (wall - sum(trained)) / trials


def main() -> None:
    """Measures both ways in interleaved rounds and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
    )
    found: dict[str, list[float]] = {"ours": [], "recipe": []}
    for _ in range(arguments.rounds):
        for way in (ours, recipe):
            found[way.__name__].append(overhead(way, arguments.trials))
    ray.shutdown()
    medians = {name: statistics.median(values) for name, values in found.items()}
    print(
        json.dumps(
            {
                "trials": arguments.trials,
                "rounds": arguments.rounds,
                "overhead_seconds_per_trial": medians["ours"],
                "recipe_seconds_per_trial": medians["recipe"],
                "ratio": medians["recipe"] / medians["ours"],
            }
        )
    )


if __name__ == "__main__":
    main()
