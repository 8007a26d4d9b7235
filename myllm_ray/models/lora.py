"""LoRA: trainable low-rank updates of frozen weights (Hu et al., 2022, arXiv:2106.09685), implemented with PEFT.

Adapters can also be added to a model on the meta device.
"""

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
from myllm_ray.config.sections import LoraSection
from myllm_ray.models.quantization import remove_quantization


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Adds adapters to a transformers model in place and freezes the other parameters.

    The score head of a reward model stays trainable.

    Args:
        model: The model, possibly on the meta device.
        section: The section `model.lora` of the config.

    Raises:
        UserError: PEFT is not installed.
        ConfigError: No module matches `targets`.
    """
    peft = require("peft", "peft", "model.lora")
    targets: Any = section.targets
    config = peft.LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets, bias="none"
    )
    if targets == "all-linear":  # all linear layers except the heads; PEFT's own handling needs its wrapper
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        config.target_modules = sorted(
            {
                name.rpartition(".")[2]
                for name, m in model.named_modules()
                if type(m).__name__ in ("Linear", "NF4Linear", "Conv1D") and m is not head and name != "score"
            }
        )
    try:
        with warnings.catch_warnings():  # PEFT warns about the setting that GPT-2's Conv1D layers require
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {' '.join(str(error).split())[:200]}") from None
    for name, parameter in model.named_parameters():
        if name.startswith("score."):  # a reward model's head is randomly initialized, so it is trained in full
            parameter.requires_grad_(True)


def adapter_source(base: Source, seed: int, skeleton: nn.Module) -> Source:
    """Returns the source of a model with adapters: base weights, random matrices A and zero matrices B.

    A is initialized as `nn.Linear`: uniform in [-1 / sqrt(inputs), 1 / sqrt(inputs)]. With B = 0 the adapted model
    initially equals the base model.

    Args:
        base: The source of the model without adapters.
        seed: The seed of the random weights.
        skeleton: The model with adapters.
    """
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}

    def source(name: str) -> Tensor:
        if ".lora_B." in name:
            return torch.zeros(shapes[name])
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shapes[name][1])
            random = torch.Generator().manual_seed(derive_seed("weight", seed, name))
            return (torch.rand(shapes[name], generator=random) * 2 - 1) * bound
        # PEFT moves an adapted layer into `base_layer`; the base source has the original name.
        return base(name.replace(".base_layer.", "."))

    return source


def merge_adapters(model: nn.Module) -> None:
    """Merges the adapters into the weights that they adapt and removes them, in place.

    Quantized layers are dequantized first, so the merged model is the one that was trained.
    """
    remove_quantization(model)
    for name, module in list(adapted_modules(model)):
        module.merge()
        outer, _, last = name.rpartition(".")
        setattr(model.get_submodule(outer), last, module.get_base_layer())
