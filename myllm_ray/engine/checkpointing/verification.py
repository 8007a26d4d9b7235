"""Checks whether a checkpoint is complete and undamaged.

The structure of a checkpoint is checked without reading its files: the manifest has a checksum of itself and lists
every file with its size. The contents are verified by the SHA-256 checksums of the files, which takes time in
proportion to the size of the checkpoint: several files at a time, and each rank of a run verifies its share of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from myllm_ray.common import distributed
from myllm_ray.common.tensor_files import index_of
from myllm_ray.common.types import Position
from myllm_ray.config.errors import CheckpointError

FORMAT_VERSION = 3
READABLE = (2, FORMAT_VERSION)
"""Formats that can be read. The index of format 2 is in the headers of the files instead of the manifest."""
MANIFEST, SET_ASIDE = "manifest.json", "manifest.damaged.json"
_THREADS = 8


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint. The files of the checkpoint are not verified.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json") from None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no valid manifest.json")
    if manifest["format"] not in READABLE:
        known = " and ".join(str(version) for version in READABLE)
        raise CheckpointError(f"{folder}: checkpoint format {manifest['format']!r:.40}, this version reads {known}")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise CheckpointError(f"{folder}: manifest.json is damaged (its checksum differs)")
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 checksum of a manifest's content without the entry `checksum`."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "checksum"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Returns the SHA-256 checksum of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(error: BaseException) -> str:
    """Returns an error's message in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """Returns why a directory is not a complete checkpoint, or None if it is one.

    In a complete checkpoint the manifest is valid and every file has the recorded size and SHA-256 checksum.

    Args:
        folder: the directory.
        contents: whether to verify the checksums; else only the manifest and the sizes of the files.
    """
    return next(iter(all_damage(folder, contents)), None)


def all_damage(folder: Path, contents: bool = True) -> list[str]:
    """Returns why a directory is not a complete checkpoint: every damaged file. See `find_damage`."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    structure = _structure(folder, manifest)
    if structure is not None:
        return [structure]
    return list(damaged_files(folder, manifest, manifest["files"]).values()) if contents else []


def _structure(folder: Path, manifest: dict[str, Any]) -> str | None:
    """Returns what is wrong with the manifest, or with names and sizes of the files, or None."""
    try:
        for name, expected in manifest["files"].items():
            path = folder / name
            if Path(name).name != name:  # an untrusted manifest must not cause reads outside its folder
                return f"{folder}: manifest.json names a file outside the checkpoint ({name[:80]!r})"
            if not path.is_file() or path.is_symlink():  # a link could also lead outside the folder
                return f"{folder}: file {name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{folder}: file {name} is damaged (its size differs)"
            if not isinstance(expected["sha256"], str):
                return f"{folder} is not a checkpoint: its manifest.json is malformed"
        for path in sorted(folder.glob("*.safetensors")):  # other programs read all of them
            if path.name not in manifest["files"]:
                return f"{folder}: file {path.name} is not listed in manifest.json"
        dict(manifest["tensors"])
        Position(**manifest.get("position", {}))
        int(manifest["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder} is not a checkpoint: its manifest.json is malformed"
    try:
        index_of(folder, manifest)
    except (ValueError, OSError, SafetensorError) as error:
        return f"{folder}: {reason(error)}"
    return None


def damaged_files(folder: Path, manifest: dict[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Returns the files of a checkpoint that are damaged, and why. Several are read at a time.

    Args:
        folder: the checkpoint, whose structure is valid.
        manifest: its manifest.
        names: the files to verify.
    """

    def damage(name: str) -> str | None:
        try:
            if sha256(folder / name) != manifest["files"][name]["sha256"]:
                return f"{folder}: file {name} is damaged (its checksum differs)"
            with safe_open(folder / name, "pt"):
                return None
        except SafetensorError as error:
            return f"{folder}: file {name} is not a valid safetensors file: {reason(error)}"
        except OSError as error:
            return f"{folder}: file {name} can't be read: {reason(error)}"

    names = list(names)
    # Reading and hashing release the interpreter's lock.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        return {name: why for name, why in zip(names, pool.map(damage, names), strict=True) if why is not None}


def verify(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Verifies a checkpoint: every rank its share of the files. Every rank calls this.

    Returns:
        The manifest and None; or an empty dict and why the checkpoint is damaged. The same on every rank.

    Raises:
        CheckpointError: a rank can't read a file that rank 0 can.
    """
    # Rank 0 reads the manifest for all: another rank may not see it on a shared file system yet.
    structure, manifest = None, {}
    if distributed.is_main() and (structure := find_damage(folder, contents=False)) is None:
        manifest = read_manifest(folder)
    manifest, structure = distributed.from_main((manifest, structure))
    if structure is not None:
        return {}, structure
    names = sorted(manifest["files"])
    mine = names[distributed.rank() :: distributed.world_size()]
    first = next(iter(damaged_files(folder, manifest, mine).items()), None)
    found = next((one for one in distributed.gather_objects(first) if one is not None), None)
    if found is None:
        return manifest, None
    name, damage = found
    # A damaged checkpoint is set aside. A rank whose file system lags must not cause that.
    confirmed = distributed.from_main(not distributed.is_main() or name in damaged_files(folder, manifest, [name]))
    if not confirmed:
        raise CheckpointError(f"{damage}; rank 0 reads it without an error: check the file system of the other ranks")
    return {}, damage


def set_aside(folder: Path) -> None:
    """Marks a checkpoint as damaged: it is no checkpoint any more, and its files stay for inspection.

    Raises:
        CheckpointError: the folder is not writable.
    """
    try:
        (folder / MANIFEST).rename(folder / SET_ASIDE)
    except OSError as error:
        raise CheckpointError(f"{folder} is damaged, and can't be set aside: {reason(error)}") from None
