"""The environment of a run: code, packages, hardware, threads and variables, as written to `environment.json`.

`myllm-ray runs diff` and `myllm-ray explain` compare these records. A worker may run on another machine than the
process that starts the run, so rank 0 records where its environment differs; the record of the attempt contains this.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import site
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from myllm_ray.common.files import JSONLines, read_jsonl, write_atomic
from myllm_ray.common.secrets import mask
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import SHORT_NAMES, import_path
from myllm_ray.engine.liveness.heartbeat import heartbeat_folder

PACKAGE = "myllm_ray"
_PACKAGES = (
    PACKAGE,
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "ray",
    "deepspeed",
    "accelerate",
    "safetensors",
    "peft",
)
_VARIABLES = re.compile(
    r"^(?!.*(_DIR|_HOME|_CACHE|_OFFLINE|_PARALLELISM)$)(MALLOC_|GLIBC_TUNABLES$|LD_PRELOAD$|OMP_|KMP_|MKL_|OPENBLAS_|GOMP_|CUDA_|CUBLAS_|NCCL_|GLOO_|TORCH|PYTORCH_|"
    r"ATEN_|DNNL_|ONEDNN_|XLA_|TRITON_|HF_|TRANSFORMERS_|TOKENIZERS_|ACCELERATE_|DS_|PYTHONHASHSEED$)"
)
_IMPORT_PATH = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_][\w.]*$")
_MOST_FILES = 2000
_GIT_SECONDS = 5.0
_PER_ATTEMPT = ("packages", "code", "hardware", "variables")
_ATTEMPT = "environment.json"


def describe(config: Mapping[str, Any], git: bool = True) -> dict[str, Any]:
    """Returns the environment of this process, as JSON without secrets.

    Args:
        config: the config of the run, as plain data. It names the custom components, whose modules must be imported.
        git: whether to also record the git commits of the code, which takes some calls of git.

    Returns:
        `interpreter` (executable, path, working directory), `packages` (versions), `locations` (the folders of packages
        outside of the interpreter's own), `code` (a hash of the source files of this package and of the custom
        components), `hardware` and `variables`.
    """
    components = custom_modules(config)
    packages, locations = _packages(tuple(components), os.environ.get("PYTHONPATH", ""))
    sources = {PACKAGE: Path(__file__).resolve().parents[1], **{n: _source_of(n) for n in components}}
    return {
        "interpreter": {
            "executable": sys.executable,
            "path": [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p],
            "folder": os.getcwd(),
        },
        "packages": dict(packages),
        "locations": dict(locations),
        "code": {name: _code(name, path, git) for name, path in sources.items() if path is not None},
        "hardware": hardware(),
        "variables": mask({name: value for name, value in sorted(os.environ.items()) if _VARIABLES.match(name)}),
    }


def hardware() -> dict[str, Any]:
    """Returns the CPU model, the number of CPUs and threads, and the names of the GPUs."""
    return {
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def record_attempt(folder: Path, config: Mapping[str, Any], step: int) -> None:
    """Records the start of an attempt: its step, and what differs here from the recorded environment of the run.

    Rank 0 calls it when its engine is ready. The file is next to the heartbeats, so it is removed with them;
    `attempt_start` returns its content before.
    """
    with suppress(OSError, ValueError):  # the record must not stop a run: its storage may be unreachable for a moment
        recorded = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        here = describe(config, git=False)
        changed = {key: _changed(recorded.get(key) or {}, here[key]) for key in _PER_ATTEMPT if key in recorded}
        changed = {key: value for key, value in changed.items() if value}
        target = heartbeat_folder(folder)
        target.mkdir(parents=True, exist_ok=True)
        entries = {"from_step": step, **({"environment": changed} if changed else {})}
        write_atomic(target / _ATTEMPT, json.dumps(entries), durable=False)


def attempt_start(folder: Path) -> dict[str, Any]:
    """Returns what `record_attempt` has written: `from_step`, and `environment` if it differs. {} without a record."""
    try:
        found = json.loads((heartbeat_folder(folder) / _ATTEMPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_attempt(
    folder: Path, end: str, workers: int, to_step: int | None = None, from_step: int | None = None
) -> dict[str, Any]:
    """Appends an attempt to `attempts.jsonl`.

    Args:
        folder: the run's folder.
        end: how the attempt ended: `done`, or `preempted`, `rewind`, `amended`, `aborted` or `failed` with the reason.
        workers: number of workers.
        to_step: its last step; default: that of the ledger.
        from_step: its first step; default: that of `record_attempt`.

    Returns:
        The fields of the event `attempt`.
    """
    start = attempt_start(folder)
    first = int(start.get("from_step", 0)) if from_step is None else from_step
    if to_step is None:
        to_step = max([first, *(row.get("step", 0) for row in read_jsonl(folder / "ledger.jsonl"))])
    row = {"workers": workers, "from_step": first, "to_step": to_step, "end": end}
    environment = {key: value for key, value in start.items() if key == "environment"}
    file = JSONLines(folder / "attempts.jsonl", keep=lambda row: True)
    file.write({**row, "time": time.time(), **environment})
    file.close()
    return row


def _changed(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that differ; None for an entry that is absent here. Git is recorded only on the driver."""

    def plain(value: Any) -> Any:
        return {k: v for k, v in value.items() if k == "hash"} if isinstance(value, dict) else value

    everything = dict.fromkeys([*recorded, *here])
    return {name: here.get(name) for name in everything if plain(recorded.get(name)) != plain(here.get(name))}


