"""Activation checkpointing and torch.compile, without a change of parameter names."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from myllm_ray.common.modules import repeated_blocks
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import AcceleratorSection
from myllm_ray.ops.dropout import checkpoint_contexts, find_dropout

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable of the folder in which inductor keeps compiled code."""


def save_memory(model: nn.Module, section: AcceleratorSection, cache: str | None = None) -> None:
    """Applies `activation_checkpointing` and `compile` of the `accelerator` section to a model, in place.

    With activation checkpointing (Chen et al., 2016, arXiv:1604.06174), a block saves only its input and recomputes its
    activations in the backward pass with the same random numbers. Both options wrap `forward` inside the wrapper of the
    backend.

    Args:
        model: The model, before the backend wraps it.
        section: The `accelerator` section of the config.
        cache: Folder in which compiled code is kept for later runs, unless the user has set `CACHE_VARIABLE`; None:
            inductor's own folder.

    Raises:
        ConfigError: The model has no repeated blocks, or it has dropout and would be compiled.
    """
    every, compiled = section.activation_checkpointing, section.compile
    if every == "none" and compiled == "none":
        return
    blocks = repeated_blocks(model)
    if not blocks and (every != "none" or compiled == "blocks"):
        key = "activation_checkpointing" if every != "none" else "compile"
        raise ConfigError(f"accelerator.{key}: {type(model).__name__} has no repeated blocks (an nn.ModuleList)")
    check_compiled_dropout(model, section)
    if every != "none":
        # `context_fn` makes the recomputation draw the same dropout masks. It can't be compiled, but a compiled model
        # has no dropout.
        options: dict[str, Any] = {"context_fn": checkpoint_contexts} if compiled == "none" else {}
        for block in blocks[:: 1 if every == "full" else int(every)]:
            # Replaces the method instead of wrapping the block, because a wrapper would rename every parameter.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    # `Module.compile` works in place too, so parameter names stay the same.
    for module in blocks if compiled == "blocks" else [model] if compiled == "model" else []:
        # Rows of an SFT run have many widths, so the code is compiled for all of them at once.
        module.compile(dynamic=True)
    if compiled != "none":
        if cache is not None:
            _keep_compiled(cache)
        # By default a width that equals another size by chance (the hidden size) is compiled as if it always did.
        torch.fx.experimental._config.use_duck_shape = False
        # The numbers in a block are constants. As inputs of the graph they would make torch trace the block twice, and
        # the first trace is not cached.
        torch._dynamo.config.specialize_float = True


def _keep_compiled(cache: str) -> None:
    """Makes a folder inductor's cache, unless the user has chosen another one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor itself sets the variable to its default when a library imports it.
    if os.environ.get(CACHE_VARIABLE) in (None, os.path.abspath(default_cache_dir())):
        os.environ[CACHE_VARIABLE] = cache


def compile_cache(config: Any) -> str | None:
    """Returns the folder of compiled code in the data cache of a config, or None for a config without data."""
    cache = getattr(getattr(config, "data", None), "cache", None)
    return None if cache is None else str(Path(cache) / "compiled")


def cpp_compiler() -> str | None:
    """Returns the path of the C++ compiler that inductor uses for the CPU, or None."""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def check_compiler(section: AcceleratorSection, device: torch.device) -> None:
    """Rejects `compile` on a CPU without a C++ compiler.

    Raises:
        ConfigError: Names the package to install.
    """
    if section.compile != "none" and device.type == "cpu" and cpp_compiler() is None:
        raise ConfigError(
            f"accelerator.compile={section.compile}: torch.compile needs a C++ compiler on the CPU "
            "(Debian: apt install g++); install one, or use accelerator.compile=none"
        )


def check_compiled_dropout(model: nn.Module, section: AcceleratorSection) -> None:
    """Rejects dropout in a compiled model.

    In compiled code, inductor draws the masks for each micro-batch, so they depend on the micro-batch size.

    Raises:
        ConfigError: Names the module that has dropout.
    """
    compiled = section.compile
    place = find_dropout(model) if compiled != "none" else None
    if place is not None:
        raise ConfigError(
            f"accelerator.compile={compiled}: the model has dropout ({place}), and compiled dropout depends on the "
            "micro-batch size: set the model's dropout to 0, or accelerator.compile=none"
        )
