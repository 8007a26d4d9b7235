"""Export of a run's model in one of several forms, verified before it is published.

The folder is written next to its final place, loaded again and compared with the run's model, and renamed only then. A
failure leaves nothing behind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from myllm_ray.common.files import published, write_atomic
from myllm_ray.common.pretrained import checkpoint_in, pretrained_folder
from myllm_ray.common.progress import Task
from myllm_ray.config.errors import ConfigError, UserError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.engine.checkpointing.manager import read_manifest
from myllm_ray.models import adapter_export, verification
from myllm_ray.models.export import DTYPES, cast_weights, wrapped_model, write_model
from myllm_ray.models.gguf import file as gguf_file
from myllm_ray.models.lora import merge_adapters
from myllm_ray.runs.model_card import model_card
from myllm_ray.trained_model import TrainedModel, open_trained

FORMS = ("hf", "merged", "adapter", "gguf", "ema")
CHECKS = ("logits", "tensors", "none")
LARGE = 2_000_000_000
"""Number of parameters up to which the default verification compares logits: it then needs 8 GB in addition."""
_SIZE = re.compile(r"\d+(?:\.\d+)?(?:[KMGT]i?B)", re.IGNORECASE)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")


@dataclass(frozen=True)
class ExportOptions:
    """How to export a model.

    Attributes:
        form: `hf` (a folder in Hugging Face format, adapters merged), `merged` (the same, for a run with adapters
            only), `adapter` (a PEFT folder), `gguf` (one file for llama.cpp), or `ema` (`hf` with averaged weights).
        dtype: `fp32`, `bf16` or `fp16`; None: that of the weights from which training started (adapters: of training).
        verify: `logits` (load the export and compare logits), `tensors` (compare each tensor) or `none`; None: logits
            for models of at most `LARGE` parameters, tensors for larger ones.
        max_shard_size: the largest size of a file of weights, such as `5GB`; None: that of transformers.
        license: the identifier of a license on the hub, such as `apache-2.0`; None: that of the base model's card.
    """

    form: str = "hf"
    dtype: str | None = None
    verify: str | None = None
    max_shard_size: str | None = None
    license: str | None = None

    def check(self) -> None:
        """Checks the values.

        Raises:
            ConfigError: a value is unknown, or two options contradict each other.
        """
        for name, value, known in (
            ("--to", self.form, FORMS),
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--verify", self.verify, CHECKS),
        ):
            if value is not None and value not in known:
                raise ConfigError(f"{name} {value}: unknown; give one of {', '.join(known)}")
        if self.max_shard_size is not None and not _SIZE.fullmatch(self.max_shard_size):
            raise ConfigError(f"--max-shard-size {self.max_shard_size}: give a size such as 500MB or 5GB")
        if self.max_shard_size is not None and self.form in ("adapter", "gguf"):
            raise ConfigError(f"--max-shard-size applies to folders of weights; --to {self.form} writes one file")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"--license {self.license}: give an identifier of the hub, such as apache-2.0, mit, llama3.1 or other"
            )


@dataclass(frozen=True)
class Exported:
    """What was exported: the folder, the dtype of the weights, how it was verified, and the opened model."""

    folder: Path
    dtype: str
    verified: str
    opened: TrainedModel


@dataclass(frozen=True)
class _Job:
    """An export that has passed all checks, and where its parts come from."""

    options: ExportOptions
    opened: TrainedModel
    name: str
    config: TrainerConfig | None

    @property
    def inner(self) -> Any:
        return self.opened.model.model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the written weights."""
        if self.options.dtype is not None:
            return DTYPES[self.options.dtype]
        if self.options.form == "gguf" and self.opened.dtype not in DTYPES.values():
            return torch.float32
        return self.opened.dtype

    @property
    def code(self) -> bool:
        """Whether the config allows Python code of the model's folder."""
        return self.config is not None and self.config.model.trust_remote_code

    @property
    def quantized(self) -> bool:
        """Whether the frozen weights of the run are quantized (`model.quantize`)."""
        return self.config is not None and self.config.model.quantize is not None

    @property
    def base(self) -> str:
        """The name of the base model of an adapter."""
        assert self.config is not None
        assert self.config.model.name is not None
        return self.config.model.name


def export_run(run: Path, folder: Path, options: ExportOptions) -> Exported:
    """Exports the model of a run and verifies the result.

    Args:
        run: the folder of a run, whose newest checkpoint is exported, of one of its checkpoints, or of a model in
            Hugging Face format.
        folder: the folder to create.
        options: form, dtype and verification.

    Raises:
        ConfigError: an option is wrong, the form does not suit the model, or the folder exists.
        CheckpointError: there is no complete checkpoint.
        UserError: the exported model differs from the run's, or can't be written. Nothing is left behind.
    """
    options.check()
    if folder.exists():
        raise ConfigError(f"{folder} exists: choose another folder, or remove it first")
    opened = open_trained(run, ema=options.form == "ema")
    config = None
    if opened.checkpoint is not None:
        manifest = read_manifest(opened.checkpoint)
        config = validate(manifest["config"], where=f"{opened.checkpoint}/manifest.json", components=False)
    job = _Job(options, opened, _name(run, opened), config)
    _check_form(job, run)
    try:
        with published(folder, existing="error") as beside:
            verified = _write(job, beside)
            card = model_card(
                opened.checkpoint, folder=run, form=options.form, dtype=dtype_name(job), license=options.license
            )
            write_atomic(beside / "README.md", card, durable=False)
    except (OSError, SafetensorError) as error:  # the disk is full, or the place is not writable
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{folder} can't be written: {reason}; nothing is kept") from None
    return Exported(folder, dtype_name(job), verified, opened)


