"""Where steps of a recorded run can be made again: an interpreter, an import path, variables, and source files.

The version of a package or of the code that a run used is taken from where the run recorded it, or from its git commit.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from myllm_ray.common.secrets import MASK
from myllm_ray.engine.environment import describe, source_hash
from myllm_ray.runs.folder import RunFolder


@dataclass(frozen=True)
class Place:
    """An environment in which steps are made again.

    `path` are the folders before the interpreter's own ones (PYTHONPATH). `variables` are environment variables.
    """

    executable: str
    path: tuple[str, ...]
    variables: tuple[tuple[str, str], ...]
    folder: str

    def environment(self) -> dict[str, str]:
        """Returns the environment variables of a process at this place."""
        recorded = dict(self.variables)
        own = describe({}, git=False)["variables"]
        kept = {name: value for name, value in os.environ.items() if name not in own or name in recorded}
        return {**kept, **recorded, "PYTHONPATH": os.pathsep.join(self.path)}


class Places:
    """Finds the places of two runs and of the changes between them.

    Args:
        scratch: a folder for source files of earlier git commits.
    """

    def __init__(self, scratch: Path):
        self._scratch = scratch
        self._versions: dict[tuple[str, str, tuple[str, ...]], str | None] = {}
        self._sources: dict[tuple[str, str | None], tuple[str | None, str]] = {}

    def of(self, run: RunFolder) -> tuple[Place, list[str]]:
        """Returns the place of a run, and what of its environment is not available here any more."""
        recorded = run.environment.get("interpreter") or {}
        problems: list[str] = []
        executable = str(recorded.get("executable") or sys.executable)
        if not os.access(executable, os.X_OK):
            problems.append(f"its interpreter {executable} does not exist here")
            executable = sys.executable
        path = [str(p) for p in recorded.get("path", _own_path()) if Path(p).is_dir()]
        folder = str(recorded.get("folder") or os.getcwd())
        for name in run.environment.get("code") or {}:
            root, problem = self.source(run, name)
            if problem:
                problems.append(problem)
            # The interpreter's own folders come last by themselves; before others they would hide them.
            if root is not None and root != folder and Path(root).name not in ("site-packages", "dist-packages"):
                path = [root, *(p for p in path if p != root)]
        variables = run.environment.get("variables") or {}
        place = Place(
            executable,
            tuple(path),
            tuple(sorted((n, v) for n, v in variables.items() if MASK not in str(v))),
            folder if Path(folder).is_dir() else os.getcwd(),
        )
        for name, version in (run.environment.get("packages") or {}).items():
            if name != "myllm_ray" and (found := self._version(place, name)) != version:
                problems.append(f"{name} {version} is not installed here ({found or 'not installed'})")
        return place, problems

    def with_package(self, place: Place, name: str, run: RunFolder) -> tuple[Place | None, str]:
        """Returns a place with a package as another run had it, or None and the reason."""
        version = (run.environment.get("packages") or run.environment).get(name)
        if version is None:
            return None, f"{run.name} does not have {name}"
        location = (run.environment.get("locations") or {}).get(name)
        if location is not None:
            found = replace(place, path=(location, *(p for p in place.path if p != location)))
        else:  # installed in the interpreter's own folders: all packages of the interpreter change together
            executable = str((run.environment.get("interpreter") or {}).get("executable") or "")
            if not executable or executable == place.executable or not os.access(executable, os.X_OK):
                return None, f"{name} {version} is not installed here"
            found = replace(place, executable=executable)
        if self._version(found, name) != version:
            return None, f"{name} {version} is not installed here"
        return found, ""

    def with_code(self, place: Place, name: str, run: RunFolder) -> tuple[Place | None, str]:
        """Returns a place with the source files of this package or of a component as another run had them, or None."""
        root, problem = self.source(run, name)
        if root is None:
            return None, problem
        return replace(place, path=(root, *(p for p in place.path if p != root))), ""

    def source(self, run: RunFolder, name: str) -> tuple[str | None, str]:
        """Returns the folder from which the recorded source files of a module can be imported, or None and the reason.

        They are at their recorded path if they have not changed, else in their git commit.
        """
        entry = (run.environment.get("code") or {}).get(name) or {}
        key = (name, entry.get("hash"))
        if key not in self._sources:
            self._sources[key] = self._find_source(name, entry)
        return self._sources[key]

    def _find_source(self, name: str, entry: Mapping[str, Any]) -> tuple[str | None, str]:
        path, wanted = Path(str(entry.get("path", ""))), entry.get("hash")
        if wanted is None:
            return None, f"the code of {name} was not recorded"
        if path.exists() and source_hash(path) == wanted:
            return str(path.parent), ""
        git = entry.get("git") or {}
        missing = f"the code of {name} ({wanted}) can't be made again"
        if not git:
            return None, f"{missing}: its files have changed since, and are not in git"
        if git.get("modified"):
            return None, f"{missing}: its files were modified and not committed"
        try:
            inside = path.relative_to(str(git["root"]))
            target = self._scratch / f"{name}-{git['commit'][:12]}"
            archive = subprocess.run(
                ["git", "archive", "--format=tar", str(git["commit"]), "--", inside.as_posix()],
                cwd=str(git["root"]),
                capture_output=True,
                check=True,
            )
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(target, filter="data")
        except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError):
            return None, f"{missing}: commit {str(git.get('commit'))[:12]} is not in {git.get('root')}"
        if source_hash(target / inside) != wanted:
            return None, f"{missing}: commit {str(git.get('commit'))[:12]} has other files"
        return str((target / inside).parent), ""

    def _version(self, place: Place, name: str) -> str | None:
        """Returns the version of a package at a place. Other interpreters are asked in a subprocess."""
        key = (name, place.executable, place.path)
        if key not in self._versions:
            self._versions[key] = _version_at(place, name)
        return self._versions[key]


def is_here(run: RunFolder, place: Place) -> bool:
    """Returns whether a place is equal to this process, so that steps can be made in this process.

    The code must be what this process imports, or would import, without a change of its import path.
    """
    here = describe({}, git=False)
    recorded = dict(run.environment.get("variables") or {})
    if not run.environment.get("code") or place.executable != sys.executable or recorded != here["variables"]:
        return False
    for name, entry in run.environment["code"].items():
        top = name.partition(".")[0]
        loaded = sys.modules.get(top)
        spec = getattr(loaded, "__spec__", None) or importlib.machinery.PathFinder.find_spec(top, sys.path)
        origin = getattr(spec, "origin", None)
        if origin is None:
            return False
        path = Path(origin)
        if source_hash(path.parent if path.name == "__init__.py" else path) != entry.get("hash"):
            return False
    for name, version in (run.environment.get("packages") or {}).items():
        try:
            if importlib.metadata.version(name) != version:
                return False
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def _version_at(place: Place, name: str) -> str | None:
    for folder in place.path:
        for found in importlib.metadata.distributions(path=[folder]):
            if _plain(str(found.metadata["Name"])) == _plain(name):
                return str(found.version)
    if place.executable == sys.executable:
        own = [p for p in sys.path if p not in _own_path()]
        found_here = next(iter(importlib.metadata.distributions(name=name, path=own)), None)
        return str(found_here.version) if found_here else None
    code = "from importlib.metadata import version\nimport sys\nprint(version(sys.argv[1]))"
    try:
        done = subprocess.run(
            [place.executable, "-c", code, name], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None  # without the package, the process fails and prints no version


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _own_path() -> list[str]:
    return [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
