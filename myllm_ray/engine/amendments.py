"""Amendments of a run that exists: requests of `myllm-ray amend`, and their record in the run's folder.

    <run>/.heartbeats/amend-<id>      a request to an active run: {"at": 40 or "now", "set": {"optimizer.lr": 1e-4}}
    <run>/.heartbeats/amended-<id>    the answer: {"at": 40} or {"refused": "..."}
    <run>/config.yaml                 the record: run.amendments

Only the process that holds the run's folder (`engine/liveness/startup.py:Startup`) changes the record: the one that
started the run, between two segments, or the command if no run is active. All ranks of an active run end their segment
at the same step when one of them has read a request. The record is replaced atomically, so a process that is killed
leaves either the config before or the one after the amendment.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from myllm_ray.common.files import write_atomic
from myllm_ray.common.secrets import mask
from myllm_ray.config.amendments import check_amendments, effective, flat, segments, value_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import to_yaml, validate
from myllm_ray.config.resolve import resolve
from myllm_ray.config.run_section import AmendmentSection
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.checkpointing.resume_notices import changes, rate
from myllm_ray.engine.liveness.heartbeat import (
    AMEND,
    AMENDED,
    find_activity,
    heartbeat_folder,
    read_heartbeats,
    request,
)
from myllm_ray.engine.liveness.startup import Startup
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.run_folder import folder_of, resume_point
from myllm_ray.engine.scheduler import SchedulerManager

log = logging.getLogger(__name__)
At = int | Literal["now"]
_SILENT = 3
"""How often in a row no heartbeat changes before a run counts as ended."""


def check_segments(config: TrainerConfig) -> None:
    """Checks the amendments of a config, and builds the schedule, the optimizer and the backend of each segment.

    Raises:
        ConfigError: an amendment is not valid.
    """
    check_amendments(config)
    for step, now in segments(config) if config.run.amendments else ():
        section = now.optimizer.model_copy(update={"groups": []})  # their patterns need the model
        try:
            SchedulerManager(config=now)
            resolve("accelerators", now.accelerator.name, "accelerator.name")(now)
            OptimizerManager(torch.nn.Linear(2, 2, device="meta"), {"optimizer": section}).optimizer  # noqa: B018
        except ConfigError as error:
            raise ConfigError(f"run.amendments: at step {step}: {error}") from None


def amended(config: TrainerConfig, step: int, at: At, values: Mapping[str, Any]) -> TrainerConfig:
    """Returns a config with one more amendment. A second amendment at the same step is merged with the first.

    Args:
        config: the config of the run.
        step: number of steps that the run has completed.
        at: step at which the amendment takes effect; "now": `step`.
        values: values by key.

    Raises:
        ConfigError: the step has passed or is never reached, or the amendment is not valid.
    """
    at = step if at == "now" else at
    if at < step:
        raise ConfigError(
            f"--at {at}: the run has trained {step} steps already, and an amendment can't change them: give a later "
            "step, or start a new run with checkpoint.resume=CHECKPOINT from an earlier checkpoint"
        )
    by_step = {amendment.at: amendment for amendment in config.run.amendments}
    given = {**(by_step[at].set if at in by_step else {}), **flat(values)}
    new = config.model_copy(deep=True)
    by_step[at] = AmendmentSection(at=at, set=given)
    new.run.amendments = [by_step[key] for key in sorted(by_step)]
    check_segments(new)
    last = next(now.run.max_steps for begin, now in reversed(list(segments(config))) if begin <= at)
    if last is not None and at > last:
        raise ConfigError(f"--at {at}: the run ends at step {last} (run.max_steps)")
    return new


def recorded(folder: Path) -> list[dict[str, Any]]:
    """Returns the amendments in the record of a run; empty if there is no record.

    Raises:
        ConfigError: the record can't be read.
    """
    path = folder / "config.yaml"
    return list(_read_record(path)["run"].get("amendments") or []) if path.exists() else []


def _read_record(path: Path) -> dict[str, Any]:
    """Returns the content of a run's `config.yaml`.

    Raises:
        ConfigError: the file can't be read, or is not the config of a run.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("run"), dict):
        raise ConfigError(f"{path} is not the config of a run: it has no section run")
    return raw


def record(folder: Path, config: TrainerConfig) -> None:
    """Replaces the amendments in the record of a run, atomically."""
    path = folder / "config.yaml"
    raw = _read_record(path)
    raw["run"]["amendments"] = mask([a.model_dump(mode="json") for a in config.run.amendments])
    write_atomic(path, to_yaml(raw))


def with_recorded(config: TrainerConfig) -> TrainerConfig:
    """Returns the config of a run that resumes, with the amendments that its folder records.

    Raises:
        ConfigError: the config has amendments, and one of the record is not among them.
    """
    check_amendments(config)  # also converts the values of a config that was made without `validate`
    found = _known(config) if config.checkpoint.resume == "auto" else []
    own = [a.model_dump(mode="json") for a in config.run.amendments]
    missing = [a for a in found if a not in mask(own)]
    if not missing:
        return config
    path = folder_of(config) / "config.yaml"
    if own:
        raise ConfigError(
            f"run.amendments: {path} contains {json.dumps(missing[0])}, the config does not: add it, or leave "
            "run.amendments out to use those of the run"
        )
    config = config.model_copy(deep=True)
    config.run.amendments = [AmendmentSection.model_validate(a) for a in found]
    check_segments(config)
    for amendment in found:
        log.warning("amendment of the run at step %d: %s (%s)", amendment["at"], json.dumps(amendment["set"]), path)
    return config


