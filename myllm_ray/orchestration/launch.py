"""`train(config)`: one call for every run. In this process where `scaling.workers` is 0, else through Ray's TorchTrainer."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.config.load import load_config, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.orchestration import environment
from myllm_ray.orchestration.micro_size import with_micro_size

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """A run that has ended.

    `metrics`: the last that were logged. `checkpoint`: the newest. `left`: why it ended before its last step, with a checkpoint
    to go on from (checkpoint.resume=auto); None where it did all that its config asks. `history`: all lines of
    `metrics.jsonl`.
    """

    folder: str
    step: int
    metrics: dict[str, float]
    checkpoint: str | None
    left: str | None = None
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def summary(self) -> str:
        """One line: where, how many steps, and the loss at first and at last (on held-out data where there is some).

        Of a run with rewards the reward: its loss says nothing.
        """
        name = "reward" if any("reward" in row for row in self.history) else "loss"
        validated = [row for row in self.history if f"validation_{name}" in row]
        name = f"validation_{name}" if len(validated) > 1 else name
        rows = [row for row in self.history if name in row]
        if not rows:
            return f"{self.folder}: {self.step} steps"
        first, last = rows[0], rows[-1]
        return (f"{self.folder}: {self.step} steps, {name.replace('_', ' ')} {first[name]:.4f} at step {first['step']} -> "
                f"{last[name]:.4f} at step {last['step']}")


def train(config: TrainerConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = (),
          verbose: bool = False) -> RunResult:
    """Run a config to its end.

    Args:
        config: a config, a mapping, or the path of a YAML or JSON file.
        overrides: `key.sub=value`, for a path.
        verbose: show Ray's own logs.

    Raises:
        UserError: one line that says what is wrong and what to do.
    """
    if isinstance(config, (str, Path)):
        config = load_config(config, tuple(overrides))
    elif not isinstance(config, TrainerConfig):
        config = validate(config)
    if config.scaling.most == 0:
        from myllm_ray.worker import run_local  # Ray is not imported on this way

        summary = run_local(with_micro_size(config))
    else:
        summary = _train_on_ray(config, verbose)
    history = list(read_jsonl(Path(summary["folder"]) / "metrics.jsonl"))
    return RunResult(history=history, **{k: summary[k] for k in ("folder", "step", "metrics", "checkpoint", "left")})


def _train_on_ray(config: TrainerConfig, verbose: bool) -> dict[str, Any]:
    environment.prepare()  # again: RAY_ADDRESS may have been set since this package was imported
    import ray

    from myllm_ray.engine.startup import Startup, StoppedAtStart
    from myllm_ray.orchestration import session
    from myllm_ray.orchestration.channel import DriverDisplay, ForwardCallback
    from myllm_ray.orchestration.cluster import on_a_worker
    from myllm_ray.orchestration.failures import clearly
    from myllm_ray.orchestration.ray_data import map_units
    from myllm_ray.orchestration.supervisor import Supervisor
    from myllm_ray.worker import absolute, build_callbacks, check_names, prepare_run

    config = absolute(config)
    check_names(config)
    with Startup(config) as startup:
        started = False
        try:
            startup.phase("connecting to Ray")
            log.info("connecting to Ray")
            started = session.connect(config, verbose)
            startup.phase("looking for batch.micro_size")
            config = with_micro_size(config, on_a_worker(config))
            prepared = clearly(lambda: prepare_run(config, map_units, startup.phase), startup.folder)
            startup.training()
            shown = [c for c in build_callbacks(config) if c.on_driver]
            with DriverDisplay(shown) as display:
                return Supervisor(config, prepared, [ForwardCallback(display.queue, prints=session.hides_output())], startup).run()
        except StoppedAtStart as reason:
            return startup.stopped(reason)
        finally:
            if started:
                ray.shutdown()
