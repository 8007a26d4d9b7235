"""Resolves the name of a model or tokenizer: a local folder, a run of this package, or a Hugging Face hub id.

A hub id may end with `@revision`: a branch, a tag or a commit. The hub is queried once per process for each name.
"""

from __future__ import annotations

import difflib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from myllm_ray.common.extras import require
from myllm_ray.config.errors import ConfigError

_SECONDS = 10.0
"""Timeout for requests to the hub, in seconds; HF_HUB_ETAG_TIMEOUT overrides it."""
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""Patterns for the files of a model's folder other than weights and code."""


def checkpoint_in(name: str | None) -> Path | None:
    """Returns the checkpoint that a name refers to, or None if it refers to something else.

    The name is the path of a checkpoint, or the folder of a run, which means its newest checkpoint. The function checks
    only that a manifest exists; the caller checks that the checkpoint is complete.
    """
    path = Path(name or "").expanduser()
    if not name or not path.is_dir():
        return None
    if (path / "manifest.json").is_file():
        return path
    found = sorted(p.parent for p in (path / "checkpoints").glob("step-*/manifest.json"))
    return found[-1] if found else None


def architecture_folder(checkpoint: Path) -> Path:
    """Returns the folder of a run that contains its model's config in the format of transformers."""
    return checkpoint.parent.parent / "model"


def tokenizer_folder(checkpoint: Path) -> Path:
    """Returns the folder of a checkpoint's tokenizer: in the checkpoint in Ray's storage, else in its run's folder."""
    beside = checkpoint / "tokenizer"
    return beside if beside.is_dir() else checkpoint.parent.parent / "tokenizer"


def gguf_arguments(name: str) -> dict[str, str]:
    """Returns the arguments that the `from_pretrained` functions of transformers need for a name, in addition to its
    folder: `gguf_file` for the name of a GGUF file, else none.

    Raises:
        UserError: the package `gguf` is not installed.
    """
    if not name.endswith(".gguf"):
        return {}
    require("gguf", "gguf", f"{name}:")
    return {"gguf_file": name.rpartition("/")[2]}


def pretrained_folder(name: str, key: str, weights: bool = False, code: bool = False) -> Path:
    """Returns the local folder of a model or tokenizer in Hugging Face format, after downloading it if needed.

    Args:
        name: A local folder or GGUF file, or a hub id: `org/model`, `org/model@revision`, or `org/model/file.gguf` for
            a GGUF file.
        key: The config key, for error messages.
        weights: Whether to download the safetensors files too.
        code: Whether to download the Python files too.

    Raises:
        ConfigError: The folder does not exist, or the download failed.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    gguf = name.endswith(".gguf")
    if gguf and path.is_file():
        return path.parent
    if name.startswith((".", "/", "~")) or (name.partition("@")[0].count("/") > 1 and not gguf):
        raise ConfigError(f"{key}: no {'file' if gguf else 'folder'} {name!r} (working directory: {Path.cwd()})")
    runs = _runs_in(path.parent)
    if runs:
        near = difflib.get_close_matches(path.name, runs, n=1)
        meant = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{key}: the folder {path.parent} has no run {path.name!r}{meant}")
    return _from_hub(name, key, weights, code)


def _runs_in(folder: Path) -> list[str]:
    """Returns the names of the runs in a folder, without those in the working directory, where hub ids may begin."""
    if folder == Path() or not folder.is_dir():
        return []
    return sorted(path.parent.name for path in folder.glob("*/config.yaml"))


@cache
def _from_hub(name: str, key: str, weights: bool, code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    whole, file = name, ""
    if name.endswith(".gguf"):
        whole, _, file = name.rpartition("/")
    repository, _, revision = whole.partition("@")
    patterns = [file] if file else [*_SMALL, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", _SECONDS))
    try:
        # A separate request, because snapshot_download makes the same request first without a timeout.
        commit = HfApi().model_info(repository, revision=revision or None, timeout=seconds).sha
        return Path(snapshot_download(repository, revision=commit, allow_patterns=patterns, etag_timeout=seconds))
    except Exception as error:  # errors of requests, of the file system and of the hub share no base class
        reason = " ".join(str(error).partition("For more information")[0].split())[:200] or type(error).__name__
        if isinstance(error, RevisionNotFoundError):
            reason = f"the repository {repository} has no revision {revision!r}"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such repository, or it is private (set HF_TOKEN)"
        else:
            with suppress(Exception):  # without a connection, use an earlier download
                return Path(
                    snapshot_download(
                        repository, revision=revision or None, allow_patterns=patterns, local_files_only=True
                    )
                )
        raise ConfigError(
            f"{key}: no folder {name!r} in {Path.cwd()}, and it can't be loaded as a hub id: {reason}"
        ) from None
