"""The run's folder `<run.storage>/<run.name>`: its reservation for one run, and the checkpoint to resume from."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from myllm_ray.common import distributed
from myllm_ray.common.files import why_not_writable, write_atomic, write_json
from myllm_ray.common.secrets import mask, mask_text
from myllm_ray.config.amendments import effective
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.load import to_yaml
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.section import Section
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest, step_of, versions
from myllm_ray.engine.checkpointing.resume_notices import changes, resume_notices
from myllm_ray.engine.checkpointing.starting_weights import check_same_base, check_same_weights
from myllm_ray.engine.checkpointing.verification import set_aside, verify
from myllm_ray.engine.environment import describe
from myllm_ray.engine.liveness import heartbeat

log = logging.getLogger(__name__)
_OLD_WORKERS_SECONDS = 20.0  # workers whose driver was killed exit within this time
_SAME = ("trainer", "model", "tokenizer")
"""Config sections that must not change when a run resumes."""


def folder_of(config: TrainerConfig) -> Path:
    """Returns the run's folder."""
    return Path(config.run.storage) / config.run.name


def checkpoints_of(config: TrainerConfig) -> CheckpointManager:
    """Returns a manager of the run's checkpoints, as the config describes them."""
    return CheckpointManager(
        folder=folder_of(config) / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        background=config.checkpoint.async_,
        keep_every=config.checkpoint.keep_every,
        mirror=_remote_url(config),
    )


def _remote_url(config: TrainerConfig) -> str | None:
    return f"{config.checkpoint.mirror.rstrip('/')}/{config.run.name}" if config.checkpoint.mirror else None


def claim(config: TrainerConfig, identity: dict[str, Any], plan: Mapping[str, Any] | None = None) -> None:
    """Reserves the run's folder for this run. Called once, before any worker starts.

    If the run replaces an earlier one, the earlier run's files and its checkpoints on the mirror are removed. Writes
    `config.yaml` and `environment.json`.

    Args:
        config: the config of the run.
        identity: what must not change in the data when the run resumes; see `check_same_run`.
        plan: what else is known of the run before it starts, such as its number of steps, for `environment.json`.

    Raises:
        ConfigError: the folder contains an earlier run and the config neither resumes nor replaces it, another run is
            active in it, or it is not writable.
        CheckpointError: the checkpoint to resume from is damaged, or is of a different run.
    """
    folder, resume = folder_of(config), config.checkpoint.resume
    own = heartbeat.is_own(folder)
    # `Startup` in this process writes a heartbeat already, which would look like the activity of another run.
    if not own:
        refuse_two_at_once(folder)
    manager = checkpoints_of(config)
    there = manager.remote.names() if manager.remote is not None else []
    used = manager.all() or there or (folder / "metrics.jsonl").exists()
    if resume != "auto" and used and not config.run.overwrite:
        raise ConfigError(
            f"{folder} contains an earlier run: checkpoint.resume=auto resumes it, another run.name starts a "
            "new run, run.overwrite=true replaces it"
        )
    start = None
    if resume == "auto":
        start = manager.latest(contents=False)  # the workers verify the contents, in parallel
    elif resume != "never":
        start = resume_source(resume)
    # Everything that can be refused is refused before the first file is removed.
    if start is not None:
        check_same_run(start, config, identity)
        for line in resume_notices(read_manifest(start), mask(config.model_dump(mode="json"))):
            log.warning("%s", line)
        if folder.resolve() in start.resolve().parents and resume != "auto":
            raise ConfigError(
                f"checkpoint.resume={resume} is inside the run that it would replace: choose another run.name, or "
                "use checkpoint.resume=auto"
            )
    problem = why_not_writable(folder)
    if problem:
        raise ConfigError(f"run.storage: {folder} can't be written: {problem}")
    if used and resume != "auto":  # the earlier run is replaced, in the folder and on the mirror
        for path in sorted(folder.iterdir()):
            if path != heartbeat.heartbeat_folder(folder):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if manager.remote is not None:
            # What stays on the mirror would be fetched by `resume_point`.
            for name in there:
                manager.remote.remove(name)
            manager.remote.remove_records()
    if not own:
        heartbeat.remove(folder)  # heartbeats and requests of processes that were killed
    raw = config.model_dump(mode="json")
    write_atomic(folder / "config.yaml", to_yaml(mask(raw)))
    write_json(
        folder / "environment.json",
        {
            **versions(),
            "platform": platform.platform(),
            "command": [mask_text(word) for word in sys.argv],
            "cpus": os.cpu_count(),
            "packing": identity.get("packing"),
            **describe(raw),
            "data": dict(identity),
            "plan": dict(plan or {}),
            "started": time.time(),
        },
    )


