"""The Ray Train loop functions: what each worker of a TorchTrainer runs. Usable alone:

    TorchTrainer(sft_loop, train_loop_config={...a run's config as a mapping...}, scaling_config=...)

`train(config)` (launch.py) hands them more: data that is prepared already, its Ray Data shard, the channel to the driver.

What a worker needs is imported inside the functions: Ray's controller loads this module too, while the workers start, and
would keep them from the CPU for seconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig

if TYPE_CHECKING:
    from myllm_ray.data.prepare import PreparedData

LAUNCHED = "myllm_ray.launched"
"""Key under which `train(config)` puts what it has made ready: {"prepared": PreparedData, "callbacks": of the worker,
besides the config's, "start": checkpoint to go on from, or None}."""


def train_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Any trainer: the one that the config names. Returns the summary of `run_worker`."""
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
    from myllm_ray.orchestration.channel import ForwardCallback
    from myllm_ray.orchestration.output import forwarded_output
    from myllm_ray.orchestration.pools import services
    from myllm_ray.worker import absolute, build_callbacks, run_worker

    raw = {k: v for k, v in config.items() if k != LAUNCHED}
    parsed = absolute(validate(raw, where="train_loop_config"))
    # A Ray worker inherits OMP_NUM_THREADS=1, whatever it has reserved.
    torch.set_num_threads(max(1, int(parsed.scaling.cpus_per_worker)))
    _use_assigned_gpu()
    launched = config.get(LAUNCHED)
    if launched is None:
        from myllm_ray.orchestration.reporting import RayTrainReport

        parsed = distributed.from_main(parsed)  # a run that it begins from may get another newest checkpoint any moment
        prepared = _prepare_alone(parsed)
        callbacks = [*build_callbacks(parsed), RayTrainReport(parsed.checkpoint.async_)]
        return run_worker(parsed, prepared, callbacks=callbacks, services=services(parsed, prepared))
    forward = next((c.output() for c in launched["callbacks"] if isinstance(c, ForwardCallback)), None)
    with forwarded_output(forward if distributed.is_main() else None):
        return _launched(parsed, launched)


def _launched(config: TrainerConfig, launched: Mapping[str, Any]) -> dict[str, Any]:
    """A worker of a run that `train(config)` has started."""
    import ray
    import ray.train

    from myllm_ray.orchestration.pools import services
    from myllm_ray.orchestration.ray_data import RayStream
    from myllm_ray.worker import build_callbacks, run_worker

    prepared = launched["prepared"]
    own = [c for c in build_callbacks(config) if not c.on_driver]
    stream = RayStream(prepared.train, ray.train.get_dataset_shard("train"))
    start = Path(launched["start"]) if launched["start"] else None
    return run_worker(config, prepared, stream, [*own, *launched["callbacks"]], start,
                      watched={"node": ray.get_runtime_context().get_node_id()},
                      services=services(config, prepared))


def _use_assigned_gpu() -> None:
    """The GPU that Ray gave this worker, as everything below finds it: by LOCAL_RANK, as with torchrun.

    Ray's LOCAL_RANK counts workers on a node. With several GPUs a worker, or a part of one, that is not the GPU's number.
    """
    import ray
    from ray.train.torch import get_device

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return  # Ray Train's local mode: the user's own process
    if not ray.get_gpu_ids():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # GPUs that Ray has not reserved for this worker are others'
    elif (device := get_device()).type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)


def _prepare_alone(config: TrainerConfig) -> PreparedData:
    """In a TorchTrainer of the user's own: rank 0 prepares the data and claims the folder, the others wait for it."""
    from myllm_ray.common import distributed
    from myllm_ray.data.prepare import prepare
    from myllm_ray.worker import prepare_run

    problem: Exception | None = None
    isolation = None
    if distributed.is_main():
        try:
            isolation = prepare_run(config).isolation
        except Exception as error:  # told on every rank, or the others would wait for ever
            problem = error
    problem = distributed.from_main(problem)
    if problem is not None:
        raise problem
    return prepare(config, isolation=distributed.from_main(isolation))  # decided once, by rank 0


def pretrain_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Causal-LM pretraining."""
    return train_loop({**config, "trainer": "pretrain"})


def sft_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Supervised fine-tuning."""
    return train_loop({**config, "trainer": "sft"})


def reward_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Reward models from preferences."""
    return train_loop({**config, "trainer": "reward"})


def dpo_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Direct preference optimisation."""
    return train_loop({**config, "trainer": "dpo"})


def ppo_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Proximal policy optimisation."""
    return train_loop({**config, "trainer": "ppo"})


def grpo_loop(config: Mapping[str, Any]) -> dict[str, Any]:
    """Group-relative policy optimisation."""
    return train_loop({**config, "trainer": "grpo"})
