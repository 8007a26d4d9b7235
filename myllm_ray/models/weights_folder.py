"""The weights of a local folder in Hugging Face format, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from myllm_ray.common.materialize import Source
from myllm_ray.config.errors import ConfigError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def weight_files(folder: Path) -> dict[str, str]:
    """Returns the file of each tensor, by the name of the tensor. Empty if the folder has no safetensors files.

    The header of every file is read, which detects a missing or truncated file.

    Args:
        folder: A folder with one safetensors file, or with several and their index.

    Raises:
        ConfigError: The index or a file is missing or damaged.
    """
    if (folder / _INDEX).is_file():
        try:
            files = {str(k): str(v) for k, v in json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, RecursionError):
            raise _damaged(folder / _INDEX, "it is not a valid index") from None
        for file in sorted({*files.values()}):
            absent = {name for name, of in files.items() if of == file} - _names(folder / file)
            if absent:
                raise _damaged(folder / file, f"it lacks the tensor {min(absent)}, which {_INDEX} lists")
        return files
    return dict.fromkeys(_names(folder / _SINGLE), _SINGLE) if (folder / _SINGLE).is_file() else {}


def folder_source(folder: Path, names: set[str], otherwise: Source) -> Source | None:
    """Returns a source that reads safetensors files tensor by tensor, or None if a tensor of `names` is missing.

    Args:
        folder: A folder in Hugging Face format, with one file or with several files and an index.
        names: The names of the required parameters in the model.
        otherwise: The source of tensors that the files do not contain (computed buffers).

    Raises:
        ConfigError: A file is missing or damaged.
    """
    files = weight_files(folder)
    if not names <= files.keys():
        return None

    def source(name: str) -> Tensor:
        if name not in files:
            return otherwise(name)
        with safe_open(folder / files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor.float() if tensor.is_floating_point() else tensor

    return source


def _names(path: Path) -> set[str]:
    try:
        with safe_open(path, "pt") as opened:
            return {*opened.keys()}
    except FileNotFoundError:
        raise ConfigError(f"model.name: {path} is missing: download the model again") from None
    except (OSError, SafetensorError) as error:
        raise _damaged(path, " ".join(str(error).split())[:120]) from None


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"model.name: {path} is damaged ({reason}): download the model again")
