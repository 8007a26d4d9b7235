"""Creates the JSON for DeepSpeed from the config of a run and the DeepSpeed JSON of the user."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from myllm_ray.accelerators.options import check_names
from myllm_ray.common.distributed import is_distributed, world_size
from myllm_ray.config.by_hand import gradient_clip
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import merge
from myllm_ray.config.sections import AcceleratorSection, BatchSection, ScalingSection
from myllm_ray.config.validation import section_of

_ELSEWHERE = {
    "optimizer": "the section `optimizer`",
    "scheduler": "the section `scheduler`",
    "amp": "accelerator.precision",
    "torch_autocast": "accelerator.precision",
    "activation_checkpointing": "accelerator.activation_checkpointing",
    "compile": "accelerator.compile",
    "data_efficiency": "the section `data`",
    "curriculum_learning": "the section `data`",
    "managed_gradient_accumulation": "the section `batch`",
    "gradient_allreduce_op": "the engine, which sums over ranks,",
}
"""Maps the keys of a DeepSpeed JSON that are not allowed to the part of the config or engine that replaces them."""

# Top-level keys that are valid in addition to those that `deepspeed.runtime.constants` names.
_SECTIONS = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
    "flops_profiler",
    "compression_training",
    "hybrid_engine",
    "nebula",
    "timers",
    "sparse_attention",
    "tensor_parallel",
    "weight_quantization",
    "eigenvalue",
    "progressive_layer_drop",
    "sparse_gradients",
    "expert_parallel",
)


def check_json(json: Mapping[str, Any]) -> None:
    """Checks a DeepSpeed JSON with DeepSpeed's parser, before anything starts.

    Args:
        json: The JSON that `deepspeed_config` returned.

    Raises:
        ConfigError: Names the key and the problem.
    """
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    # DeepSpeed ignores unknown top-level keys, so they are checked here. The constants of its
    # module contain the names of most of them.
    names = {value for key, value in vars(constants).items() if key.isupper() and isinstance(value, str)}
    check_names(json, {n for n in names if n.isidentifier()} | {*_SECTIONS}, "DeepSpeed")
    try:
        DeepSpeedConfig(dict(json))
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            f"accelerator.options: {first['loc'][-1]} of {error.title}: {first['msg']} (got {first['input']!r})"
        ) from None
    except (AssertionError, ValueError, DeepSpeedConfigError) as error:
        raise ConfigError(
            f"accelerator.options: DeepSpeed rejects them: {' '.join(str(error).split())[:300]}"
        ) from None


def deepspeed_config(config: Any, section: AcceleratorSection, stage: int) -> dict[str, Any]:
    """Returns the JSON for `deepspeed.initialize`.

    Args:
        config: The config of the run, a `TrainerConfig` or a dict of sections.
        section: Its `accelerator` section. `options` is the JSON of the user, in which "auto" leaves a value to the
            config.
        stage: The ZeRO stage.

    Raises:
        ConfigError: A key of the JSON contradicts the config.
    """
    options, precision, offload = section.options, section.precision, section.offload
    for key, where in _ELSEWHERE.items():
        if key in options:
            raise ConfigError(f"accelerator.options.{key}: {where} controls this; remove the option")
    decided = _decided(config, section, stage)
    for key, value in _flat(options):
        if key in decided and value not in ("auto", decided[key].value):
            raise ConfigError(
                f"accelerator.options.{key}={value} contradicts {decided[key].key}, which sets it to "
                f"{decided[key].value}: change that key and remove this option"
            )
    mine: dict[str, Any] = {
        # The engine accumulates gradients and marks the last micro-batch, so DeepSpeed must not count micro-batches.
        "train_micro_batch_size_per_gpu": decided["train_micro_batch_size_per_gpu"].value,
        "gradient_accumulation_steps": 1,
        # Stage 0 steps a plain torch optimizer; the base class clips its gradients.
        "gradient_clipping": decided["gradient_clipping"].value if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage},
        **_precision(stage, precision, section.gradient_dtype),
    }
    for what, name in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
        if (where := getattr(offload, what)) != "none":
            device = {"disk": "nvme"}.get(where, where)
            mine["zero_optimization"][name] = {
                "device": device,
                **({"nvme_path": offload.path} if device == "nvme" else {}),
            }
    # The user's values override the defaults, and the values that follow from the config override both.
    given = {k: v for k, v in options.items() if k not in ("train_batch_size", "gradient_accumulation_steps")}
    return merge(merge(_DEFAULTS, _without_auto(given)), mine)


def frozen_config(json: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the JSON of an engine for a model that is not trained: ZeRO-3 without an optimizer."""
    # Gathered parameters are released after the forward pass of their module, because no backward pass follows.
    zero = {key: value for key, value in json["zero_optimization"].items() if key != "offload_optimizer"}
    released = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    return {**json, "zero_optimization": {**released, **zero}, "gradient_clipping": 0.0}