def _known(config: TrainerConfig) -> list[dict[str, Any]]:
    """Returns the amendments of the run that a config resumes: of its folder, else of its newest checkpoint.

    A folder that was lost is made again from the remote checkpoint store (`checkpoint.mirror`).
    """
    folder = folder_of(config)
    if (folder / "config.yaml").exists():
        return recorded(folder)
    start = resume_point(config)
    return list(read_manifest(start)["config"]["run"].get("amendments") or []) if start else []


def take_requests(config: TrainerConfig) -> TrainerConfig:
    """Adds the requested amendments to the config of a run between two segments, records them, and answers.

    Args:
        config: the config of the run, whose folder this process holds.
    """
    folder = folder_of(config)
    for path in sorted(heartbeat_folder(folder).glob(f"{AMEND}*")):
        answer: dict[str, Any]
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            start = resume_point(config)
            step = int(read_manifest(start)["step"]) if start else 0
            at = step if given["at"] == "now" else int(given["at"])
            new = amended(config, step, at, given["set"])
            record(folder, new)
            config, answer = new, {"at": at}
            log.info("amendment at step %d: %s", at, json.dumps(given["set"]))
        except ConfigError as error:
            log.warning("amendment refused: %s", error)
            answer = {"refused": str(error)}
        except (OSError, ValueError, KeyError, TypeError) as error:  # not written by `myllm-ray amend`
            answer = {"refused": f"{path.name}: {error}"}
        request(folder, AMENDED + path.name.removeprefix(AMEND), json.dumps(answer))
        path.unlink(missing_ok=True)
    return config


def described(config: TrainerConfig, at: int) -> str:
    """Returns what changes after step `at`, in one line: the keys, and the learning rate if it jumps."""
    before, after = effective(config, at - 1), effective(config, at)
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    old["run"]["amendments"] = []  # `rate` would apply them
    sections = [k for k in new if new[k] != old[k] and k != "run"] + ["run.max_steps", "run.epochs"]
    told = [line for key in sections for line in changes(key, value_of(old, key), value_of(new, key))]
    rates = rate(old, at), rate(new, at)
    if None not in rates and rates[0] != rates[1]:
        told.append(f"the learning rate of step {at + 1} is {rates[1]:.3g} instead of {rates[0]:.3g}")
    return "; ".join(told) or "no value differs"


def _answer(run: Path, name: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((heartbeat_folder(run) / (AMENDED + name)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def opened(run: Path) -> TrainerConfig:
    """Returns the config of a run, from the record in its folder.

    Raises:
        ConfigError: the folder is not that of a run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml")
    raw = _read_record(path)
    raw["run"] |= {"storage": str(run.absolute().parent), "name": run.absolute().name}
    return validate(raw, where=str(path), components=False)  # their secrets are masked here


def amend(run: Path, at: At, values: Mapping[str, Any], seconds: float) -> int | None:
    """Amends a run, whether it is active or not.

    Args:
        run: the run's folder.
        at: step at which the amendment takes effect; "now": the next one that all ranks agree on.
        values: values by key.
        seconds: the longest time to wait for the answer of an active run.

    Returns:
        The step at which the amendment takes effect, or None if an active run has not answered in time. It may still
        take the amendment.

    Raises:
        ConfigError: the amendment is not valid, or its step has passed. Nothing was written.
    """
    config, name, until = opened(run), uuid.uuid4().hex[:8], time.monotonic() + seconds
    if find_activity(run) is not None:
        trained = max((int(beat.get("step", 1)) - 1 for beat in read_heartbeats(run).values()), default=0)
        amended(config, max(0, trained), at, values)  # refused before anything is written
        request(run, AMEND + name, json.dumps({"at": at, "set": dict(values)}))
        # Between two segments, a run in a user-defined TorchTrainer writes no heartbeats for a moment.
        silent = 0
        while silent < _SILENT:
            answer = _answer(run, name)
            if answer is not None and "refused" in answer:
                raise ConfigError(answer["refused"])
            if answer is not None:
                return int(answer["at"])
            if time.monotonic() >= until:
                return None
            silent = 0 if find_activity(run) is not None else silent + 1
            time.sleep(1.0 if silent else 0.1)
        # The run has ended. It may have recorded the amendment before.
        known = [a.model_dump(mode="json") for a in config.run.amendments]
        for entry in recorded(run):
            if entry not in known and set(flat(values)) <= set(entry["set"]):
                return int(entry["at"])
    with Startup(config, "amending"):  # no run can start meanwhile
        config = opened(run)
        start = resume_point(config)
        step = int(read_manifest(start)["step"]) if start else 0
        record(run, amended(config, step, at, values))
    return step if at == "now" else at
