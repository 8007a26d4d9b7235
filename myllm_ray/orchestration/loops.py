"""The Ray Train loop functions, which every worker of a TorchTrainer runs. They can be used without `train`:

    TorchTrainer(sft_loop, train_loop_config={...a run's config as a mapping...}, scaling_config=...)

`train(config)` (launch.py) additionally passes prepared data, a shard of Ray Data, and a channel to the driver.

The functions contain the imports of what a worker needs. Ray's controller also loads this module while the workers
start, and imports at module level would take CPU time from them for seconds.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import validate
from myllm_ray.config.resolve import SHORT_NAMES
from myllm_ray.config.schema import TrainerConfig

if TYPE_CHECKING:
    from myllm_ray.common.types import BatchStream
    from myllm_ray.data.prepare import PreparedData
    from myllm_ray.engine.attempt import RecordedAttempt

LAUNCHED = "myllm_ray.launched"
"""Key of the objects that `train(config)` adds to the config of the loop.

The value is a dict {"prepared": a pickled PreparedData, "callbacks": callbacks in addition to those of the config,
"heartbeats": a `HeartbeatLink`, "start": checkpoint to resume from, or None}. The data is unpickled in the worker only,
so that a folder that its node does not have is an error of the worker with one line, and Ray's controller does not read
it.
"""


def train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the trainer that the config names.

    Args:
        config: a run's config as a mapping.

    Returns:
        The summary of `run_worker`.
    """
    from myllm_ray.orchestration.failures import portable

    try:
        return _train_loop(config)
    except Exception as error:
        if LAUNCHED not in config or (sent := portable(error)) is error:
            raise
        raise sent from error


def _train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    from myllm_ray.common import distributed
    from myllm_ray.engine.amendments import take_requests
    from myllm_ray.engine.configured import build_callbacks
    from myllm_ray.engine.reporting.events import listening
    from myllm_ray.engine.run_folder import folder_of
    from myllm_ray.orchestration.actor_pools import services
    from myllm_ray.orchestration.driver_events import ForwardCallback
    from myllm_ray.orchestration.output import forwarded_output
    from myllm_ray.preparation import absolute
    from myllm_ray.worker import run_worker

    raw = {k: v for k, v in config.items() if k != LAUNCHED}
    parsed = absolute(validate(raw, where="train_loop_config"))
    # A Ray worker inherits OMP_NUM_THREADS=1, independent of the CPUs that it has reserved.
    torch.set_num_threads(max(1, int(parsed.scaling.cpus_per_worker)))
    _use_assigned_gpu()
    launched = config.get(LAUNCHED)
    if launched is None:
        if parsed.data.feed == "ray":
            raise ConfigError("data.feed=ray needs `train(config)` or the command line; here workers read their rows")
        from myllm_ray.orchestration.ray_metrics import RayMetrics
        from myllm_ray.orchestration.reporting import RayTrainReport

        # `absolute` may have replaced a run by its newest checkpoint, and another rank may have seen an older one.
        parsed = distributed.from_main(parsed)
        parsed, prepared = _prepare_alone(parsed)
        callbacks = [*build_callbacks(parsed), RayMetrics(parsed), RayTrainReport(parsed.checkpoint.async_)]
        while True:
            parsed = distributed.from_main(take_requests(parsed) if distributed.is_main() else None)
            with ExitStack() as stack:
                attempt = stack.enter_context(_attempt(folder_of(parsed))) if distributed.is_main() else None
                summary = run_worker(parsed, prepared, callbacks=callbacks, services=services(parsed, prepared))
                if attempt is not None:
                    attempt.ended(summary)
            if summary["exit"] is None or summary["exit"].kind != "amended":
                return summary
    forward = next((c for c in launched["callbacks"] if isinstance(c, ForwardCallback)), None)
    if forward is None or not distributed.is_main():
        return _launched(parsed, launched)
    with forwarded_output(forward.output()), listening(forward.record):
        return _launched(parsed, launched)