def _name(run: Path, opened: TrainedModel) -> str:
    """Returns the name of the run."""
    return (run if opened.checkpoint is None else opened.checkpoint.parent.parent).resolve().name


def dtype_name(job: _Job) -> str:
    """Returns the name of the dtype of the written weights, as torch spells it."""
    if job.options.form == "adapter" and job.options.dtype is None:
        return str(next(p.dtype for p in job.inner.parameters() if p.requires_grad)).removeprefix("torch.")
    return str(job.dtype).removeprefix("torch.")


def _check_form(job: _Job, run: Path) -> None:
    """Checks that the model can be exported in this form.

    Raises:
        ConfigError: it can't.
    """
    inner, form = wrapped_model(job.opened.model), job.options.form
    if form in ("merged", "adapter") and not adapter_export.has_adapters(inner):
        raise ConfigError(f"--to {form}: {run} has no adapters (model.lora); use --to hf")
    if form == "gguf":
        gguf_file.check_gguf(job.opened.model, job.opened.tokenizer, job.opened.generation)
    if form != "adapter":
        return
    name = None if job.config is None else job.config.model.name
    if name is None:
        raise ConfigError(
            f"--to adapter: the base model of {run} has random weights, which only this run has; use --to merged"
        )
    lora = job.config.model.lora if job.config is not None else None
    if lora is not None and lora.initialization == "pissa":
        raise ConfigError(
            "--to adapter: initialization: pissa changed the frozen weights too, so the adapters do not fit the base "
            "model; use --to merged"
        )
    if job.quantized and job.options.verify == "logits":
        raise ConfigError(
            "--to adapter --verify logits: the base of this run is quantized, and that of the adapter is not, so their "
            "logits differ; use --verify tensors"
        )
    if checkpoint_in(name) is not None:
        raise ConfigError(
            f"--to adapter: the base model {name} is a run, which PEFT can't load; use --to merged, or export that run "
            "first and train on the exported folder"
        )


def _write(job: _Job, folder: Path) -> str:
    """Writes and verifies the weights; returns the kind of the verification."""
    form, inner = job.options.form, job.inner
    check = job.options.verify or ("logits" if sum(p.numel() for p in inner.parameters()) <= LARGE else "tensors")
    if form == "adapter":
        return _write_adapter(job, folder, "tensors" if job.quantized and check == "logits" else check)
    _merge(inner, check)
    if form == "gguf":
        folder.mkdir(parents=True)
        path = folder / f"{job.name}-{_SUFFIXES[job.dtype]}.gguf"
        gguf_file.write_gguf(inner, job.opened.tokenizer, path, job.opened.generation, job.dtype, job.name)
        if check == "none":
            return check
        with Task("verifying"):
            verify = gguf_file.verify_gguf_logits if check == "logits" else gguf_file.verify_gguf_tensors
            verify(inner, path)
        return check
    cast_weights(inner, job.dtype)
    write_model(inner, job.opened.tokenizer, folder, job.opened.generation, job.options.max_shard_size)
    if check == "tensors" and job.options.verify is None and not verification.has_own_names(inner, folder):
        check = "logits"
    with Task("verifying"):
        if check == "logits":
            verification.verify_logits(inner, folder, job.code)
        elif check == "tensors":
            verification.verify_tensors(inner, folder)
    return check


_SUFFIXES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _merge(inner: Any, check: str) -> None:
    """Merges the adapters, and checks that the logits stay the same."""
    if not adapter_export.has_adapters(inner):
        return
    ids = verification.probe(inner)
    before = verification.logits_of(inner, ids) if check == "logits" else None
    merge_adapters(inner)
    if before is not None:
        verification.compare_logits(
            before, verification.logits_of(inner, ids), "the merged model", verification.MERGE_TOLERANCE
        )


def _write_adapter(job: _Job, folder: Path, check: str) -> str:
    inner = job.inner
    dtype = None if job.options.dtype is None else DTYPES[job.options.dtype]
    if dtype is not None:
        adapter_export.round_adapters(inner, dtype)
    with Task("writing adapters"):
        adapter_export.write_adapter(inner, job.opened.tokenizer, folder, job.base, dtype)
    with Task("verifying"):
        if check == "logits":
            base = pretrained_folder(job.base, "model.name", weights=True, code=job.code)
            adapter_export.verify_adapter(inner, folder, base, job.code)
        elif check == "tensors":
            adapter_export.verify_adapter_tensors(inner, folder, dtype)
    return check
