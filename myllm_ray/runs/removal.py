"""Removal of runs and of their checkpoints: `myllm-ray runs rm`.

A folder is renamed before its files are removed, so a run or a checkpoint is either complete or gone.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from myllm_ray.common.pretrained import checkpoint_in
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.engine.liveness.heartbeat import find_activity
from myllm_ray.runs.folder import RunFolder, size_of, why_no_run


@dataclass
class Removal:
    """What will be removed of one run.

    `paths` are folders: the run's folder, or checkpoints in it. `remote_url` and `remote` are the remote checkpoint
    store and the names of its copies of these checkpoints. `remote_problem` is why the store can't be read.
    """

    run: Path
    paths: list[Path]
    bytes: int
    remote_url: str | None = None
    remote: tuple[str, ...] = ()
    remote_problem: str | None = None

    @property
    def whole(self) -> bool:
        """Whether the run's folder itself is removed."""
        return self.paths == [self.run]


def plan_removal(path: Path, checkpoints_only: bool = False, keep_last: int = 0) -> Removal:
    """Checks that a run may be removed, and returns what would be removed. Nothing is changed.

    Args:
        path: the folder of a run, or of a sweep (only as a whole).
        checkpoints_only: remove checkpoints and keep the records.
        keep_last: with `checkpoints_only`: keep this number of the newest checkpoints, and the best one if
            `checkpoint.keep_best` is set.

    Raises:
        ConfigError: the path is not the folder of a run, is a link, contains the working directory, or a run is active
            in it.
    """
    if path.is_symlink():
        raise ConfigError(f"{path} is a link to {path.resolve()}: give that folder, or remove the link yourself")
    is_sweep = (path / "sweep.yaml").is_file()
    problem = None if is_sweep and not checkpoints_only else why_no_run(path)
    if problem:
        raise ConfigError(problem)
    resolved = path.resolve()
    if Path.cwd().is_relative_to(resolved):
        raise ConfigError(f"{path} contains the working directory: change to another folder first")
    _refuse_active(path)
    if is_sweep:
        return Removal(path, [path], size_of(path))
    opened = RunFolder(path)
    paths, names = [path], None
    if checkpoints_only:
        everything = opened.checkpoints()
        kept = {c.path for c in everything[-keep_last:]} if keep_last else set()
        if keep_last and (best := opened.best_checkpoint()) is not None:
            kept.add(best)
        paths = [c.path for c in everything if c.path not in kept]
        names = {p.name for p in paths}
    removal = Removal(path, paths, sum(map(size_of, paths)), opened.remote_url())
    try:
        removal.remote = tuple(n for n in opened.remote_names() if names is None or n in names)
    except CheckpointError as error:
        removal.remote_problem = str(error)
    return removal


def refuse_bases(removals: Sequence[Removal]) -> None:
    """Checks that no other run in the same folders needs what will be removed.

    The checkpoints of a run with adapters on a checkpoint of another run hold the trained tensors only.

    Raises:
        ConfigError: names the run that needs a checkpoint.
    """
    gone = {path.resolve() for removal in removals for path in removal.paths}
    whole = {removal.run.resolve() for removal in removals if removal.whole}
    for folder in sorted({removal.run.resolve().parent for removal in removals}):
        for run in sorted(folder.iterdir()):
            checkpoint = checkpoint_in(str(run)) if run not in whole else None
            base = None
            with suppress(CheckpointError):  # a damaged checkpoint of another run
                base = read_manifest(checkpoint).get("base") if checkpoint else None
            if not base or base.get("source") != "checkpoint":
                continue
            needed = Path(base["name"]).resolve()
            if needed in gone or gone.intersection(needed.parents):
                raise ConfigError(
                    f"{run} needs {needed}: its checkpoints hold only the weights that it trained; remove it too, or "
                    f"first export it: myllm-ray export {run} OUT --to merged"
                )


def _refuse_active(path: Path) -> None:
    """Raises ConfigError if a run is active in a folder, or a trial in that of a sweep."""
    trials = path / "trials"
    for run in [path, *(sorted(trials.iterdir()) if trials.is_dir() else [])]:
        beat = find_activity(run)
        if beat is not None:
            raise ConfigError(
                f"{run}: a run is active there (pid {beat.get('pid')}); stop it first: myllm-ray stop {run}"
            )


def remove(removal: Removal, remote: bool = False) -> list[str]:
    """Removes what `plan_removal` has returned.

    Args:
        removal: the plan.
        remote: whether to remove the copies in the remote checkpoint store, too.

    Returns:
        The names of the removed copies in the store.

    Raises:
        ConfigError: a run has become active, or a folder can't be renamed or removed.
        CheckpointError: a copy in the remote store can't be removed. Nothing local has been removed then.
    """
    _refuse_active(removal.run)  # it may have started since the removal was planned
    removed = []
    if remote and removal.remote and removal.remote_url:
        from myllm_ray.engine.checkpointing.remote_store import RemoteCheckpointStore

        store = RemoteCheckpointStore(removal.remote_url)
        for name in removal.remote:
            store.remove(name)
            removed.append(name)
        if removal.run in removal.paths:
            store.remove_records()
    for path in removal.paths:
        # A name that no command takes for a run or a checkpoint, in the same file system.
        beside = path.with_name(f".removed-{path.name}-{uuid.uuid4().hex[:8]}")
        try:
            path.rename(beside)
        except OSError as error:
            raise ConfigError(f"{path} can't be removed: {error.strerror or error}") from None
        try:
            shutil.rmtree(beside)
        except OSError as error:
            raise ConfigError(
                f"{path} is removed, but files remain in {beside}: {error.strerror or error}; remove them yourself"
            ) from None
    return removed
