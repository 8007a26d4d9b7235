"""`batch.micro_size: auto`: the largest micro-batch that fits, found by bisection; running out of memory is an answer, not an end.

Each size is tried in a process of its own: two steps (in the second the optimizer's moments are there) on the longest row of the data.
What is found is recorded as a number: another micro-batch size is the same run, but only up to rounding.
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
from myllm_ray.data.packing import Row

log = logging.getLogger(__name__)
_STEPS = 2
_MOST_ROWS = 50_000
"""Of the data, among which the longest row is looked for."""
_SHARE = 0.9
"""Of the memory that is free, without a device of its own."""
_NO_ROOM = 3
"""Exit code of a try that ran out of memory."""

Run = Callable[..., Any]
"""Calls a function with arguments where a worker of the run would run."""


def with_micro_size(config: TrainerConfig, call: Run | None = None, limit: int | None = None) -> TrainerConfig:
    """The config with a number for `batch.micro_size`.

    Args:
        call: how a try is started; default: from this process.
        limit: bytes of memory that a worker on a CPU may use; default: its share of what is free.

    Raises:
        ConfigError: a trainer whose rows are not all read from the data.
        TrainingError: not even one row fits, or a try failed for another reason.
    """
    if not config.batch.find_micro_size:
        return config
    if hasattr(config, "rollout"):
        raise ConfigError(f"batch.micro_size: auto can't be found for {config.trainer}, whose rows are as long as what it samples: give a number")
    found = _recorded(config) or _bisect(config, call or (lambda function, *arguments: function(*arguments)), limit)
    config = config.model_copy(deep=True)
    config.batch.micro_size, config.batch.find_micro_size = found, False
    return config


def _recorded(config: TrainerConfig) -> int | None:
    """What the run that goes on was started with."""
    path = Path(config.run.storage) / config.run.name / "config.yaml"
    if config.checkpoint.resume != "auto" or not path.exists():
        return None
    batch = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("batch", {})
    return int(batch["micro_size"]) if batch.get("global_size") == config.batch.global_size else None


def _bisect(config: TrainerConfig, call: Run, limit: int | None) -> int:
    rows = config.batch.global_size // max(1, config.scaling.most)
    sizes = [n for n in range(1, rows + 1) if rows % n == 0]
    low, high, said = -1, len(sizes), ""
    while high - low > 1:
        middle = (low + high) // 2
        said = call(out_of_memory, config.model_dump(mode="json"), sizes[middle], limit)
        log.info("batch.micro_size: auto: %d %s", sizes[middle], f"does not fit ({said})" if said else "fits")
        low, high = (low, middle) if said else (middle, high)
    if low < 0:
        raise TrainingError(f"batch.micro_size: auto: not even one row fits: {said}; a smaller model or data.sequence_length, "
                            "accelerator.activation_checkpointing, or a sharding backend with a number given")
    return sizes[low]


def out_of_memory(raw: dict[str, Any], size: int, limit: int | None) -> str:
    """Try a size in a process of its own; the last line that it said when its memory ran out, or nothing if it fits.

    Raises:
        TrainingError: it failed for another reason.
    """
    workers = max(1, validate(raw).scaling.most)
    if limit is None and not raw["scaling"]["gpus_per_worker"]:
        limit = int(_free_memory() * _SHARE / workers)
    with tempfile.TemporaryDirectory() as folder:
        asked = {"config": raw, "size": size, "limit": limit, "folder": folder}
        tried = subprocess.run([sys.executable, "-m", "myllm_ray.orchestration.micro_size"], input=json.dumps(asked), capture_output=True, text=True)
    last = next((line for line in reversed(tried.stderr.splitlines()) if line.strip()), "")
    if tried.returncode == 0:
        return ""
    if tried.returncode == _NO_ROOM:
        return last[:200]
    if tried.returncode == -9:  # the system's own answer to too little memory
        return "killed by the system"
    if tried.returncode == ConfigError.exit_code:
        raise ConfigError(last)
    raise TrainingError(f"batch.micro_size: auto: a try with {size} failed: {last}")


def _free_memory() -> int:
    """Bytes that are free on this machine, or in this container."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        group = Path("/sys/fs/cgroup")
        return min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit
        return free


def _try(raw: dict[str, Any], size: int, folder: str) -> None:
    """Two steps of `size` rows with the longest of the data among them."""
    from myllm_ray.data.plan import RowPlan
    from myllm_ray.data.records import TOKENS
    from myllm_ray.data.stream import LocalStream, make_batch
    from myllm_ray.data.targets import check_targets, count_targets
    from myllm_ray.worker import absolute, prepare_run, run_worker

    class Longest(RowPlan):
        """The longest row with its neighbours, as the first rows of each batch."""

        def __init__(self, plan: RowPlan):
            super().__init__(plan.store, plan.order, plan.packing)
            self.folder = plan.folder  # type: ignore[method-assign]
            count = min(plan.rows_in_epoch(0), _MOST_ROWS)
            lengths = np.asarray([sum(s.length for s in row) for row in plan.rows(0, 0, count)])
            if plan.store.kind == TOKENS:  # nothing can be tried on a row without a target
                lengths = lengths * (count_targets(plan).rows[:count] > 0)
            self.first = int(lengths.argmax()) // size * size
            self.key += f"-longest-{self.first}"  # a table of a reference goes by it

        def rows(self, epoch: int, start: int, stop: int) -> list[Row]:
            first = self.first + start % global_size
            return super().rows(0, first, first + stop - start)

    class OneMicro(LocalStream):
        def batches(self, start: Position, steps: int) -> Iterator[Batch]:
            for position in self.spec.positions(start, steps):
                yield make_batch(self.spec, position, [self.spec.micro_at(position.epoch, position.row)])

    # Where its data is prepared is decided before the run's own folder is exchanged for one that goes.
    global_size = max(2, size)  # KTO needs another row to compare with
    config = absolute(validate({**raw, "batch": {"global_size": global_size, "micro_size": size}, "scaling": {**raw["scaling"], "workers": 1}}))
    config.run.storage, config.run.max_steps, config.run.epochs = folder, _STEPS * config.steps_per_batch, None
    config.checkpoint.every_steps, config.checkpoint.at_end, config.checkpoint.resume, config.checkpoint.mirror = None, False, "never", None
    config.evaluation.every_steps, config.callbacks = None, []
    prepared = prepare_run(config, warn=False)
    check_targets(prepared.train, "data.train", 2**40, each=False)
    prepared.validation = None
    prepared.train.plan = Longest(prepared.train.plan)
    run_worker(config, prepared, OneMicro(prepared.train))


def _main() -> int:
    asked = json.load(sys.stdin)
    if asked["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (asked["limit"], asked["limit"]))
    try:
        _try(asked["config"], asked["size"], asked["folder"])
    except UserError as error:
        print(error, file=sys.stderr)
        return ConfigError.exit_code
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError; on a CPU it is one without a name
        said = str(error)
        if not isinstance(error, MemoryError) and not any(sign in said for sign in ("out of memory", "can't allocate memory", "not enough memory")):
            raise
        print(said.strip().splitlines()[0] if said.strip() else "out of memory", file=sys.stderr)
        return _NO_ROOM
    return 0


if __name__ == "__main__":
    sys.exit(_main())
