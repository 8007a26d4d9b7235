"""The weights that a run begins from, where these are of another run: which checkpoint, whether it is whole, and what is recorded of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myllm_ray.common.pretrained import checkpoint_in
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpoint import CheckpointManager, find_damage, read_manifest


def named_models(config: TrainerConfig) -> Iterator[tuple[Any, str, str]]:
    """The models by name in a config: (section, field, dotted key)."""
    own = getattr(config, config.trainer, None)
    for section, field, key in ((config.model, "name", "model.name"), (own, "reference_model", f"{config.trainer}.reference_model"),
                                (own, "reward_model", f"{config.trainer}.reward_model")):
        if getattr(section, field, None):
            yield section, field, key


def pinned(name: str, key: str) -> str:
    """The newest whole checkpoint of a run's folder; any other name as it is.

    Raises:
        ConfigError: there is no whole checkpoint.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        return name
    newest = CheckpointManager(folder=path / "checkpoints").latest()
    if newest is None:
        raise ConfigError(f"{key}: the run {path} holds no whole checkpoint")
    return str(newest)


def check_starting_weights(config: TrainerConfig) -> None:
    """Whether the checkpoints that a config begins from are whole.

    Raises:
        ConfigError: one is damaged.
    """
    for section, field, key in named_models(config):
        checkpoint = checkpoint_in(getattr(section, field))
        if checkpoint is not None and (damage := find_damage(checkpoint)):
            raise ConfigError(f"{key}: {damage}")


def starting_weights(config: TrainerConfig) -> dict[str, dict[str, Any]]:
    """By dotted key: path, step and checksum of the checkpoints that a config begins from. The checksum covers all of their files."""
    found = {}
    for section, field, key in named_models(config):
        checkpoint = checkpoint_in(getattr(section, field))
        if checkpoint is not None:
            manifest = read_manifest(checkpoint)
            found[key] = {"path": str(checkpoint), "step": manifest["step"], "checksum": manifest["checksum"]}
    return found


def check_same_weights(checkpoint: Path, saved: dict[str, Any], config: TrainerConfig) -> None:
    """Refuse to resume a run that began from other weights than the config names now.

    Args:
        saved: the manifest of the checkpoint to resume from.

    Raises:
        CheckpointError: says which.
    """
    now = starting_weights(config)
    for key, then in saved.get("weights", {}).items():
        if now.get(key, {}).get("checksum") != then["checksum"]:
            raise CheckpointError(f"can't go on from {checkpoint}: {key} was the checkpoint {then['path']} of step {then['step']}, which holds "
                                  "other weights now; give that checkpoint as it was, or start a new run (run.name)")
