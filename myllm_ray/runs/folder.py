"""A typed view of a run's folder. Reads as little as each question needs; the folder is never changed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.types import is_measured
from myllm_ray.config.errors import CheckpointError, ConfigError

_TAIL_BYTES = 16_384
_MOST_TAIL_BYTES = 1 << 20
_RECORDS = ("environment.json", "metrics.jsonl", "ledger.jsonl", "checkpoints")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of a run: its folder, its step, and its size in bytes."""

    path: Path
    step: int
    bytes: int


class RunFolder:
    """The folder of one run.

    Args:
        path: the folder.

    Raises:
        ConfigError: the folder does not exist or is not the folder of a run.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        problem = why_no_run(self.path)
        if problem:
            raise ConfigError(problem)

    @property
    def name(self) -> str:
        """The name of the folder, which is the name of the run."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.yaml`: the resolved config as plain data, with masked secrets.

        Raises:
            ConfigError: the file can't be read, or is not a mapping.
        """
        path = self.path / "config.yaml"
        try:
            raw = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: can't be read: {_first_line(error)}") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: not a config of a run: it contains {type(raw).__name__}, not a mapping")
        return raw

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The content of `environment.json`; empty if the file does not exist.

        Raises:
            ConfigError: the file can't be read.
        """
        path = self.path / "environment.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: can't be read: {_first_line(error)}") from None
        return found if isinstance(found, dict) else {}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a dotted key of the config."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def total_steps(self) -> int | None:
        """The number of optimizer steps of the whole run; None if a run of an older version does not record it."""
        found = self.get("run.max_steps") or (self.environment.get("plan") or {}).get("steps")
        for amendment in self.get("run.amendments", []):
            if amendment["at"] <= self.last_step:
                found = amendment["set"].get("run.max_steps", found)
        return int(found) if found else None

    @cached_property
    def attempts(self) -> list[dict[str, Any]]:
        """The objects of `attempts.jsonl`: how each worker group ended. Of a long file, only the last ones."""
        return tail_rows(self.path / "attempts.jsonl", 65_536)

    @cached_property
    def last_step(self) -> int:
        """The last step in the ledger or in the metrics; 0 if no step is recorded."""
        for name in ("ledger.jsonl", "metrics.jsonl"):
            rows = tail_rows(self.path / name, 2048)
            if rows:
                return int(rows[-1].get("step", 0))
        return 0

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yields the objects of `metrics.jsonl` or another file of records.

        Raises:
            ConfigError: the file can't be read.
        """
        path = self.path / name
        try:
            yield from read_jsonl(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: can't be read: {_first_line(error)}") from None

    @cached_property
    def ledger(self) -> dict[int, str]:
        """The hash of the batch of each step, from `ledger.jsonl`."""
        return {int(r["step"]): str(r["tokens_hash"]) for r in self.rows("ledger.jsonl") if "tokens_hash" in r}

    @cached_property
    def metrics(self) -> dict[int, dict[str, float]]:
        """The metrics of each logged step without those that depend on a clock, from `metrics.jsonl`."""
        found: dict[int, dict[str, float]] = {}
        for row in self.rows("metrics.jsonl"):
            numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not is_measured(k)}
            step = int(numbers.pop("step", 0))
            found[step] = {**found.get(step, {}), **numbers}
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Returns the checkpoints that have a manifest, oldest first. Their files are not read."""
        from myllm_ray.engine.checkpointing.manager import CheckpointManager, step_of

        found = CheckpointManager(folder=self.path / "checkpoints").all()
        return [Checkpoint(p, step_of(p), size_of(p)) for p in found]

    def best_checkpoint(self) -> Path | None:
        """Returns the checkpoint that `checkpoint.keep_best` keeps, or None."""
        from myllm_ray.engine.checkpointing.manager import CheckpointManager

        keep = self.get("checkpoint.keep_best")
        return CheckpointManager(folder=self.path / "checkpoints", keep_best=keep).best() if keep else None

    def remote_url(self) -> str | None:
        """Returns the URL at which `checkpoint.mirror` has the copies of the checkpoints of this run, or None."""
        mirror = self.get("checkpoint.mirror")
        return f"{str(mirror).rstrip('/')}/{self.get('run.name', self.name)}" if mirror else None

    def remote_names(self) -> list[str]:
        """Returns the names of the checkpoints in the remote store.

        Raises:
            CheckpointError: the store can't be read.
        """
        from myllm_ray.engine.checkpointing.remote_store import RemoteCheckpointStore

        url = self.remote_url()
        if url is None:
            return []
        try:
            return RemoteCheckpointStore(url).names()
        except ConfigError as error:  # the library of this kind of storage is not installed
            raise CheckpointError(str(error)) from None


def why_no_run(path: Path) -> str | None:
    """Returns why a path is not the folder of a run, or None if it is one."""
    try:
        if not path.exists():
            return f"{path}: no such folder; give the folder of a run, such as runs/my-run"
        if not path.is_dir():
            return f"{path} is a file, not the folder of a run"
        if (path / "sweep.yaml").is_file():
            return f"{path} is the folder of a sweep: its runs are in {path / 'trials'}"
        if (path / "manifest.json").is_file():
            return f"{path} is a checkpoint, not the folder of a run: give {path.parent.parent}"
        if not (path / "config.yaml").is_file() or not any((path / name).exists() for name in _RECORDS):
            return f"{path} is not the folder of a run: it has no config.yaml with the records of a run"
    except OSError as error:
        return f"{path}: can't be read: {error.strerror or error}"
    return None


def tail_rows(path: Path, size: int = _TAIL_BYTES) -> list[dict[str, Any]]:
    """Returns the objects in the last `size` bytes of a JSON Lines file; [] if it can't be read.

    Lines that are not valid JSON are skipped. The part is larger if a single line is longer than it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            while True:
                start = max(0, end - size)
                file.seek(start)
                lines = (file.read(size) or b"").split(b"\n")
                rows = _objects(lines[1:] if start else lines)
                if rows or start == 0 or size >= _MOST_TAIL_BYTES:
                    return rows
                size *= 8
    except OSError:
        return []


def _objects(lines: list[bytes]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:  # the first line of the part may be cut, and so may the last line of a killed process
            continue
        if isinstance(value, dict):
            rows.append(value)
    return rows


def size_of(folder: Path) -> int:
    """Returns the size of all files of a folder in bytes. Links are not followed; hard links count once."""
    seen: set[tuple[int, int]] = set()
    total, waiting = 0, [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                        continue
                    found = entry.stat(follow_symlinks=False)
                    if found.st_nlink == 1 or (found.st_dev, found.st_ino) not in seen:
                        seen.add((found.st_dev, found.st_ino))
                        total += found.st_size
        except OSError:  # removed in the meantime, or not readable
            continue
    return total


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
