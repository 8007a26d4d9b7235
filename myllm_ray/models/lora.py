"""LoRA: small trained matrices beside frozen ones (Hu et al., 2022, arXiv:2106.09685), by PEFT, on a model without memory too."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.extras import require
from myllm_ray.common.materialize import Source
from myllm_ray.common.modules import adapted_modules
from myllm_ray.common.seeds import derive_seed
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.schema import LoraSection


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Put adapters into a model of transformers, in place; everything else stops training.

    Raises:
        UserError: PEFT is not installed.
        ConfigError: nothing matches `targets`.
    """
    peft = require("peft", "peft", "model.lora")
    targets: Any = section.targets
    config = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets, bias="none")
    if targets == "all-linear":  # PEFT's own meaning of it needs its wrapper: all but the heads
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        config.target_modules = sorted({name.rpartition(".")[2] for name, m in model.named_modules()
                                        if type(m).__name__ in ("Linear", "Conv1D") and m is not head and name != "score"})
    try:
        with warnings.catch_warnings():  # it says that it does what GPT-2's layers need
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {' '.join(str(error).split())[:200]}") from None
    for name, parameter in model.named_parameters():
        if name.startswith("score."):  # a reward model's head is new, and trains whole
            parameter.requires_grad_(True)


def adapter_source(base: Source, seed: int, skeleton: nn.Module) -> Source:
    """Weights of a model with adapters: those of the base under their names without adapters, A random, B zero.

    A as `nn.Linear` begins: uniform within 1 / sqrt(inputs).
    """
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}

    def source(name: str) -> Tensor:
        if ".lora_B." in name:
            return torch.zeros(shapes[name])
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shapes[name][1])
            random = torch.Generator().manual_seed(derive_seed("weight", seed, name))
            return (torch.rand(shapes[name], generator=random) * 2 - 1) * bound
        return base(name.replace(".base_layer.", "."))

    return source


def merge_adapters(model: nn.Module) -> None:
    """Add the adapters into the matrices beside them, and take them out, in place."""
    for name, module in list(adapted_modules(model)):
        module.merge()
        outer, _, last = name.rpartition(".")
        setattr(model.get_submodule(outer), last, module.get_base_layer())
