"""One worker group of a run: a TorchTrainer that runs in a thread of the driver."""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from myllm_ray.common.distributed import backend
from myllm_ray.common.types import Position
from myllm_ray.config.errors import UserError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.orchestration.cluster import kill_process, worker_resources
from myllm_ray.orchestration.controller import Trainer
from myllm_ray.orchestration.environment import environment_variables
from myllm_ray.orchestration.failures import Failure, explain
from myllm_ray.orchestration.loops import LAUNCHED, train_loop
from myllm_ray.orchestration.session import owns_ray

if TYPE_CHECKING:
    from myllm_ray.data.prepare import PreparedData

log = logging.getLogger(__name__)

END_SECONDS = 30.0
"""How long the other workers may take to detect that a worker was ended."""


class Group:
    """One TorchTrainer that runs in a thread.

    The main thread stays free to watch the workers and to handle Ctrl-C.

    Args:
        config: the run's config, which the workers receive.
        now: the config of the present segment.
        prepared: the run's data, with the batch sizes of the segment.
        added: objects for the workers, by name (`loops.LAUNCHED`).
        workers: number of workers.
        start: checkpoint to resume from, or None.
        heartbeats: returns the last heartbeat of each rank.

    Attributes:
        summary: the summary of the run when `fit` has succeeded, else empty.
        failure: the error of `fit`, or None.
    """

    def __init__(
        self,
        config: TrainerConfig,
        now: TrainerConfig,
        prepared: PreparedData,
        added: Mapping[str, Any],
        workers: int,
        start: Path | None,
        heartbeats: Callable[[], dict[int, dict[str, Any]]],
    ):
        self.summary: dict[str, Any] = {}
        self.ended = False
        """Whether `kill` was called for the whole group."""
        self.failure: Failure | None = None
        self._folder, self._heartbeats = folder_of(config), heartbeats
        self._trainer = _trainer(config, now, prepared, added, workers, start)
        self._thread = threading.Thread(target=self._fit, name="myllm-ray-fit", daemon=True)
        self._thread.start()

    def _fit(self) -> None:
        try:
            self.summary = cast(Any, self._trainer.fit()).return_value
        except UserError as error:
            self.failure = Failure(error, str(error), again=False)
        except BaseException as error:
            # A traceback that `kill` has caused is of no use to the user, so it is not written to a file.
            self.failure = explain(error) if self.ended else explain(error).kept(self._folder)
        finally:
            shutil.rmtree(self._folder / ".ray", ignore_errors=True)

    def is_running(self, seconds: float) -> bool:
        """Waits for at most `seconds` and returns whether the group still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def kill(self, only: int | None = None) -> None:
        """Ends all workers and the controller, or one worker, whatever they are doing.

        Args:
            only: the rank to end; None: all.
        """
        if only is None:
            # The controller first: it may be about to start workers, which have no heartbeat yet.
            self.ended = True
            limit = time.monotonic() + END_SECONDS
            while self._thread.is_alive() and time.monotonic() < limit:
                self._trainer.end()
                self._thread.join(0.3)
            if not self._thread.is_alive():
                return
        for rank, beat in self._heartbeats().items():
            try:
                if only in (None, rank):
                    kill_process(beat)
            except Exception as error:  # Ray is shutting down, and ends the workers itself
                log.debug("could not end worker %s: %s", beat.get("rank"), error)
        if only is None:
            self._thread.join(20)


def _trainer(
    config: TrainerConfig,
    now: TrainerConfig,
    prepared: PreparedData,
    added: Mapping[str, Any],
    workers: int,
    start: Path | None,
) -> Trainer:
    scaling = config.scaling
    launched = {**added, "prepared": pickle.dumps(prepared), "start": str(start) if start else None}
    # A unique name per attempt: with a known name, Ray would silently resume from its own records. Retries are off in
    # `FailureConfig`, because the supervisor decides on the next attempt.
    return Trainer(
        cast(Any, train_loop),
        train_loop_config={**config.model_dump(mode="json"), LAUNCHED: launched},
        torch_config=TorchConfig(
            backend=backend("cuda" if scaling.gpus_per_worker else "cpu"), timeout_s=math.ceil(scaling.timeout_seconds)
        ),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=bool(scaling.gpus_per_worker), resources_per_worker=worker_resources(scaling)
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(folder_of(config) / ".ray"),
            failure_config=cast(Any, FailureConfig)(
                max_failures=0, max_preemption_failures=0, controller_failure_limit=0
            ),
        ),
        own_ray=owns_ray(),
        **(_dataset(config, now, prepared, start) if config.data.feed == "ray" else {}),
    )


def _dataset(config: TrainerConfig, now: TrainerConfig, prepared: PreparedData, start: Path | None) -> dict[str, Any]:
    """Returns the arguments of a TorchTrainer whose workers read their rows with Ray Data."""
    from ray.train import DataConfig

    from myllm_ray.orchestration.ray_data import build_dataset, execution_options

    def remaining() -> ray.data.Dataset:
        """Returns the data from the checkpoint to the end of the run."""
        manifest: dict[str, Any] = read_manifest(start) if start else {"step": 0, "position": {"epoch": 0, "row": 0}}
        per_batch = config.steps_per_batch
        total = now.run.total_steps(per_batch, prepared.train.steps_in_epoch)
        return build_dataset(
            prepared.train, Position(**manifest["position"]), max(0, total - manifest["step"]) // per_batch
        )

    options = DataConfig(execution_options=execution_options(), enable_shard_locality=False)
    return {"datasets": {"train": remaining}, "dataset_config": options}


def without_watcher() -> AbstractContextManager[None]:
    """Disables Ray Train's actor that watches for nodes that leave, and the log files of its controller.

    The supervisor watches the nodes itself, and saves a checkpoint before it ends the group. The variables are those of
    the groups that start inside the context. Variables that the user has set are kept.
    """
    names = ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING")
    return environment_variables({name: os.environ.get(name, "0") for name in names})
