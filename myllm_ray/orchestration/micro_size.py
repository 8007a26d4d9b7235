"""`batch.micro_size: auto`: finds the largest micro-batch that fits into memory, by bisection.

Each size is tried in a separate process, so that running out of memory does not end the run. A try trains two steps on
the longest row of the data; in the second step the optimizer's moments are allocated. The result is recorded as a
number in the run's config: a different micro-batch size gives the same run only up to rounding.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from myllm_ray.common.types import Batch, Position
from myllm_ray.config.errors import ConfigError, TrainingError, UserError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import rollout_of
from myllm_ray.data.packing import Row

log = logging.getLogger(__name__)
_STEPS = 2
_MOST_ROWS = 50_000
"""Most rows of the data that are searched for the longest one."""
_SHARE = 0.9
"""Share of the free memory that a try may use on a CPU."""
_OUT_OF_MEMORY = 3
"""Exit code of a try that ran out of memory."""

Run = Callable[..., Any]
"""Calls a function with arguments on the node and with the resources of a worker."""


def with_micro_size(config: TrainerConfig, call: Run | None = None, limit: int | None = None) -> TrainerConfig:
    """Returns the config with a number for `batch.micro_size`.

    Args:
        config: the run's config; returned unchanged if it contains a number.
        call: starts a try; default: from this process.
        limit: bytes of memory that a worker on a CPU may use; default: its share of the free memory.

    Raises:
        ConfigError: the trainer samples its rows instead of reading them from the data.
        TrainingError: not even one row fits, or a try failed for another reason.
    """
    if not config.batch.find_micro_size:
        return config
    if rollout_of(config) is not None:
        raise ConfigError(
            f"batch.micro_size: auto can't be found for {config.trainer}: row lengths depend on sampling; give a number"
        )
    found = _recorded(config) or _bisect(config, call or (lambda function, *arguments: function(*arguments)), limit)
    config = config.model_copy(deep=True)
    config.batch.micro_size, config.batch.find_micro_size = found, False
    return config


def _recorded(config: TrainerConfig) -> int | None:
    """Returns the size that the run was started with if this is a resumed run with the same global batch, else None."""
    path = Path(config.run.storage) / config.run.name / "config.yaml"
    if config.checkpoint.resume != "auto" or not path.exists():
        return None
    batch = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("batch", {})
    return int(batch["micro_size"]) if batch.get("global_size") == config.batch.global_size else None


def _bisect(config: TrainerConfig, call: Run, limit: int | None) -> int:
    # Sizes must divide a worker's share of the global batch.
    rows = config.batch.global_size // max(1, config.scaling.most)
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    low, high, said = -1, len(sizes), ""
    while high - low > 1:
        middle = (low + high) // 2
        said = call(out_of_memory, config.model_dump(mode="json"), sizes[middle], limit)
        log.info("batch.micro_size: auto: %d %s", sizes[middle], f"does not fit ({said})" if said else "fits")
        low, high = (low, middle) if said else (middle, high)
    if low < 0:
        raise TrainingError(
            f"batch.micro_size: auto: not even one row fits: {said}; use a smaller model or data.sequence_length, "
            "accelerator.activation_checkpointing, or a sharding backend with a fixed size"
        )
    return sizes[low]


def out_of_memory(raw: dict[str, Any], size: int, limit: int | None) -> str:
    """Tries a size in a separate process.

    Args:
        raw: the run's config as a mapping.
        size: rows of a micro-batch.
        limit: bytes of memory for the try; None: no limit on a GPU, a share of the free memory on a CPU.

    Returns:
        The last line of the process's error output if it ran out of memory, else an empty string.

    Raises:
        ConfigError: the config is invalid.
        TrainingError: the try failed for another reason.
    """
    workers = max(1, validate(raw).scaling.most)
    if limit is None and not raw["scaling"]["gpus_per_worker"]:
        limit = int(_free_memory() * _SHARE / workers)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"config": raw, "size": size, "limit": limit, "folder": folder}
        tried = subprocess.run(
            [sys.executable, "-m", "myllm_ray.orchestration.micro_size"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
        )
    last = next((line for line in reversed(tried.stderr.splitlines()) if line.strip()), "")
    if tried.returncode == 0:
        return ""
    if tried.returncode == _OUT_OF_MEMORY:
        return last[:200]
    if tried.returncode == -9:  # SIGKILL: the kernel's out-of-memory killer
        return "killed by the system"
    if tried.returncode == ConfigError.exit_code:
        raise ConfigError(last)
    raise TrainingError(f"batch.micro_size: auto: a try with {size} failed: {last}")


def _free_memory() -> int:
    """Returns the free memory of this machine or container in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup, or its limit is "max"
        return free


