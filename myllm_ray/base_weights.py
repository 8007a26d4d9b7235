"""The identity of the frozen weights of a run, which its checkpoints do not hold.

A run that trains a part of its model (`model.lora`, `model.freeze`) saves the trained tensors only. Everything that
reads its checkpoints builds the other weights again from the run's config, and verifies that they are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from myllm_ray.common.files import write_json
from myllm_ray.common.materialize import held, source_of
from myllm_ray.common.pretrained import checkpoint_in, gguf_arguments, pretrained_folder, tokenizer_folder
from myllm_ray.common.progress import Task
from myllm_ray.common.tensor_files import Box, whole
from myllm_ray.config.errors import CheckpointError, ConfigError, UserError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.cache import DataCache
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import kind_of_model, model_section
from myllm_ray.engine.checkpointing.manager import find_damage, read_manifest
from myllm_ray.engine.checkpointing.starting_weights import differences, named_models
from myllm_ray.models import initialization
from myllm_ray.models.load import build_deferred
from myllm_ray.models.weights_folder import weight_files

_THREADS = 8
"""Number of files that are hashed at the same time. `hashlib` releases the interpreter's lock."""


def base_identity(config: TrainerConfig, tokenizer: Any) -> dict[str, Any] | None:
    """Returns what identifies the weights that a run freezes, or None if its checkpoints hold all weights.

    They do if everything is trained, if a factory builds the model, and with `initialization: pissa`, whose frozen
    weights are the result of a decomposition, which another machine rounds differently.

    Args:
        config: The config of the run, with absolute paths.
        tokenizer: The tokenizer of the run.

    Returns:
        JSON. `source` is `files` (with `name`, `revision` and `sha256`), `checkpoint` (`name`, `checksum`), or `random`
        (`seed`, `sha256`). `model` is the head of the wrapped model, `causal_lm` or `reward_model`.

    Raises:
        UserError: The base can't be found or read.
    """
    section = config.model
    lora = section.lora
    if section.factory or (lora is None and not section.freeze) or (lora and lora.initialization == "pissa"):
        return None
    kind = "reward_model" if kind_of_model(config) == "reward_model" else "causal_lm"
    if section.name is None:
        found = {"source": "random", "seed": config.run.seed, "sha256": _random_sha256(config, tokenizer)}
    elif (checkpoint := checkpoint_in(section.name)) is not None:
        checksum = read_manifest(checkpoint)["checksum"]
        found = {"source": "checkpoint", "name": str(checkpoint), "checksum": checksum}
    else:
        folder = pretrained_folder(section.name, "model.name", weights=True, code=section.trust_remote_code)
        gguf = gguf_arguments(section.name)
        files = [folder / gguf["gguf_file"]] if gguf else sorted({folder / f for f in weight_files(folder).values()})
        # A folder in the cache of the hub is named by its commit.
        revision = folder.name if folder.parent.name == "snapshots" else None
        cache = DataCache.of(config).folder / "weights"
        try:
            checksum = files_sha256(files, cache)
        except OSError as error:
            raise ConfigError(f"model.name: the weights of {folder} can't be read: {error}") from None
        found = {"source": "files", "name": section.name, "revision": revision, "sha256": checksum}
    # Quantized weights are other weights. The key is absent without quantization, as in earlier manifests.
    quantize = {} if section.quantize is None else {"quantize": section.quantize}
    return {**found, **quantize, "model": kind}


def check_bases(config: TrainerConfig) -> None:
    """Verifies the bases of the checkpoints that a config starts from or names.

    Raises:
        CheckpointError: A base is missing or has changed.
    """
    for section, field, key in named_models(config):
        checkpoint = checkpoint_in(getattr(section, field))
        if checkpoint is not None:
            check_base(checkpoint, f"{key}: ")


