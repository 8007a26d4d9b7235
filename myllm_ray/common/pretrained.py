"""Where a model or a tokenizer by name is: a local folder, a run of this package, or the Hugging Face hub, which is asked once a process."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

from myllm_ray.config.errors import ConfigError

_SECONDS = 10.0
"""For an answer of the hub; HF_HUB_ETAG_TIMEOUT says otherwise."""
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
"""Files of a model's folder but for its weights and its code."""


def checkpoint_in(name: str | None) -> Path | None:
    """The checkpoint that a name means: one itself, or the newest of a run's folder; None for everything else.

    Looks at names alone: whether the checkpoint is whole is for the caller to check.
    """
    path = Path(name or "").expanduser()
    if not name or not path.is_dir():
        return None
    if (path / "manifest.json").is_file():
        return path
    found = sorted(p.parent for p in (path / "checkpoints").glob("step-*/manifest.json"))
    return found[-1] if found else None


def architecture_folder(checkpoint: Path) -> Path:
    """The folder beside a run's checkpoints that holds the config of its model, as transformers writes it."""
    return checkpoint.parent.parent / "model"


def tokenizer_folder(checkpoint: Path) -> Path:
    """The folder beside a run's checkpoints that holds its tokenizer."""
    return checkpoint.parent.parent / "tokenizer"


def pretrained_folder(name: str, key: str, weights: bool = False, code: bool = False) -> Path:
    """The local folder of a model or tokenizer in Hugging Face format; fetched from the hub where it is not one.

    Args:
        key: of the config, for the message.
        weights: also the safetensors files.
        code: also Python files.

    Raises:
        ConfigError: there is no such folder, and the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ConfigError(f"{key}: no folder {name!r} (seen from {Path.cwd()})")
    return _from_hub(name, key, weights, code)


@cache
def _from_hub(name: str, key: str, weights: bool, code: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    patterns = [*_SMALL, *(["*.safetensors"] if weights else []), *(["*.py"] if code else [])]
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", _SECONDS))
    try:
        # Asked by itself, because the question that snapshot_download begins with has no time-out.
        revision = HfApi().model_info(name, timeout=seconds).sha
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, etag_timeout=seconds))
    except Exception as error:  # of requests, of the file system, or of the hub's own classes, which share no base
        if not isinstance(error, RepositoryNotFoundError):
            with suppress(Exception):  # what was fetched before serves without a connection
                return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        reason = " ".join(str(error).partition("For more information")[0].split())[:200] or type(error).__name__
        if isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such repository, or it is private (set HF_TOKEN)"
        raise ConfigError(f"{key}: no folder {name!r} here ({Path.cwd()}), and as a hub id it can't be loaded: {reason}") from None
