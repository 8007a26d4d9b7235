"""Resolution of names in a config: short names of built-in components, and import paths of custom components.

Custom components are named by import path (`my_pkg.my_mod:MyTrainer`), because a class that is registered in the driver
would be unknown on a Ray worker. Installed packages add short names with the entry point groups `myllm_ray.trainers`,
`myllm_ray.accelerators`, `myllm_ray.callbacks`, `myllm_ray.trackers` and `myllm_ray.formats`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from importlib.metadata import entry_points
from typing import Any

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.other_names import NAMES

SHORT_NAMES: dict[str, dict[str, str]] = {
    "trainers": {
        "pretrain": "myllm_ray.trainers.pretrain:PretrainTrainer",
        "sft": "myllm_ray.trainers.sft:SFTTrainer",
        "reward": "myllm_ray.trainers.reward:RewardTrainer",
        "dpo": "myllm_ray.trainers.dpo:DPOTrainer",
        "ppo": "myllm_ray.trainers.ppo:PPOTrainer",
        "grpo": "myllm_ray.trainers.grpo:GRPOTrainer",
    },
    "accelerators": {
        "single": "myllm_ray.accelerators.single:SingleGPUAccelerator",
        "ddp": "myllm_ray.accelerators.ddp:DDPAccelerator",
        "fsdp": "myllm_ray.accelerators.fsdp:FSDPAccelerator",
        "accelerate": "myllm_ray.accelerators.hf_accelerate:HFAccelerator",
        "deepspeed": "myllm_ray.accelerators.deepspeed:DeepSpeedAccelerator",
    },
    "callbacks": {
        "console": "myllm_ray.engine.reporting.console:ConsoleCallback",
        "jsonl": "myllm_ray.engine.reporting.jsonl:JSONLCallback",
        "report": "myllm_ray.engine.reporting.report:ReportCallback",
        "otel": "myllm_ray.engine.reporting.telemetry:OpenTelemetryCallback",
        "early_stopping": "myllm_ray.engine.callbacks:EarlyStoppingCallback",
    },
    "trackers": {
        "tensorboard": "myllm_ray.engine.reporting.trackers.tensorboard:TensorBoardTracker",
        "wandb": "myllm_ray.engine.reporting.trackers.wandb:WandbTracker",
        "mlflow": "myllm_ray.engine.reporting.trackers.mlflow:MLflowTracker",
        "trackio": "myllm_ray.engine.reporting.trackers.trackio:TrackioTracker",
    },
    "formats": {
        "text": "myllm_ray.data.formats:text",
        "instruction": "myllm_ray.data.formats:instruction",
        "chat": "myllm_ray.data.formats:chat",
        "prompt_completion": "myllm_ray.data.formats:prompt_completion",
        "preference": "myllm_ray.data.formats:preference",
        "unpaired": "myllm_ray.data.formats:unpaired",
        "prompt": "myllm_ray.data.formats:prompt",
        "tokens": "myllm_ray.data.pretokenized:Tokens",
    },
}


def names(kind: str) -> dict[str, str]:
    """Returns all short names of a kind, including those of installed packages, with their import paths.

    Args:
        kind: trainers, accelerators, callbacks, trackers or formats.
    """
    found = {e.name: e.value for e in entry_points(group=f"myllm_ray.{kind}")}
    return {**found, **SHORT_NAMES[kind]}


def import_path(kind: str, name: str, key: str) -> str:
    """Returns the import path of a short name, and an import path unchanged. Imports nothing.

    Args:
        kind: trainers, accelerators, callbacks, trackers or formats.
        name: a short name or an import path.
        key: the config key with this value, for error messages.

    Raises:
        ConfigError: `name` is neither a short name nor an import path.
    """
    if ":" in name:
        return name
    if name in SHORT_NAMES[kind]:
        return SHORT_NAMES[kind][name]
    table = names(kind)
    if name in table:
        return table[name]
    close = [meant] if (meant := NAMES.get(kind, {}).get(name.lower())) else difflib.get_close_matches(name, table, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"{key}: unknown name {name!r}; {hint}choose from {', '.join(sorted(table))}, "
        "or give an import path such as my_pkg.my_mod:my_name"
    )


def load_object(path: str, key: str) -> Any:
    """Imports and returns an object. Modules in the working directory can be imported, as with `python my_script.py`.

    Args:
        path: an import path, `my_pkg.my_mod:name`.
        key: the config key with this value, for error messages.

    Raises:
        ConfigError: the module or the name in it can't be found.
    """
    module_name, _, attribute = path.partition(":")
    if module_name.endswith(".py") or "/" in module_name or not attribute:
        module = module_name.removesuffix(".py").strip("./").replace("/", ".")
        meant = (
            f"{module}:{attribute}"
            if attribute
            else ":".join(module.rsplit(".", 1))
            if "." in module
            else f"{module}:name"
        )
        raise ConfigError(
            f"{key}: {path!r} is not an import path"
            + (": drop .py" if module_name.endswith(".py") else "")
            + f"; write module:name, here {meant}"
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{key}: no module {error.name!r} (from {path!r}): install it, or start in the folder that contains it"
            ) from None
        raise
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"{key}: module {module_name!r} has no {attribute!r} (from {path!r})")
        target = getattr(target, part)
    return target


def resolve(kind: str, name: str, key: str) -> Any:
    """Returns the object of a short name or an import path; see `import_path` and `load_object`."""
    return load_object(import_path(kind, name, key), key)