def refuse_two_at_once(folder: Path) -> None:
    """Checks that no other run is active in a folder: two runs would overwrite each other's files.

    Workers whose driver was killed need some seconds to exit; the function waits up to `_OLD_WORKERS_SECONDS` for them.

    Raises:
        ConfigError: a run is still active after that time.
    """
    until = time.monotonic() + _OLD_WORKERS_SECONDS
    while (beat := heartbeat.find_activity(folder)) is not None:
        if time.monotonic() > until:
            who = f"rank {beat['rank']}" if "rank" in beat else beat["phase"]
            raise ConfigError(
                f"{folder}: a run is active there ({who}: pid {beat['pid']} on {beat['host']}); stop it "
                f"(myllm-ray stop {folder}), or choose another run.name"
            )


def resume_point(config: TrainerConfig) -> Path | None:
    """Returns the checkpoint that a worker resumes from, or None for a start at step 0. Its contents are not verified.

    This is the run's newest complete checkpoint, else the one that `checkpoint.resume` names. `claim` has removed the
    checkpoints of a replaced run before, so the function also gives the right one to a worker group that is restarted.
    """
    own = checkpoints_of(config).latest(contents=False)
    if own is not None:
        return own
    given = config.checkpoint.resume
    return resume_source(given, contents=False) if given not in ("auto", "never") else None


def verified_start(config: TrainerConfig, given: Path | None) -> tuple[Path | None, dict[str, Any], str | None]:
    """Returns the checkpoint that a worker resumes from, verified by all ranks together. Every rank calls this.

    A damaged checkpoint of the run is set aside, and the one before is used.

    Args:
        config: the config of the run.
        given: the checkpoint that the launcher has chosen; None: the result of `resume_point`.

    Returns:
        The checkpoint or None, its manifest, and why `given` can't be used. In that case the launcher has to choose
        again, because it started this group for the step of `given`.

    Raises:
        CheckpointError: a checkpoint that is not of this run is damaged.
    """
    while True:
        # Rank 0 chooses the checkpoint: another rank may not see the newest one on a shared file system yet.
        start = distributed.from_main((given or resume_point(config)) if distributed.is_main() else None)
        if start is None:
            return None, {}, None
        manifest, damage = verify(start)
        if damage is None:
            return start, manifest, None
        if start.absolute().parent != (folder_of(config) / "checkpoints").absolute():
            raise CheckpointError(damage)
        problem = None
        if distributed.is_main():
            log.warning("checkpoint skipped: %s", damage)
            try:
                set_aside(start)
            except CheckpointError as error:
                problem = str(error)
        if problem := distributed.from_main(problem):
            raise CheckpointError(problem)
        if given is not None:
            return None, {"step": step_of(start)}, damage


