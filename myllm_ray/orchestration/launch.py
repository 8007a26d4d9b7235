"""`train(config)` runs any config: in this process if `scaling.workers` is 0, otherwise on Ray with TorchTrainer."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.types import Exit
from myllm_ray.config.load import load_config, validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.orchestration import environment
from myllm_ray.orchestration.micro_size import with_micro_size

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """The outcome of a run.

    Attributes:
        folder: the run's folder.
        step: number of optimizer steps.
        metrics: the last logged metrics.
        checkpoint: the newest checkpoint, or None.
        exit: why the run ended before its last step, or None. A preempted run is resumed by `checkpoint.resume=auto`.
        history: all lines of `metrics.jsonl`.
    """

    folder: str
    step: int
    metrics: dict[str, float]
    checkpoint: str | None
    exit: Exit | None = None
    history: list[dict[str, Any]] = field(repr=False, default_factory=list)

    def summary(self) -> str:
        """Returns one line with the folder, the number of steps, and the first and the last loss.

        The loss is that of the validation data, if it was evaluated at least twice. For runs with rewards, the reward
        replaces the loss.
        """
        # The loss of a policy gradient does not measure progress.
        name = "reward" if any("reward" in row for row in self.history) else "loss"
        validated = [row for row in self.history if f"validation_{name}" in row]
        name = f"validation_{name}" if len(validated) > 1 else name
        rows = [row for row in self.history if name in row]
        if not rows:
            return f"{self.folder}: {self.step} steps"
        first, last = rows[0], rows[-1]
        return (
            f"{self.folder}: {self.step} steps, {name.replace('_', ' ')} {first[name]:.4f} at step {first['step']} -> "
            f"{last[name]:.4f} at step {last['step']}"
        )


def train(
    config: TrainerConfig | Mapping[str, Any] | str | Path, overrides: Iterable[str] = (), verbose: bool = False
) -> RunResult:
    """Runs a config to its last step, or to an early exit.

    Args:
        config: a config, a mapping, or the path of a YAML or JSON file.
        overrides: overrides `key.sub=value`, used if `config` is a path.
        verbose: whether to show Ray's own logs.

    Returns:
        The outcome of the run.

    Raises:
        UserError: the run failed for a reason that the user can fix; the message is one line.
    """
    if isinstance(config, (str, Path)):
        config = load_config(config, tuple(overrides))
    elif not isinstance(config, TrainerConfig):
        config = validate(config)
    if config.scaling.most == 0:
        from myllm_ray.worker import run_local  # this branch does not import Ray

        summary = run_local(with_micro_size(config))
    else:
        summary = _train_on_ray(config, verbose)
    history = list(read_jsonl(Path(summary["folder"]) / "metrics.jsonl"))
    return RunResult(history=history, **{k: summary[k] for k in ("folder", "step", "metrics", "checkpoint", "exit")})


def _train_on_ray(config: TrainerConfig, verbose: bool) -> dict[str, Any]:
    # Before `import ray`, which reads the variables. A second time: RAY_ADDRESS may have been set after this package
    # was imported.
    environment.prepare()
    import ray

    from myllm_ray.engine.amendments import with_recorded
    from myllm_ray.engine.callbacks import observing
    from myllm_ray.engine.configured import build_callbacks
    from myllm_ray.engine.liveness.startup import Startup, StoppedAtStart
    from myllm_ray.orchestration import session
    from myllm_ray.orchestration.cluster import on_a_worker
    from myllm_ray.orchestration.driver_events import DriverEvents, ForwardCallback, link_to_driver
    from myllm_ray.orchestration.failures import clearly
    from myllm_ray.orchestration.heartbeats import WorkerHeartbeats

    config = config.model_copy(deep=True)
    config.run.storage = str(Path(config.run.storage).expanduser().absolute())
    shown = [c for c in build_callbacks(config) if c.on_driver]
    with observing(shown), Startup(config) as startup:
        started = False
        try:
            startup.phase("connecting to Ray")
            log.info("connecting to Ray")
            with _imported("myllm_ray.preparation"):
                started = session.connect(config, verbose)
            # Imports that take seconds, while Ray starts processes for the workers.
            from myllm_ray.orchestration.ray_data import map_units
            from myllm_ray.orchestration.supervisor import Supervisor
            from myllm_ray.preparation import absolute, check_names, prepare_run

            config = absolute(config)
            check_names(config)
            config = with_recorded(config)  # no command can amend the run from here on
            startup.phase("determining batch.micro_size")
            config = with_micro_size(config, on_a_worker(config))
            prepared = clearly(lambda: prepare_run(config, map_units, startup.phase), startup.folder)
            startup.training("starting workers")
            with (
                link_to_driver() as link,
                DriverEvents(shown, link),
                WorkerHeartbeats(link, startup.folder) as heartbeats,
            ):
                return Supervisor(
                    config,
                    prepared,
                    [ForwardCallback(link, prints=session.hides_output())],
                    startup,
                    heartbeats,
                ).run()
        except StoppedAtStart as reason:
            return startup.stopped(reason)
        finally:
            if started:
                ray.shutdown()


@contextmanager
def _imported(module: str) -> Iterator[None]:
    """Imports a module in a thread while the context runs, and waits for the import at the end.

    The start of Ray mostly waits for other processes. It stays in the main thread, because Linux ends the processes
    that Ray has started together with the thread that has started them.
    """
    with ThreadPoolExecutor(1) as pool:
        pool.submit(importlib.import_module, module)
        yield
