"""The models that `myllm-ray evaluate` takes: runs, checkpoints, exported folders and hub ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from myllm_ray.common.pretrained import pretrained_folder
from myllm_ray.common.types import Isolation
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpointing.manager import CheckpointManager, read_manifest
from myllm_ray.engine.checkpointing.verification import sha256
from myllm_ray.trained_model import kind_of_trained

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model")


@dataclass
class Subject:
    """A model to evaluate. Its weights are not read yet.

    Attributes:
        name: the model as the user named it, with the step for one of several checkpoints.
        path: a checkpoint, or a folder in Hugging Face format.
        results: the folder of the results; None: they are not kept.
    """

    name: str
    path: Path
    results: Path | None

    @cached_property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a checkpoint; None for a folder in Hugging Face format."""
        return read_manifest(self.path) if (self.path / "manifest.json").is_file() else None

    @cached_property
    def config(self) -> TrainerConfig | None:
        """The config of the run of a checkpoint; None for a folder in Hugging Face format."""
        if self.manifest is None:
            return None
        return validate(self.manifest["config"], where=f"{self.path}/manifest.json", components=False)

    @property
    def step(self) -> int | None:
        """The optimizer steps of a checkpoint; None for a folder in Hugging Face format."""
        return None if self.manifest is None else int(self.manifest["step"])

    @property
    def isolation(self) -> Isolation | None:
        """Whether the model isolates the documents of a row, as the run determined it; None if it is not known."""
        found = (self.manifest or {}).get("isolation")
        return Isolation(**found) if found else None

    @property
    def kind(self) -> str:
        """The kind of model, see `models.load.build_deferred`."""
        return kind_of_trained(self.path)

    @cached_property
    def identity(self) -> str:
        """A SHA-256 of the model: the checksum of a checkpoint's manifest, or a hash of the files of a folder."""
        if self.manifest is not None:
            return str(self.manifest["checksum"])  # the manifest contains the checksums of the weights
        files = sorted({path for pattern in _MODEL_FILES for path in self.path.glob(pattern)})
        return hashlib.sha256(json.dumps([[p.name, sha256(p)] for p in files]).encode()).hexdigest()

    def check(self, kind: str, option: str) -> None:
        """Checks the kind of the model before its weights are read.

        Args:
            kind: `causal_lm` or `reward_model`.
            option: the argument that names the model, for error messages.

        Raises:
            ConfigError: the model is of the other kind.
        """
        is_reward_model = self.kind == "reward_model"
        if kind == "causal_lm" and is_reward_model:
            raise ConfigError(
                f"{option}: {self.name} is a reward model, which predicts no tokens: give a causal language model; "
                "--win-rate takes reward models"
            )
        if kind == "reward_model" and not is_reward_model:
            raise ConfigError(
                f"{option}: {self.name} is not a reward model: give a run of the reward trainer, or a sequence "
                "classifier in Hugging Face format"
            )


def find_subjects(names: Iterable[str], all_checkpoints: bool = False) -> list[Subject]:
    """Returns the models of the command line.

    Args:
        names: folders of runs, whose newest checkpoint is taken, checkpoints, folders in Hugging Face format, and hub
            ids.
        all_checkpoints: take every checkpoint of a run, oldest first.

    Raises:
        ConfigError: there is no such folder, and it is not a hub id.
        CheckpointError: a folder contains no model.
    """
    found = [subject for name in names for subject in _subjects(name, all_checkpoints)]
    if all_checkpoints and all(subject.manifest is None for subject in found):
        raise ConfigError("--all-checkpoints: no MODEL is the folder of a run")
    return found


def find_subject(name: str, option: str) -> Subject:
    """Returns a single model; see `find_subjects`.

    Args:
        name: the model.
        option: the option that names it, for error messages.
    """
    return next(_subjects(name, False, option))


def _subjects(name: str, all_checkpoints: bool, option: str = "MODEL") -> Iterator[Subject]:
    path = Path(name).expanduser()
    if not path.exists():
        yield Subject(name, pretrained_folder(name, option, weights=True), None)
        return
    if not path.is_dir():
        raise ConfigError(
            f"{option}: {name} is a file: give the folder of a run, a checkpoint or a folder in Hugging Face format"
        )
    if (path / "config.json").is_file():
        yield Subject(name, path, path / "evaluations")
        return
    if (path / "manifest.json").is_file():
        run = path.resolve().parent
        yield Subject(name, path, (run.parent if run.name == "checkpoints" else run) / "evaluations")
        return
    checkpoints = CheckpointManager(folder=path / "checkpoints").all()
    if not checkpoints:
        raise CheckpointError(f"{option}: {name} contains no complete checkpoint and no config.json of a model")
    for checkpoint in checkpoints if all_checkpoints else checkpoints[-1:]:
        named = f"{name}/{checkpoint.name}" if all_checkpoints else name
        yield Subject(named, checkpoint, path / "evaluations")


def stem(subject: Subject) -> str:
    """Returns the first part of the name of a result file: the step of a checkpoint, else `model`."""
    return "model" if subject.step is None else f"{subject.step:08d}"