def check_same_run(checkpoint: Path, config: TrainerConfig, identity: dict[str, Any]) -> None:
    """Checks that model and data are those that the checkpoint was trained with.

    Args:
        checkpoint: folder of the checkpoint to resume from.
        config: the config of the run that resumes.
        identity: checksums of the tokens and of the rows, the packing and the global batch size, by name.

    Raises:
        CheckpointError: something changed; the message names it.
    """
    saved = read_manifest(checkpoint)
    if not isinstance(saved.get("config"), dict) or not isinstance(saved.get("identity"), dict):
        raise CheckpointError(f"can't resume from {checkpoint}: it was not written by a run from a config file")
    then, now = saved["config"], mask(config.model_dump(mode="json"))
    for section in _SAME:
        change = next(changes(section, _complete(then.get(section), getattr(config, section)), now[section]), None)
        if change:
            raise CheckpointError(f"can't resume from {checkpoint}: {change}; {_what_to_do(checkpoint, config)}")
    check_same_weights(checkpoint, saved, config)
    check_same_base(checkpoint, saved, identity.get("base"))
    if then["run"]["seed"] != config.run.seed:
        raise CheckpointError(
            f"can't resume from {checkpoint}: run.seed was {then['run']['seed']}, now it is {config.run.seed}"
        )
    step = int(saved["step"])
    check_past(checkpoint, step, then["run"].get("amendments") or [], now["run"]["amendments"])
    # The checkpoint has the batch size of its own last step, which amendments may have changed.
    if "batch.global_size" in identity:
        identity = {**identity, "batch.global_size": effective(config, max(0, step - 1)).batch.global_size}
    # A cause comes before its consequences: other tokens also change the rows, and the message must name the tokens.
    for key, what in (
        ("tokens", "the data itself (files, format or tokenizer)"),
        ("batch.global_size", "batch.global_size"),
        ("packing", "the rule for documents that share a row"),
        ("rows", "the order or packing of the data"),
    ):
        before, after = saved["identity"].get(key, identity[key]), identity[key]  # older checkpoints lack `packing`
        if before != after:
            change = next(changes("data", then.get("data"), now["data"]), None)
            if change is None and key == "rows" and config.data.mixture:  # its stages may be parts of the run
                change = next(changes("run.max_steps", then["run"].get("max_steps"), config.run.max_steps), None)
            if key == "batch.global_size" or (key == "packing" and change is None):
                change = f"it was {before}, now it is {after}"
            raise CheckpointError(
                f"can't resume from {checkpoint}: {what} has changed{f' ({change})' if change else ''}, so its "
                f"position in the data is no longer valid; {_what_to_do(checkpoint, config)}"
            )


def _complete(then: Any, now: Any) -> Any:
    """Returns a section of an earlier config, with the defaults of keys that did not exist at that time."""
    if not isinstance(now, Section) or not isinstance(then, dict):
        return then
    defaults = {name: field.get_default(call_default_factory=True) for name, field in type(now).model_fields.items()}
    return {
        **{name: value for name, value in defaults.items() if value is not PydanticUndefined},
        **{name: _complete(value, getattr(now, name, None)) for name, value in then.items()},
    }


def check_past(checkpoint: Path, step: int, then: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    """Checks that the amendments whose steps a checkpoint was trained with are those of the config.

    Args:
        checkpoint: folder of the checkpoint, for the error message.
        step: its step.
        then, now: the amendments of its manifest and of the config that resumes, as plain data.

    Raises:
        CheckpointError: they differ.
    """
    before, after = ([a for a in given if a["at"] < step] for given in (then, now))
    if before != after:
        raise CheckpointError(
            f"can't resume from {checkpoint}: it was trained with run.amendments={json.dumps(before)}, the config has "
            f"{json.dumps(after)} before its step {step}; give the same amendments, or start a new run (run.name)"
        )


def _what_to_do(checkpoint: Path, config: TrainerConfig) -> str:
    """Returns the advice for a config that does not match the run of the checkpoint."""
    if config.checkpoint.resume == "auto":
        return "undo the change, or start a new run (run.name)"
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return (
        "undo the change; or, to train its weights on other data, start a new stage: leave checkpoint.resume out "
        f"and give model.name={run}"
    )


def resume_source(resume: str, contents: bool = True) -> Path:
    """Returns the checkpoint that `checkpoint.resume` names: a `step-…` folder, or the newest one in a run's folder.

    Args:
        resume: the value of `checkpoint.resume`.
        contents: whether to verify the checksums of the files.

    Raises:
        CheckpointError: the folder contains no complete checkpoint.
    """
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        newest = CheckpointManager(folder=path / "checkpoints").latest(contents)
        if newest is None:
            raise CheckpointError(f"checkpoint.resume: {path} has no complete checkpoint")
        return newest
    damage = find_damage(path, contents)
    if damage:
        raise CheckpointError(f"checkpoint.resume: {damage}; give a step-… folder, a run's folder, auto or never")
    return path
