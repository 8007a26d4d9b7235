"""Checks which devices, backends and precisions work on this machine, by running them."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.memory import cpp_compiler
from myllm_ray.config.errors import UserError
from myllm_ray.config.resolve import names, resolve
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import ModelSection
from myllm_ray.engine.checkpointing.manager import versions
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.isolation import probe_isolation


@dataclass(frozen=True)
class Line:
    """The result of one check. `what` names it; `detail` contains the reason if it does not work."""

    what: str
    works: bool
    detail: str = ""


class _Blocks(nn.Module):
    """A tiny model with a list of layers, so that every backend can shard it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


PACKED = (("llama", "sdpa"), ("gpt2", "sdpa"), ("qwen3_5_text", "sdpa"), ("mamba2", "eager"))
"""Model types, with their attention, whose packing is checked if no config is given."""


def examine(config: TrainerConfig | None = None) -> Iterator[Line]:
    """Checks the devices, every backend in every precision on every device, packing, offload and compilation.

    A backend is checked with one training step of a tiny model.

    Args:
        config: A config whose model is used to check packing. Default: the models of `PACKED`.

    Yields:
        One line per check.
    """
    yield Line("versions", True, ", ".join(f"{k} {v}" for k, v in versions().items()))
    yield Line(
        "cpu", True, f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
    )
    cuda = torch.cuda.is_available()
    yield Line(
        "cuda",
        cuda,
        ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        if cuda
        else "this torch is built without CUDA"
        if torch.version.cuda is None
        else "torch sees no GPU (driver? CUDA_VISIBLE_DEVICES?)",
    )
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        for name in sorted(names("accelerators")):
            for stage in resolve("accelerators", name, "accelerator.name").stages:
                for precision in ("fp32", "bf16", "fp16"):
                    section = {"name": name, "precision": precision, "device": device, "stage": stage}
                    label = f"{name}{'' if stage is None else f' stage {stage}'}, {precision}, {device}"
                    yield _try(label, section)
    if config is not None:
        yield _packing(config.model)
    else:
        yield from (
            _packing(ModelSection(config={"model_type": name}, attention=attention)) for name, attention in PACKED
        )  # type: ignore[arg-type]
    yield _disk_offload()
    compiler = cpp_compiler()
    yield Line(
        "torch.compile on the CPU",
        compiler is not None,
        "" if compiler else "no C++ compiler (Debian: apt install g++)",
    )


def _packing(section: ModelSection) -> Line:
    """Checks whether a model keeps several documents of one row independent of each other."""
    name = section.factory or section.name or (section.config or {})["model_type"]
    found = probe_isolation(section)
    return Line(f"packing, {name}", found.isolated is True, "" if found.isolated else f"one document a row: {found}")


def _disk_offload() -> Line:
    """Checks the requirements of DeepSpeed's offload to disk.

    No step is run, because DeepSpeed compiles its I/O library at the first use, which takes minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        section = {
            "name": "deepspeed",
            "stage": 3,
            "offload": {"optimizer": "disk", "parameters": "disk", "path": folder},
        }
        try:
            resolve("accelerators", "deepspeed", "accelerator.name")({"accelerator": section}).check()
        except UserError as error:
            return Line("deepspeed offload to disk", False, str(error))
    return Line("deepspeed offload to disk", True, "the first run compiles DeepSpeed's async_io")


def _try(label: str, section: dict[str, Any]) -> Line:
    """Runs one training step of a tiny model and returns whether it works."""
    try:
        notes = _step(section)
    except UserError as error:
        return Line(label, False, str(error))
    except Exception as error:  # an error of any library is a result of the check, shortened to one line
        return Line(label, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Line(label, True, "; ".join(notes))


def _step(section: dict[str, Any]) -> list[str]:
    """Runs one training step and returns the accelerator's notes on the device."""
    config = {"accelerator": section, "gradient_clip": None, "optimizer": {"name": "adamw", "lr": 1e-3}}
    accelerator: Accelerator = resolve("accelerators", section["name"], "accelerator.name")(config)
    accelerator.setup()
    try:
        model = _Blocks()
        prepared = accelerator.prepare(
            model, OptimizerManager(model, config).build, SchedulerManager(config=config).build
        )
        with accelerator.microbatch(last=True):
            with accelerator.autocast():
                output = prepared(torch.ones(2, 8, device=accelerator.device))
            accelerator.backward(output.float().pow(2).mean())
        accelerator.optimizer_step(None)
        return accelerator.notes()
    finally:
        accelerator.close()