@contextmanager
def _attempt(folder: Path) -> Iterator[RecordedAttempt]:
    """Records an attempt in a TorchTrainer of the user, on rank 0."""
    from myllm_ray.common import distributed
    from myllm_ray.engine.attempt import RecordedAttempt
    from myllm_ray.engine.reporting.events import EventLog

    events = EventLog(folder, distributed.rank())
    events.open()
    try:
        with RecordedAttempt(folder, events) as attempt:
            yield attempt
    finally:
        events.close()


def _launched(config: TrainerConfig, launched: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a worker of a run that was started by `train(config)`."""
    import ray

    from myllm_ray.common import distributed
    from myllm_ray.engine.configured import build_callbacks
    from myllm_ray.orchestration.actor_pools import services
    from myllm_ray.orchestration.ray_metrics import RayMetrics
    from myllm_ray.worker import Watched, run_worker

    prepared: PreparedData = pickle.loads(launched["prepared"])
    own = [c for c in build_callbacks(config) if not c.on_driver]
    start = Path(launched["start"]) if launched["start"] else None
    return run_worker(
        config,
        prepared,
        _ray_stream(prepared) if config.data.feed == "ray" else None,
        [*own, RayMetrics(config), *launched["callbacks"]],
        start,
        watched=Watched(
            {"node": ray.get_runtime_context().get_node_id()}, launched["heartbeats"].of_rank(distributed.rank())
        ),
        services=services(config, prepared),
    )


def _ray_stream(prepared: PreparedData) -> BatchStream:
    """Returns the stream that reads this worker's shard of the run's dataset."""
    import ray.train

    from myllm_ray.orchestration.ray_data import RayStream

    return RayStream(prepared.train, ray.train.get_dataset_shard("train"))


def _use_assigned_gpu() -> None:
    """Sets LOCAL_RANK to the index of the GPU that Ray assigned to this worker, as torchrun does.

    Ray's LOCAL_RANK is the index of the worker on its node. This differs from the index of the GPU if a worker has
    several GPUs or a fraction of one.
    """
    import ray
    from ray.train.torch import get_device

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return  # Ray Train's local mode runs in the process of the user
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray may have reserved the GPUs for other workers
    elif (device := get_device()).type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)


def _prepare_alone(config: TrainerConfig) -> tuple[TrainerConfig, PreparedData]:
    """Prepares a run in a user-defined TorchTrainer.

    Rank 0 prepares the data and claims the run's folder, while the other ranks wait.

    Returns:
        The config, with the amendments that the run's folder records, and the data.
    """
    from myllm_ray.common import distributed
    from myllm_ray.data.evaluation_rows import task_rows
    from myllm_ray.data.prepare import prepare
    from myllm_ray.engine.amendments import with_recorded
    from myllm_ray.preparation import prepare_run

    problem: Exception | None = None
    found: PreparedData | None = None
    if distributed.is_main():
        try:
            config = with_recorded(config)
            found = prepare_run(config)
        except Exception as error:  # raised below on every rank: otherwise the others would wait in the broadcast
            problem = error
    problem = distributed.from_main(problem)
    if problem is not None:
        raise problem
    # Every rank reads the cache that rank 0 has written. The isolation is broadcast, because it decides about packing,
    # and the identity of the base, because it decides what checkpoints hold.
    config = distributed.from_main(config)
    isolation, base = distributed.from_main(None if found is None else (found.isolation, found.base))
    prepared = prepare(config, isolation=isolation)
    return config, replace(prepared, base=base, tasks=task_rows(config, prepared.tokenizer_folder))


def loop_of(trainer: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Returns the loop function of a trainer with a short name: `train_loop` with `trainer` set."""

    def loop(config: Mapping[str, Any]) -> dict[str, Any]:
        return train_loop({**config, "trainer": trainer})

    loop.__name__ = loop.__qualname__ = f"{trainer}_loop"
    loop.__doc__ = f"Runs the trainer {trainer}; see `train_loop`."
    return loop


for _trainer in SHORT_NAMES["trainers"]:  # pretrain_loop, sft_loop, reward_loop, dpo_loop, ppo_loop, grpo_loop
    globals()[f"{_trainer}_loop"] = loop_of(_trainer)


def __getattr__(name: str) -> Any:
    """Declares the loop functions to type checkers."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