def custom_modules(config: Mapping[str, Any]) -> list[str]:
    """Returns the imported modules outside of this package that a config names by import path or by entry point."""
    paths = [path for path in _strings(config) if _IMPORT_PATH.match(path)]
    for kind, name in (
        ("trainers", config.get("trainer")),
        ("accelerators", (config.get("accelerator") or {}).get("name")),
    ):
        if isinstance(name, str) and ":" not in name and name not in SHORT_NAMES[kind]:
            with suppress(ConfigError):  # an unknown name is reported elsewhere
                paths.append(import_path(kind, name, kind))
    modules = sorted({path.partition(":")[0] for path in paths})
    return [m for m in modules if m.partition(".")[0] not in (PACKAGE, "torch", "transformers") and m in sys.modules]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _source_of(module: str) -> Path | None:
    """Returns the folder of the module's top-level package, or the file of a top-level module."""
    top = sys.modules.get(module.partition(".")[0])
    file = getattr(top, "__file__", None)
    paths = [Path(p) for p in getattr(top, "__path__", [])]
    if paths:
        return paths[0].resolve()
    return Path(file).resolve() if file else None


def source_hash(path: Path) -> str | None:
    """Returns a hash over the names and contents of the Python files of a folder, or of one file; None without files.

    The hash does not depend on where the folder is.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.py") if p.is_file())[:_MOST_FILES]
    if not files:
        return None
    total = hashlib.sha256()
    for file in files:
        with suppress(OSError):
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            total.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


@functools.cache  # what this process has imported does not change with the files
def _code(name: str, path: Path, git: bool) -> dict[str, Any]:
    return {"hash": source_hash(path), "path": str(path), **({"git": found} if git and (found := _git(path)) else {})}


def _git(path: Path) -> dict[str, Any] | None:
    """Returns the git checkout that contains a source: its root, its commit, and whether the source is modified."""
    root = _call_git(path.parent, "rev-parse", "--show-toplevel")
    commit = _call_git(path.parent, "rev-parse", "HEAD") if root else None
    if not root or not commit:
        return None
    # Untracked and ignored files count as modified: the commit does not contain them.
    tracked = _call_git(path.parent, "ls-files", "--", str(path))
    changes = _call_git(path.parent, "status", "--porcelain", "--", str(path))
    return {"root": root, "commit": commit, "modified": not tracked or changes != ""}


def _call_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def _packages(components: tuple[str, ...], python_path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Returns versions by name, and the folders of the packages outside of the interpreter's own folders."""
    own = {str(Path(p).resolve()) for p in [*site.getsitepackages(), site.getusersitepackages()]}
    names = {*_PACKAGES}
    # Packages in folders of PYTHONPATH belong to the user, as do those of the components.
    outside = [p for p in python_path.split(os.pathsep) if p]
    for module in components:
        source = _source_of(module)
        if source is not None:
            outside.append(str(source.parent))
    for folder in dict.fromkeys(str(Path(p).absolute()) for p in outside):
        if str(Path(folder).resolve()) not in own:
            names |= {str(d.metadata["Name"]) for d in importlib.metadata.distributions(path=[folder])}
        else:
            names |= _distributions_of(components, folder)
    versions: dict[str, str] = {}
    locations: dict[str, str] = {}
    for name in sorted(names):
        with suppress(importlib.metadata.PackageNotFoundError):
            found = importlib.metadata.distribution(name)
            versions[name] = found.version
            folder = str(Path(str(found.locate_file(""))).absolute())
            if str(Path(folder).resolve()) not in own and name != PACKAGE:
                locations[name] = folder
    return versions, locations


def _distributions_of(components: Iterable[str], folder: str) -> set[str]:
    """Returns the names of the installed distributions in a folder that provide the components' modules."""
    tops = {name.partition(".")[0] for name in components}
    return {
        str(found.metadata["Name"])
        for found in importlib.metadata.distributions(path=[folder])
        if tops & {str(file).partition("/")[0].removesuffix(".py") for file in found.files or ()}
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Returns the names of the GPUs. CUDA is not initialized: a process that has initialized it can't be forked."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with suppress(OSError):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [line.partition(":")[2].strip() for line in lines if line.startswith("Model")]
    return found