def check_base(checkpoint: Path, where: str = "") -> None:
    """Verifies that the weights that a checkpoint does not hold can be built again, and are the same.

    Args:
        checkpoint: The folder of a complete checkpoint.
        where: Start of the error message, such as `model.name: `.

    Raises:
        CheckpointError: The base is missing or has changed.
    """
    manifest = read_manifest(checkpoint)
    then = manifest.get("base")
    if then is None:
        return
    needs = f"{where}{checkpoint} holds only the trained weights"
    try:
        config = validate(manifest["config"], where=f"{checkpoint}/manifest.json", components=False)
        base = checkpoint_in(config.model.name)
        if then["source"] == "checkpoint" and base is None:
            raise CheckpointError(f"there is no checkpoint {config.model.name}")
        if base is not None and (damage := find_damage(base)):
            raise CheckpointError(damage)
        if base is not None:
            check_base(base)
        tokenizer = open_tokenizer(str(tokenizer_folder(checkpoint))) if then["source"] == "random" else None
        now = base_identity(config, tokenizer)
    except UserError as error:
        raise CheckpointError(f"{needs}, and their base can't be loaded: {error}") from None
    if change := "its config" if now is None else differences(then, now):
        raise CheckpointError(f"{needs}, and their base has changed ({change}): restore the base it was trained on")


def files_sha256(paths: Iterable[Path], cache: Path) -> str:
    """Returns a SHA-256 checksum of the names and contents of files.

    The checksum of each file is stored by path, size and modification time, so a large base is read once.

    Args:
        paths: The files.
        cache: The folder of stored checksums.
    """
    files = list(paths)
    with Task("verifying the base's weights", len(files)) as task, ThreadPoolExecutor(_THREADS) as pool:

        def one(path: Path) -> str:
            found = _file_sha256(path, cache)
            task.advance()
            return found

        sums = dict(zip((p.name for p in files), pool.map(one, files), strict=True))
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _file_sha256(path: Path, cache: Path) -> str:
    path = path.resolve()
    if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
        return path.name  # the hub's cache names a large file by its SHA-256 checksum
    status = path.stat()
    key = {"path": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}
    entry = cache / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    try:
        stored = json.loads(entry.read_text(encoding="utf-8"))
        found = stored.pop("sha256")
        if stored == key:
            return str(found)
    except (OSError, ValueError, AttributeError, KeyError):
        pass  # no entry, or a damaged one
    with open(path, "rb") as file:
        key["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    # Only into a folder of prepared data that exists here: the run may come from another machine.
    with suppress(OSError):  # a read-only folder: the file is hashed again next time
        cache.mkdir(exist_ok=True)
        write_json(entry, key)
    return str(key["sha256"])


def _random_sha256(config: TrainerConfig, tokenizer: Any) -> str:
    """Returns a checksum of a sample of a model's random weights.

    Random weights depend on the initialization of transformers and on the generators of torch, which may change with
    their versions. The sample is the smallest tensor of each kind: class of the module and name of the tensor.
    """
    section = model_section(config).model_copy(update={"lora": None, "freeze": [], "quantize": None})
    model = build_deferred(section, tokenizer, config.data.sequence_length, config.run.seed, kind_of_model(config))
    source = source_of(model) or held(dict(model.named_parameters()))
    digest = hashlib.sha256()
    for kind, name, box in sorted(_samples(model)):
        value: Tensor = source(name, box).detach().contiguous()
        digest.update(f"{kind} {name} {list(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _samples(model: nn.Module) -> Iterator[tuple[str, str, Box]]:
    """Yields a sample of the parameters: a description, the name of a parameter, and a part of it.

    The sample is the smallest parameter for each class of module and name within the module, and the first row of the
    largest one if it is large enough to be drawn in blocks.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    kinds: dict[str, list[str]] = {}
    for prefix, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if name in shapes:  # a tied parameter has a value under its first name only
                kinds.setdefault(f"{type(module).__name__}.{leaf}", []).append(name)
    for kind, names in kinds.items():
        smallest = min(names, key=lambda name: (math.prod(shapes[name]), name))
        yield kind, smallest, whole(shapes[smallest])
        largest = max(names, key=lambda name: (math.prod(shapes[name]), name))
        if math.prod(shapes[largest]) >= initialization.DRAWN_IN_BLOCKS:
            first = whole(shapes[largest])
            yield f"{kind} in blocks", largest, Box(first.offsets, (1, *first.lengths[1:]))
