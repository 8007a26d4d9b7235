"""Implements `run.determinism: strict`, which enables torch's deterministic algorithms during training.

On CPUs a run is bitwise reproducible without it. On CUDA some kernels accumulate with atomics, in an order that changes
from run to run (`index_add_`, the backward passes of embeddings and of attention with a mask). torch has deterministic
versions of most of these kernels and raises an error for the others.
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
"""Values that make cuBLAS reproducible (NVIDIA's cuBLAS documentation, "Results reproducibility")."""


def check_determinism(config: Mapping[str, Any], samples: bool) -> None:
    """Checks that a run with `run.determinism: strict` uses only operations that can be deterministic.

    It runs before any file is written.

    Args:
        config: The config of the run.
        samples: Whether the trainer samples answers.

    Raises:
        ConfigError: An option has no deterministic implementation. The message names the config key and the fix.
    """
    if (config.get("run") or {}).get("determinism") != "strict":
        return
    accelerator, scaling = config.get("accelerator") or {}, config.get("scaling") or {}
    on_cuda = accelerator.get("device") != "cpu" and bool(torch.cuda.is_available() or scaling.get("gpus_per_worker"))
    compiled = accelerator.get("compile") or "none"
    if compiled != "none":
        raise ConfigError(
            f"run.determinism=strict: accelerator.compile={compiled} chooses kernels by timing them, so another run "
            "may choose different ones; use accelerator.compile=none"
        )
    if not on_cuda:
        return
    if samples:
        raise ConfigError(
            "run.determinism=strict: answers are sampled with torch.cumsum, which has no deterministic form on CUDA; "
            "use accelerator.device=cpu or run.determinism=default"
        )
    # cuBLAS reads the variable once, when it is initialized, so a value from the environment cannot be corrected later.
    given = os.environ.get(_CUBLAS)
    if given is not None and given not in _CUBLAS_VALUES:
        raise ConfigError(
            f"run.determinism=strict: the environment has {_CUBLAS}={given}, with which cuBLAS is not deterministic; "
            f"unset it, or use {_CUBLAS_VALUES[0]}"
        )
    if given is None and scaling.get("workers", 0) == 0 and torch.cuda.is_initialized():
        raise ConfigError(
            "run.determinism=strict: this process uses CUDA already, and cuBLAS reads its variable only at "
            f"initialization: set {_CUBLAS}={_CUBLAS_VALUES[0]} in the environment"
        )


@contextmanager
def determinism(policy: str) -> Iterator[None]:
    """Enables deterministic algorithms inside the block and restores the previous settings afterwards.

    Args:
        policy: `strict` enables them; `default` changes nothing.

    Raises:
        TrainingError: An operation in the block has no deterministic implementation.
    """
    if policy != "strict":
        yield
        return
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
        filling.fill_uninitialized_memory,  # type: ignore[attr-defined]
        os.environ.get(_CUBLAS),
    )
    os.environ.setdefault(_CUBLAS, _CUBLAS_VALUES[0])
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    # Filling new tensors finds reads of uninitialized memory. It does not change results and costs a write per tensor.
    filling.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"^(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise TrainingError(
            f"run.determinism=strict: {found[1]} has no deterministic implementation in torch for this device; use a "
            "model or trainer option that avoids it, or run.determinism=default"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = before[2:5]  # type: ignore[attr-defined]
        if before[5] is None:
            os.environ.pop(_CUBLAS, None)
