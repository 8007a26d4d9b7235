"""The run's folder `<run.storage>/<run.name>`: whose it is, and what a run goes on from."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any, cast

from myllm_ray.common.files import why_not_writable, write_atomic, write_json
from myllm_ray.common.secrets import mask, mask_text
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.load import to_yaml
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine import pulse
from myllm_ray.engine.checkpoint import CheckpointManager, find_damage, read_manifest, versions
from myllm_ray.engine.mirror import Mirror
from myllm_ray.engine.resume_notices import changes, resume_notices
from myllm_ray.engine.starting_weights import check_same_weights

log = logging.getLogger(__name__)
_OLD_WORKERS_SECONDS = 20.0
_SAME = ("trainer", "model", "tokenizer")
"""Config sections that must not change when a run goes on."""


def folder_of(config: TrainerConfig) -> Path:
    return Path(config.run.storage) / config.run.name


def checkpoints_of(config: TrainerConfig) -> CheckpointManager:
    return CheckpointManager(folder=folder_of(config) / "checkpoints", keep_last=config.checkpoint.keep_last,
                             keep_best=config.checkpoint.keep_best, background=config.checkpoint.async_,
                             keep_every=config.checkpoint.keep_every, mirror=_mirror_of(config))


def _mirror_of(config: TrainerConfig) -> str | None:
    return f"{config.checkpoint.mirror.rstrip('/')}/{config.run.name}" if config.checkpoint.mirror else None


def claim(config: TrainerConfig, identity: dict[str, Any]) -> None:
    """Make the run's folder this run's, once, before any worker starts.

    Raises:
        ConfigError: an earlier run stands there and nothing says to continue or replace it, or the folder is not writable.
        CheckpointError: what is to be continued is damaged, or was another run.
    """
    folder, resume = folder_of(config), config.checkpoint.resume
    own = pulse.is_own(folder)
    if not own:
        refuse_two_at_once(folder)
    manager = checkpoints_of(config)
    there = manager.mirror.names() if manager.mirror is not None else []
    used = manager.all() or there or (folder / "metrics.jsonl").exists()
    if resume != "auto" and used and not config.run.overwrite:
        raise ConfigError(f"{folder} holds an earlier run: checkpoint.resume=auto continues it, another run.name starts "
                          "beside it, run.overwrite=true replaces it")
    start = resume_source(resume) if resume not in ("auto", "never") else manager.latest() if resume == "auto" else None
    if start is not None:
        check_same_run(start, config, identity)
        for line in resume_notices(read_manifest(start), mask(config.model_dump(mode="json"))):
            log.warning("%s", line)
        if folder.resolve() in start.resolve().parents and resume != "auto":
            raise ConfigError(f"checkpoint.resume={resume} lies inside the run it would replace: give another run.name, or "
                              "use checkpoint.resume=auto")
    problem = why_not_writable(folder)
    if problem:
        raise ConfigError(f"run.storage: {folder} can't be written: {problem}")
    if used and resume != "auto":  # replaced, wherever it stands
        for path in sorted(folder.iterdir()):
            if path != pulse.pulse_folder(folder):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in there:
            cast(Mirror, manager.mirror).remove(name)
    if not own:
        pulse.remove(folder)  # what processes that were killed left behind
    write_atomic(folder / "config.yaml", to_yaml(mask(config.model_dump(mode="json"))))
    write_json(folder / "environment.json", {**versions(), "platform": platform.platform(),
                                             "command": [mask_text(word) for word in sys.argv], "cpus": os.cpu_count(),
                                             "packing": identity.get("packing")})


def refuse_two_at_once(folder: Path) -> None:
    """Two runs in one folder would spoil each other. Workers whose driver was killed take a moment to end.

    Raises:
        ConfigError: a run is going on there.
    """
    until = time.monotonic() + _OLD_WORKERS_SECONDS
    while (beat := pulse.going_on(folder)) is not None:
        if time.monotonic() > until:
            who = f"rank {beat['rank']}" if "rank" in beat else beat["phase"]
            raise ConfigError(f"{folder}: a run is going on there ({who}: pid {beat['pid']} on {beat['host']}); end it "
                              f"(myllm-ray stop {folder}), or give another run.name")


def resume_point(config: TrainerConfig) -> Path | None:
    """What a worker goes on from: the newest whole checkpoint of the run, or what `checkpoint.resume` names.

    Called after `claim`, which cleared away what is not to be continued; so it also serves a group that Ray restarts.
    """
    own = checkpoints_of(config).latest()
    if own is not None:
        return own
    return resume_source(config.checkpoint.resume) if config.checkpoint.resume not in ("auto", "never") else None


def check_same_run(checkpoint: Path, config: TrainerConfig, identity: dict[str, Any]) -> None:
    """Refuse to go on with another model or other data than the checkpoint was trained with.

    Raises:
        CheckpointError: says what changed.
    """
    saved = read_manifest(checkpoint)
    if not isinstance(saved.get("config"), dict) or not isinstance(saved.get("identity"), dict):
        raise CheckpointError(f"can't go on from {checkpoint}: it was not written by a run from a config file")
    then, now = saved["config"], mask(config.model_dump(mode="json"))
    for section in _SAME:
        change = next(changes(section, then.get(section), now[section]), None)
        if change:
            raise CheckpointError(f"can't go on from {checkpoint}: {change}; {_what_to_do(checkpoint, config)}")
    check_same_weights(checkpoint, saved, config)
    if then["run"]["seed"] != config.run.seed:
        raise CheckpointError(f"can't go on from {checkpoint}: run.seed was {then['run']['seed']}, now it is {config.run.seed}")
    for key, what in (("tokens", "the data itself (files, format or tokenizer)"), ("batch.global_size", "batch.global_size"),
                      ("packing", "what shares a row"), ("rows", "the order or packing of the data")):
        before, after = saved["identity"].get(key, identity[key]), identity[key]  # older checkpoints lack `packing`
        if before != after:
            change = next(changes("data", then.get("data"), now["data"]), None)
            if key == "batch.global_size" or (key == "packing" and change is None):
                change = f"it was {before}, now it is {after}"
            raise CheckpointError(f"can't go on from {checkpoint}: {what} has changed{f' ({change})' if change else ''}, so its "
                                  f"place in the data means nothing any more; {_what_to_do(checkpoint, config)}")


def _what_to_do(checkpoint: Path, config: TrainerConfig) -> str:
    """How to train what the config asks for, where it is not the run of the checkpoint."""
    if config.checkpoint.resume == "auto":
        return "undo the change, or start a new run (run.name)"
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return ("undo the change; or, to train its weights on something else, start a new stage: leave checkpoint.resume out and give "
            f"model.name={run}")


def resume_source(resume: str) -> Path:
    """A checkpoint folder, or the newest checkpoint of a run's folder."""
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        newest = CheckpointManager(folder=path / "checkpoints").latest()
        if newest is None:
            raise CheckpointError(f"checkpoint.resume: {path} has no whole checkpoint")
        return newest
    damage = find_damage(path)
    if damage:
        raise CheckpointError(f"checkpoint.resume: {damage}; give a step-… folder, a run's folder, auto or never")
    return path
