"""`lr-find`: a learning rate range test. Trains the config for a few steps with a growing rate, where it would run."""

from __future__ import annotations

from pathlib import Path

from myllm_ray.common.files import read_jsonl
from myllm_ray.config.errors import ConfigError, TrainingError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import rollout_of
from myllm_ray.engine.lr_finder import RangeTest, analyse
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.orchestration.launch import train


def find_lr(
    config: TrainerConfig, low: float = 1e-6, high: float = 1.0, steps: int = 100, verbose: bool = False
) -> RangeTest:
    """Trains for `steps` steps while the learning rate grows from `low` to `high` by the same factor per step.

    No checkpoint is written. The run's folder is `<run.storage>/<run.name>-lr-find`; it contains `lr_find.html`.

    Args:
        config: the run's config.
        low: learning rate of the first step.
        high: learning rate of the last step.
        steps: optimizer steps, at least 10.
        verbose: show Ray's own logs.

    Raises:
        ConfigError: a bound or the number of steps is invalid, or the trainer's loss does not fall as it learns.
        TrainingError: the loss never falls.
    """
    if not 0 < low < high:
        raise ConfigError(
            f"lr-find: --low and --high are positive, and low is the smaller one (got {low:g} and {high:g})"
        )
    if steps < 10:
        raise ConfigError(f"lr-find: {steps} steps are too few to see a loss fall: give --steps 10 or more")
    if rollout_of(config) is not None:
        raise ConfigError(
            f"lr-find: the loss of {config.trainer} does not fall as it learns: "
            "search optimizer.lr with a sweep over its reward"
        )
    raw = config.model_dump(mode="json")
    raw["run"] |= {"name": f"{config.run.name}-lr-find", "max_steps": steps, "epochs": None, "overwrite": True}
    raw["run"] |= {"amendments": [], "budget": None}
    raw["optimizer"]["lr"] = high
    raw["scheduler"] = {"name": "range_test", "min_lr_ratio": low / high, "decay_steps": steps - 1}
    raw["checkpoint"] |= {"every_steps": None, "at_end": False, "resume": "never", "mirror": None}
    raw["evaluation"] |= {"every_steps": None, "max_batches": 1, "tasks": []}  # the held-out share stays held out
    raw["logging"] |= {"every_steps": 1, "profile": None}
    raw["callbacks"] = ["jsonl", "console", "myllm_ray.engine.lr_finder:StopWhenDiverged"]
    raw["tracking"] = []
    short = validate(raw, where="lr-find")
    try:
        train(short, verbose=verbose)
    except TrainingError as error:
        # A rate that is too high makes the loss non-finite. This ends the test as expected.
        if "finite" not in str(error):
            raise
    folder = folder_of(short)
    rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if "learning_rate" in row and "loss" in row]
    found = analyse([row["learning_rate"] for row in rows], [row["loss"] for row in rows])
    found.write_report(Path(folder) / "lr_find.html", f"{config.run.name}: learning rate")
    return found
