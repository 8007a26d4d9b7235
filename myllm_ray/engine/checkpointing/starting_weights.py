"""Checkpoints of other runs whose weights a run starts from: selection, verification and the record in the manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from myllm_ray.common.pretrained import checkpoint_in
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest


def named_models(config: TrainerConfig) -> Iterator[tuple[Any, str, str]]:
    """Yields the fields of a config that name a model, as (section, field, dotted key)."""
    own, prefix = config.trainer_section, config.section_key
    for section, field, key in (
        (config.model, "name", "model.name"),
        (own, "reference_model", f"{prefix}.reference_model"),
        (own, "reward_model", f"{prefix}.reward_model"),
    ):
        if isinstance(name := getattr(section, field, None), str) and name:
            yield section, field, key


def pinned(name: str, key: str) -> str:
    """Returns the newest complete checkpoint if `name` is a run's folder, else `name` itself.

    Args:
        name: path or name of a model.
        key: the dotted config key, for the error message.

    Raises:
        ConfigError: the run's folder contains no complete checkpoint.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file() or not (path / "checkpoints").is_dir():
        return name
    newest = CheckpointManager(folder=path / "checkpoints").latest()
    if newest is None:
        raise ConfigError(f"{key}: the run {path} holds no complete checkpoint")
    return str(newest)


def check_starting_weights(config: TrainerConfig) -> None:
    """Verifies the checkpoints whose weights a config starts from.

    Raises:
        ConfigError: a checkpoint is damaged.
    """
    for section, field, key in named_models(config):
        checkpoint = checkpoint_in(getattr(section, field))
        if checkpoint is not None and (damage := find_damage(checkpoint)):
            raise ConfigError(f"{key}: {damage}")


def starting_weights(config: TrainerConfig) -> dict[str, dict[str, Any]]:
    """Returns path, step and checksum of the checkpoints whose weights a config starts from, by dotted key.

    The checksum is the manifest's. It covers all files, because the manifest contains their checksums.
    """
    found = {}
    for section, field, key in named_models(config):
        checkpoint = checkpoint_in(getattr(section, field))
        if checkpoint is not None:
            manifest = read_manifest(checkpoint)
            found[key] = {"path": str(checkpoint), "step": manifest["step"], "checksum": manifest["checksum"]}
    return found


def check_same_weights(checkpoint: Path, saved: dict[str, Any], config: TrainerConfig) -> None:
    """Checks that a run which resumes was started from the weights that the config names now.

    Args:
        checkpoint: folder of the checkpoint to resume from, for the error message.
        saved: its manifest.
        config: the config of the run that resumes.

    Raises:
        CheckpointError: the weights differ; the message names the config key.
    """
    now = starting_weights(config)
    for key, then in saved.get("weights", {}).items():
        # Checksums, not paths: a folder may be moved, and its content may change.
        if now.get(key, {}).get("checksum") != then["checksum"]:
            raise CheckpointError(
                f"can't resume from {checkpoint}: {key} was the checkpoint {then['path']} of step {then['step']}, "
                "which holds other weights now; use that checkpoint unchanged, or start a new run (run.name)"
            )


def check_same_base(checkpoint: Path, saved: dict[str, Any], now: dict[str, Any] | None) -> None:
    """Checks that the weights that a checkpoint does not hold are those of the run that resumes.

    Args:
        checkpoint: folder of the checkpoint to resume from, for the error message.
        saved: its manifest.
        now: identity of the frozen weights of the run that resumes (`base_weights.base_identity`); None: not known.

    Raises:
        CheckpointError: the weights differ.
    """
    then = saved.get("base")
    if then is None or now is None or differences(then, now) is None:
        return
    raise CheckpointError(
        f"can't resume from {checkpoint}: it holds only the trained weights, and their base has changed "
        f"({differences(then, now)}); use the base that it was trained on, or start a new run (run.name)"
    )


def differences(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Returns how two identities of frozen weights differ, in a few words, or None if the weights are the same.

    Names, paths and revisions may differ: a folder may be moved, and a new revision may have the same weights.
    """
    for key in ("source", "model", "checksum", "sha256", "seed"):
        if then.get(key) != now.get(key):
            was, is_now = (f"{i['source']} {i.get('name', '')} {str(i.get(key))[:12]}" for i in (then, now))
            revisions = [i["revision"] for i in (then, now) if i.get("revision")]
            hub = f", revisions {' and '.join(r[:12] for r in revisions)}" if len(revisions) == 2 else ""
            return f"{key}: {' '.join(was.split())} then, {' '.join(is_now.split())} now{hub}"
    return None