_DEFAULTS: dict[str, Any] = {
    "steps_per_print": None,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    # memory_efficient_linear: True would replace torch.nn.functional.linear in the whole process.
    # reduce_bucket_size: DeepSpeed's default of 500M elements is a buffer of 2 GB in fp32 per worker for any model.
    "zero_optimization": {"memory_efficient_linear": False, "reduce_bucket_size": 50_000_000},
}


def _precision(stage: int, precision: str, gradients: str) -> dict[str, Any]:
    # Stage 0 holds fp32 parameters and computes under autocast.
    if precision == "fp32" or stage == 0:
        return {}
    # Half-precision gradients are reduced and accumulated in fp32 by default.
    reduction = {"communication_data_type": gradients, "data_types": {"grad_accum_dtype": gradients}}
    if precision == "bf16":
        return {"bf16": {"enabled": True}, **reduction}
    # The loss scale follows the same rule as on the other backends (torch.amp.GradScaler): it starts at 2**16, halves
    # after an overflow and doubles after 2000 steps.
    return {
        "fp16": {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": 16,
            "loss_scale_window": 2000,
            "hysteresis": 1,
        },
        **reduction,
    }


class Decided(NamedTuple):
    """A value of the DeepSpeed JSON that follows from the config."""

    value: Any
    key: str
    """The config key that determines the value."""


def _decided(config: Any, section: AcceleratorSection, stage: int) -> dict[str, Decided]:
    """Returns the values that follow from the config, by dotted key of the JSON."""
    batch, scaling = section_of(config, "batch", BatchSection), section_of(config, "scaling", ScalingSection)
    # The number of workers of an elastic run is known only after they have started.
    elastic = scaling.least != scaling.most
    workers = max(1, world_size() if elastic and is_distributed() else scaling.least)
    device = {"none": "none", "cpu": "cpu", "disk": "nvme"}
    optimizer, parameters = device[section.offload.optimizer], device[section.offload.parameters]
    accumulation = max(1, batch.global_size // (batch.micro_size * workers))
    sums = Decided(section.gradient_dtype, "accelerator.gradient_dtype")
    rounded = section.precision != "fp32" and stage > 0
    return {
        **(dict.fromkeys(("communication_data_type", "data_types.grad_accum_dtype"), sums) if rounded else {}),
        "train_batch_size": Decided(batch.global_size, "batch.global_size"),
        "train_micro_batch_size_per_gpu": Decided(batch.micro_size, "batch.micro_size"),
        "gradient_accumulation_steps": Decided(accumulation, "the section `batch`"),
        "gradient_clipping": Decided(gradient_clip(config) or 0.0, "gradient_clip"),
        "zero_optimization.stage": Decided(stage, "accelerator.stage"),
        "zero_optimization.offload_optimizer.device": Decided(optimizer, "accelerator.offload.optimizer"),
        "zero_optimization.offload_param.device": Decided(parameters, "accelerator.offload.parameters"),
        "bf16.enabled": Decided(section.precision == "bf16", "accelerator.precision"),
        "fp16.enabled": Decided(section.precision == "fp16", "accelerator.precision"),
    }


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without_auto(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, Mapping) else v for k, v in options.items() if v != "auto"}
