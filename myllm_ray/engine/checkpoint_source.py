"""The weights of a checkpoint, tensor by tensor: for models that are filled without any rank holding the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from myllm_ray.common.materialize import Source
from myllm_ray.config.errors import CheckpointError
from myllm_ray.engine.checkpoint import read_manifest
from myllm_ray.engine.checkpoint_writer import reason


def checkpoint_source(folder: Path, otherwise: Source) -> Source:
    """A source that reads `model.<name>` of a checkpoint, whole, from the shards that the ranks wrote.

    Headers are read once, here; the file of a tensor is opened when it is asked for.

    Args:
        folder: of a whole checkpoint.
        otherwise: for what the checkpoint does not hold (buffers that are computed).

    Raises:
        CheckpointError: a file can't be read.
    """
    manifest = read_manifest(folder)
    shapes = {name.removeprefix("model."): shape for name, shape in manifest["tensors"].items() if name.startswith("model.")}
    places: dict[str, list[tuple[Path, list[int]]]] = {}
    try:
        for path in (folder / file for file in sorted(manifest["files"]) if file.endswith(".safetensors")):
            with safe_open(path, "pt") as opened:
                offsets: dict[str, Any] = json.loads((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for key in opened.keys():  # noqa: SIM118 (not a dict)
                    places.setdefault(key, []).append((path, (offsets.get(key) or {}).get("saved_offsets", [])))
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be read: {reason(error)}") from None

    def source(name: str) -> Tensor:
        if name not in shapes:
            return otherwise(name)
        whole = torch.empty(shapes[name])
        for path, start in places[f"model.{name}"]:
            with safe_open(path, "pt") as opened:
                part = opened.get_tensor(f"model.{name}")
            whole[tuple(slice(o, o + n) for o, n in zip(start or [0] * part.dim(), part.shape, strict=True))] = part
        return whole

    return source
