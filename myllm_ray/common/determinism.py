"""`run.determinism: strict`: torch's deterministic algorithms while a run trains.

On CPUs a run repeats bit for bit without it. On CUDA some kernels add with atomics, in an order that changes from run to run (`index_add_`, the
backward pass of embeddings, of attention with a mask): torch has deterministic ones for most, and raises for the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from myllm_ray.config.errors import ConfigError, TrainingError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":4096:8", ":16:8")
"""The values with which cuBLAS repeats its results (NVIDIA's cuBLAS documentation, "Results reproducibility")."""


def check_determinism(config: Mapping[str, Any], samples: bool) -> None:
    """Look for what has no deterministic form, before anything is written.

    Args:
        config: of a run.
        samples: whether the trainer samples answers.

    Raises:
        ConfigError: names the key, and what to do.
    """
    if (config.get("run") or {}).get("determinism") != "strict":
        return
    accelerator, scaling = config.get("accelerator") or {}, config.get("scaling") or {}
    on_cuda = accelerator.get("device") != "cpu" and bool(torch.cuda.is_available() or scaling.get("gpus_per_worker"))
    compiled = accelerator.get("compile") or "none"
    if compiled != "none":
        raise ConfigError(f"run.determinism=strict: accelerator.compile={compiled} chooses kernels by measuring them, so another run may choose "
                          "others; use accelerator.compile=none")
    if not on_cuda:
        return
    if samples:
        raise ConfigError("run.determinism=strict: answers are sampled with torch.cumsum, which has no deterministic form on CUDA; use "
                          "accelerator.device=cpu or run.determinism=default")
    given = os.environ.get(_CUBLAS)
    if given is not None and given not in _CUBLAS_VALUES:
        raise ConfigError(f"run.determinism=strict: the environment has {_CUBLAS}={given}, with which cuBLAS is not deterministic; unset it, or "
                          f"use {_CUBLAS_VALUES[0]}")
    if given is None and scaling.get("workers", 0) == 0 and torch.cuda.is_initialized():
        raise ConfigError(f"run.determinism=strict: this process uses CUDA already, and cuBLAS reads its setting when it starts: set {_CUBLAS}="
                          f"{_CUBLAS_VALUES[0]} in the environment")


@contextmanager
def determinism(policy: str) -> Iterator[None]:
    """`strict`: deterministic algorithms until the end of the block; `default`: nothing. The process's own settings come back afterwards.

    Raises:
        TrainingError: an operation in the block has no deterministic form.
    """
    if policy != "strict":
        yield
        return
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), cudnn.deterministic,
              cudnn.benchmark, filling.fill_uninitialized_memory, os.environ.get(_CUBLAS))  # type: ignore[attr-defined]
    os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a write of every new tensor; it finds mistakes, it changes no result
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"^(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise TrainingError(f"run.determinism=strict: {found[1]} has no deterministic implementation in torch for this device; use another model or "
                            "trainer option that avoids it, or run.determinism=default") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before[2:5]  # type: ignore[attr-defined]
        if before[5] is None:
            os.environ.pop(_CUBLAS, None)