def _try(raw: dict[str, Any], size: int, folder: str) -> None:
    """Trains two steps with micro-batches of `size` rows that contain the longest row of the data."""
    from myllm_ray.data.examples import TOKENS
    from myllm_ray.data.plan import RowPlan
    from myllm_ray.data.stream import LocalStream, make_batch
    from myllm_ray.data.targets import check_targets, count_targets
    from myllm_ray.preparation import absolute, prepare_run
    from myllm_ray.worker import run_worker

    class Longest(RowPlan):
        """A plan whose batches start with the longest row and its neighbours."""

        def __init__(self, plan: RowPlan):
            super().__init__(plan.store, plan.order, plan.packing)
            self.folder = plan.folder  # type: ignore[method-assign]
            count = min(plan.rows_in_epoch(0), _MOST_ROWS)
            lengths = np.asarray([sum(s.length for s in row) for row in plan.rows(0, 0, count)])
            if plan.store.kind == TOKENS:  # a row without a target has no loss, so it does not count
                lengths = lengths * (count_targets(plan).rows[:count] > 0)
            self.first = int(lengths.argmax()) // size * size
            self.key += f"-longest-{self.first}"  # cached values of the reference model are keyed by it

        def rows(self, epoch: int, start: int, stop: int) -> list[Row]:
            first = self.first + start % global_size
            return super().rows(0, first, first + stop - start)

    class OneMicro(LocalStream):
        def batches(self, start: Position, steps: int) -> Iterator[Batch]:
            for position in self.spec.positions(start, steps):
                yield make_batch(self.spec, position, [self.spec.micro_at(position.epoch, position.row)])

    # `absolute` fixes the folder of the prepared data before the run's folder is replaced by the temporary one.
    global_size = max(2, size)  # KTO compares each row with another one
    config = absolute(
        validate(
            {
                **raw,
                "batch": {"global_size": global_size, "micro_size": size},
                "scaling": {**raw["scaling"], "workers": 1},
                "run": {**raw["run"], "amendments": [], "budget": None},
            }
        )
    )
    config.run.storage, config.run.max_steps, config.run.epochs = folder, _STEPS * config.steps_per_batch, None
    config.checkpoint.every_steps, config.checkpoint.at_end, config.checkpoint.resume, config.checkpoint.mirror = (
        None,
        False,
        "never",
        None,
    )
    config.evaluation.every_steps, config.evaluation.tasks = None, []
    config.callbacks, config.tracking, config.logging.profile = [], [], None
    prepared = prepare_run(config, warn=False)
    check_targets(prepared.train, "data.train", 2**40, each=False)
    prepared.validation = None
    prepared.train.plan = Longest(prepared.train.plan)
    run_worker(config, prepared, OneMicro(prepared.train))


def _main() -> int:
    asked = json.load(sys.stdin)
    # The limit makes an allocation fail with an error here, before the kernel kills other processes of the machine.
    if asked["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["limit"], asked["limit"]))
    try:
        _try(asked["config"], asked["size"], asked["folder"])
    except UserError as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch.OutOfMemoryError is a RuntimeError; on a CPU, torch raises a plain RuntimeError
        said = str(error)
        if not isinstance(error, MemoryError) and not any(
            sign in said for sign in ("out of memory", "can't allocate memory", "not enough memory")
        ):
            raise
        print(said.strip().splitlines()[0] if said.strip() else "out of memory", file=sys.stderr)
        return _OUT_OF_MEMORY
    return 0


if __name__ == "__main__":
    sys.exit(_main())
