"""The weights of a local folder in Hugging Face format, read tensor by tensor or in parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from myllm_ray.common.materialize import Source
from myllm_ray.common.tensor_files import Box, slices_of, whole
from myllm_ray.config.errors import ConfigError
from myllm_ray.models.conversion import model_tensors
from myllm_ray.models.initialization import Initialization
from myllm_ray.models.parts import Stored

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


def folder_source(folder: Path, model: PreTrainedModel, random: Initialization, resized: bool = False) -> Source | None:
    """Returns a source that reads safetensors files in parts, or None if a tensor is missing that can't be initialized.

    Args:
        folder: A folder in Hugging Face format, with one file or with several files and an index.
        model: The model on the meta device. Its score head, if it has one, may be missing in the files.
        random: The initialization of the model, for tensors that the files do not contain: computed buffers and a
            score head.
        resized: Whether the embeddings of the model may have more rows than those of the files.

    Raises:
        ConfigError: A file is missing or damaged, or a tensor has another shape than the model's.
    """
    files = weight_files(folder)
    tensors = model_tensors(_stored(folder, files), model)
    required = {name for name, _ in model.named_parameters() if not name.startswith("score.")} | random.dependent
    if not required <= tensors.keys():
        return None
    for name, parameter in model.named_parameters():
        shape, expected = tensors[name].shape if name in tensors else parameter.shape, tuple(parameter.shape)
        if shape != expected and not (resized and shape[1:] == expected[1:]):
            raise ConfigError(
                f"model.name: the files in {folder} hold {name} of shape {list(shape)}, "
                f"and its config.json describes {list(expected)}"
            )

    def source(name: str, box: Box | None = None) -> Tensor:
        if name not in tensors:
            return random.source(name, box)
        return tensors[name].read(box or whole(tensors[name].shape))

    return source


def _stored(folder: Path, files: Mapping[str, str]) -> dict[str, Stored]:
    """Returns the tensors of files, which stay open.

    Args:
        folder: The folder of the files.
        files: The file of each tensor.
    """
    opened = {file: _open(folder / file) for file in sorted({*files.values()})}
    return {name: _stored_tensor(opened[file], name) for name, file in files.items()}


def _open(path: Path) -> Any:
    return safe_open(path, "pt")


def _stored_tensor(opened: Any, name: str) -> Stored:
    shape = tuple(opened.get_slice(name).get_shape())

    def read(box: Box) -> Tensor:
        # The whole tensor is a view of the file, which saves a copy.
        value: Tensor = opened.get_tensor(name) if box == whole(shape) else opened.get_slice(name)[slices_of(box)]
        return value.float() if value.is_floating_point() else value

    return Stored(shape, read)


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
