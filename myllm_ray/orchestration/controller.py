"""Ray Train's controller in the process that starts the run, and without the actors that a run does not use.

`TorchTrainer.fit` starts the controller as an actor, and the controller starts further actors. Each is a process that
imports Ray Train, and takes seconds of CPU time and 200 MB of memory or more, just when the workers start. Here the
controller runs in the thread that calls `fit`, which waits for it in any case. It can be ended from another thread,
also while the workers start: `TorchTrainer.fit` supports this in the main thread only, and not while it waits for
workers.

The classes extend internal ones of Ray 2.60, because Ray Train has no option for any of this.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import ShuttingDownState
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, worker_group
from ray.train.v2.api.exceptions import ControllerError

from myllm_ray.orchestration.barrier import Barrier


class Trainer(TorchTrainer):
    """A TorchTrainer whose controller runs in the thread that calls `fit`.

    Args:
        arguments, named: see `TorchTrainer`.
        own_ray: whether Ray was started by this process for this run. Nothing adds nodes to it.
    """

    def __init__(self, *arguments: Any, own_ray: bool = False, **named: Any):
        super().__init__(*arguments, **named)
        self._own_ray, self._ended = own_ray, threading.Event()
        self._controller: _Controller | None = None

    def end(self) -> None:
        """Ends the workers and makes `fit` raise a `ControllerError`. Returns at once, and can be called repeatedly."""
        self._ended.set()
        if self._controller is not None:
            self._controller.release_while_starting()

    def _initialize_and_run_controller(self, **named: Any) -> Any:
        if self._own_ray:
            named["scaling_policy"] = _NoAutoscaling(cast(Any, self.scaling_config))
        with _light_barrier():
            self._controller = _Controller(self._ended, self._own_ray, **named)
            asyncio.run(self._controller.run())
        return self._controller.get_result()

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner removes reservations after the death of the controller's process, which here ends the run.
        unused = {"PlacementGroupCleanerCallback"}
        if not self.datasets:
            unused.add("DatasetsCallback")
        callbacks: list[Any] = cast(Any, super())._create_default_callbacks()
        return [c for c in callbacks if type(c).__name__ not in unused]


class _NoAutoscaling(FixedScalingPolicy):
    """A fixed number of workers, without an actor that requests nodes from an autoscaler."""

    def after_controller_start(self, train_run_context: Any) -> None: ...

    def _maybe_send_resource_request(self) -> None: ...


class _Controller(TrainController):
    """A controller that is not an actor.

    Args:
        ended: ends the controller and its workers when it is set.
        own_ray: see `Trainer`.
        named: see `TrainController`.
    """

    def __init__(self, ended: threading.Event, own_ray: bool, **named: Any):
        self._ended, reserved = ended, list[Any]()
        self._reserved = reserved

        class Workers(WorkerGroup):
            def _create_placement_group(self, *arguments: Any, **named: Any) -> Any:
                reserved.append(super()._create_placement_group(*arguments, **named))
                return reserved[-1]

            def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
                _init_workers(self, workers, sync_actor, train_context_args)

            @staticmethod
            def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
                # The processes of a Ray of our own have the variables of this process. Without an environment of their
                # own, the workers run in processes that Ray has started already.
                if own_ray:
                    return custom_runtime_env
                return WorkerGroup._get_worker_runtime_env(custom_runtime_env)

        self.worker_group_cls = Workers
        super().__init__(**named)

    def release_while_starting(self) -> None:
        """Gives back the reservations of workers that are starting, which ends them and the wait for them."""
        if self._worker_group is None:
            for handle in self._reserved:
                with suppress(Exception):
                    handle.shutdown()

    async def _step(self) -> Any:
        # An error of a step makes the controller end the workers, which is its next step.
        if self._ended.is_set() and not isinstance(self.get_state(), ShuttingDownState):
            raise ControllerError(RuntimeError("the workers were ended"))
        return await super()._step()


@contextmanager
def _light_barrier() -> Iterator[None]:
    """Makes worker groups that start in this process use `Barrier`."""
    module: Any = worker_group
    original = module.SynchronizationActor
    module.SynchronizationActor = cast(Any, ray).remote(num_cpus=0)(Barrier)
    try:
        yield
    finally:
        module.SynchronizationActor = original


def _init_workers(group: Any, workers: Any, sync_actor: Any, arguments: dict[str, list[Any]]) -> None:
    """Initializes the context of the workers as `WorkerGroup` does, without the handle of a controller's actor."""
    ray.get(
        [
            worker.actor.init_train_context.remote(
                train_run_context=group._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=group._storage_context,
                worker_callbacks=group._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[rank] for name, values in arguments.items()},
            )
            for rank, worker in enumerate(workers)
        ]
    )
    group._decorate_worker_log_file_paths(workers)
