"""Names to objects: the one table of short names, and import paths for everything of the user's own.

A name that crosses a process boundary is an import path (`my_pkg.my_mod:MyTrainer`): a class registered by a
decorator in the driver would be unknown on a Ray worker. Installed packages add short names through the entry point
groups `myllm_ray.trainers`, `myllm_ray.accelerators`, `myllm_ray.callbacks`, `myllm_ray.formats`.
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
        "print": "myllm_ray.engine.displays:PrintCallback",
        "progress": "myllm_ray.engine.displays:ProgressCallback",
        "jsonl": "myllm_ray.engine.records:JSONLCallback",
        "report": "myllm_ray.engine.report:ReportCallback",
        "early_stopping": "myllm_ray.engine.callbacks:EarlyStoppingCallback",
    },
    "formats": {
        "text": "myllm_ray.data.formats:text",
        "instruction": "myllm_ray.data.formats:instruction",
        "chat": "myllm_ray.data.formats:chat",
        "prompt_completion": "myllm_ray.data.formats:prompt_completion",
        "preference": "myllm_ray.data.formats:preference",
        "unpaired": "myllm_ray.data.formats:unpaired",
        "prompt": "myllm_ray.data.formats:prompt",
    },
}


def names(kind: str) -> dict[str, str]:
    """All short names of a kind (trainers, accelerators, callbacks, formats), installed packages' included."""
    found = {e.name: e.value for e in entry_points(group=f"myllm_ray.{kind}")}
    return {**found, **SHORT_NAMES[kind]}


def import_path(kind: str, name: str, key: str) -> str:
    """The import path behind a short name; an import path is its own. Imports nothing.

    Raises:
        ConfigError: `name` (the value of config key `key`) is neither.
    """
    if ":" in name:
        return name
    table = names(kind)
    if name in table:
        return table[name]
    close = [meant] if (meant := NAMES.get(kind, {}).get(name.lower())) else difflib.get_close_matches(name, table, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"{key}: there is no {name!r}; {hint}choose from {', '.join(sorted(table))}, "
                      "or give an import path such as my_pkg.my_mod:my_name")


def load_object(path: str, key: str) -> Any:
    """Import `my_pkg.my_mod:name`. The working directory is importable, as it is for `python my_script.py`.

    Raises:
        ConfigError: the module or the name in it can't be found.
    """
    module_name, _, attribute = path.partition(":")
    if module_name.endswith(".py") or "/" in module_name or not attribute:
        module = module_name.removesuffix(".py").strip("./").replace("/", ".")
        meant = f"{module}:{attribute}" if attribute else ":".join(module.rsplit(".", 1)) if "." in module else f"{module}:name"
        raise ConfigError(f"{key}: {path!r} is not an import path" + (": drop .py" if module_name.endswith(".py") else "")
                          + f"; write module:name, here {meant}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        target = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(f"{key}: no module {error.name!r} (from {path!r}): is it installed, or in the folder "
                              "that you start from?") from None
        raise
    for part in attribute.split("."):
        if not hasattr(target, part):
            raise ConfigError(f"{key}: module {module_name!r} has no {attribute!r} (from {path!r})")
        target = getattr(target, part)
    return target


def resolve(kind: str, name: str, key: str) -> Any:
    """The object behind a short name or an import path (see `import_path`, `load_object`)."""
    return load_object(import_path(kind, name, key), key)
