"""From a run's config and a DeepSpeed JSON to the JSON that DeepSpeed gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from myllm_ray.accelerators.options import check_names
from myllm_ray.common.distributed import is_distributed, world_size
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import merge

_ELSEWHERE = {
    "optimizer": "the section `optimizer`", "scheduler": "the section `scheduler`", "amp": "accelerator.precision",
    "torch_autocast": "accelerator.precision",
    "activation_checkpointing": "accelerator.activation_checkpointing", "compile": "accelerator.compile",
    "data_efficiency": "the section `data`", "curriculum_learning": "the section `data`",
    "managed_gradient_accumulation": "the section `batch`", "gradient_allreduce_op": "the engine, which sums over ranks,",
}
"""Parts of a DeepSpeed JSON that would do again, differently, what the config already says."""


_SECTIONS = ("zero_optimization", "aio", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler",
             "compression_training", "hybrid_engine", "nebula", "timers", "sparse_attention", "tensor_parallel",
             "weight_quantization", "eigenvalue", "progressive_layer_drop", "sparse_gradients", "expert_parallel")


def check_json(json: Mapping[str, Any]) -> None:
    """Let DeepSpeed read its JSON, before anything starts. It passes over misspelt keys of the first level: not here.

    Raises:
        ConfigError: names the key and what is wrong with it.
    """
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    names = {value for key, value in vars(constants).items() if key.isupper() and isinstance(value, str)}
    check_names(json, {n for n in names if n.isidentifier()} | {*_SECTIONS}, "DeepSpeed")
    try:
        DeepSpeedConfig(dict(json))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"accelerator.options: {first['loc'][-1]} of {error.title}: {first['msg']} "
                          f"(got {first['input']!r})") from None
    except (AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise ConfigError(f"accelerator.options: DeepSpeed refuses them: {' '.join(str(error).split())[:300]}") from None


def deepspeed_config(options: Mapping[str, Any], config: Mapping[str, Any], stage: int, precision: str,
                     offload: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize`.

    Args:
        options: the user's JSON; "auto" leaves a value to the config.
        config: the run's config.
        stage, precision, offload: of its `accelerator` section.

    Raises:
        ConfigError: a key of the JSON says something else than the config.
    """
    for key, where in _ELSEWHERE.items():
        if key in options:
            raise ConfigError(f"accelerator.options.{key}: {where} says that here; leave it out")
    decided = _decided(config, stage, precision, offload)
    for key, value in _flat(options):
        if key in decided and value != "auto" and value != decided[key][0]:
            raise ConfigError(f"accelerator.options.{key}={value} contradicts {decided[key][1]}, which makes it "
                              f"{decided[key][0]}: change that, and leave this out")
    mine: dict[str, Any] = {
        # One step of DeepSpeed's is one of ours: accumulation is the engine's, which names the boundary itself.
        "train_micro_batch_size_per_gpu": decided["train_micro_batch_size_per_gpu"][0], "gradient_accumulation_steps": 1,
        "gradient_clipping": decided["gradient_clipping"][0] if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage}, **_precision(stage, precision)}
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if offload[what] != "none":
            device = {"disk": "nvme"}.get(offload[what], offload[what])
            mine["zero_optimization"][name] = {"device": device, **({"nvme_path": offload["path"]} if device == "nvme" else {})}
    given = {k: v for k, v in options.items() if k not in ("train_batch_size", "gradient_accumulation_steps")}
    return merge(merge(_DEFAULTS, _without_auto(given)), mine)


def frozen_config(json: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of an engine for a model that is not trained: ZeRO-3 without an optimizer.

    Gathered parameters are released behind their module: no backward pass needs them again.
    """
    zero = {key: value for key, value in json["zero_optimization"].items() if key != "offload_optimizer"}
    released = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    return {**json, "zero_optimization": {**released, **zero}, "gradient_clipping": 0.0}


_DEFAULTS: dict[str, Any] = {
    "steps_per_print": None, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    # False: true would replace torch.nn.functional.linear for the whole process.
    # 50M elements: DeepSpeed's own 500M are a buffer of 2 GB in fp32 for every worker, whatever the model.
    "zero_optimization": {"memory_efficient_linear": False, "reduce_bucket_size": 50_000_000},
}


def _precision(stage: int, precision: str) -> dict[str, Any]:
    if precision == "fp32" or stage == 0:
        return {}
    reduction = {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    if precision == "bf16":
        return {"bf16": {"enabled": True}, **reduction}
    # The loss scale as on the other backends (torch.amp.GradScaler): from 2**16, half after an overflow, double after 2000 steps.
    return {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000,
                     "hysteresis": 1}, **reduction}


def _decided(config: Mapping[str, Any], stage: int, precision: str, offload: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Values that the config decides, by dotted key of the JSON, each with the key of the config that decides it."""
    batch: Mapping[str, Any] = config.get("batch") or {}
    given: Any = (config.get("scaling") or {}).get("workers") or 1
    elastic = not isinstance(given, int)  # [least, most]: as many as there are now
    workers = (world_size() if is_distributed() else min(given)) if elastic else max(1, given)
    micro, whole = batch.get("micro_size", 1), batch.get("global_size", config.get("batch_size", 8))
    device = {"none": "none", "cpu": "cpu", "disk": "nvme"}
    return {
        "train_batch_size": (whole, "batch.global_size"),
        "train_micro_batch_size_per_gpu": (micro, "batch.micro_size"),
        "gradient_accumulation_steps": (max(1, whole // (micro * workers)), "the section `batch`"),
        "gradient_clipping": (config.get("gradient_clip") or 0.0, "gradient_clip"),
        "zero_optimization.stage": (stage, "accelerator.stage"),
        "zero_optimization.offload_optimizer.device": (device[offload["optimizer"]], "accelerator.offload.optimizer"),
        "zero_optimization.offload_param.device": (device[offload["parameters"]], "accelerator.offload.parameters"),
        "bf16.enabled": (precision == "bf16", "accelerator.precision"),
        "fp16.enabled": (precision == "fp16", "accelerator.precision"),
    }


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, Mapping) else v for k, v in options.items() if v != "auto"}

