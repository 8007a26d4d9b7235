"""LoRA: trainable low-rank updates of frozen weights (Hu et al., 2022, arXiv:2106.09685), implemented with PEFT.

Adapters can also be added to a model on the meta device. PEFT supplies the modules; their initial values come from
`adapter_source`, because PEFT draws them from the global random-number generator and needs the weights in memory.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.extras import require
from myllm_ray.common.materialize import Source
from myllm_ray.common.modules import adapted_modules
from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.tensor_files import Box, part_of
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import LoraSection
from myllm_ray.models.lora_targets import modules_to_adapt, parameters_to_save
from myllm_ray.models.quantization import remove_quantization

_ITERATIONS = 16
"""Power iterations of the singular value decomposition of PiSSA, the number that PEFT recommends."""


def add_adapters(model: nn.Module, section: LoraSection) -> None:
    """Adds adapters to a transformers model in place and freezes the other parameters.

    The modules of `modules_to_save` and the score head of a reward model stay trainable. The values of the adapters are
    undefined; see `adapter_source` and `fill_adapters`.

    Args:
        model: The model, possibly on the meta device.
        section: The section `model.lora` of the config.

    Raises:
        UserError: PEFT is not installed.
        ConfigError: A name or pattern of the section matches nothing, or selects what can't be adapted.
    """
    peft = require("peft", "peft", "model.lora")
    names = modules_to_adapt(model, section)
    saved = parameters_to_save(model, section, names)
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        use_dora=section.dora,
        target_modules=names,
        bias="none",
    )
    try:
        # PEFT draws initial values, which are not used: the caller's random numbers must not change.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # PEFT warns about the setting that GPT-2's Conv1D layers require.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
            peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise ConfigError(f"model.lora: {' '.join(str(error).split())[:200]}") from None
    for parameter in saved:
        parameter.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if name.startswith("score."):  # a reward model's head is randomly initialized, so it is trained in full
            parameter.requires_grad_(True)


def adapter_source(base: Source, seed: int, skeleton: nn.Module, section: LoraSection) -> Source:
    """Returns the source of a model with adapters: base weights, and initial values of the matrices A and B.

    With B = 0 the adapted model initially equals the base model. A is initialized as `nn.Linear`: uniform in
    [-1 / sqrt(inputs), 1 / sqrt(inputs)]; with `initialization: gaussian` it is normal with standard deviation
    1 / rank. Random values are a function of the seed and the tensor name. The magnitudes of DoRA (Liu et al., 2024,
    arXiv:2402.09353) are the norms of the base weights' rows.

    With `initialization: pissa` (Meng et al., 2024, arXiv:2404.02948), A and B are the principal singular vectors of
    the base weight, and the frozen weight is the rest, so the sum is the base weight, within rounding.

    Args:
        base: The source of the model without adapters.
        seed: The seed of the random weights.
        skeleton: The model with adapters.
        section: The section `model.lora` of the config.
    """
    shapes = {name: parameter.shape for name, parameter in skeleton.named_parameters()}
    transposed = {name for name, m in adapted_modules(skeleton) if type(m.get_base_layer()).__name__ == "Conv1D"}

    def weight(stem: str) -> Tensor:
        """Returns the (outputs, inputs) weight of a layer."""
        value = base(f"{stem}.weight")
        return value.T if stem in transposed else value

    @functools.lru_cache(maxsize=1)  # the three tensors of a layer are requested one after the other
    def principal(stem: str) -> tuple[Tensor, Tensor, Tensor]:
        return _principal(weight(stem), section, derive_seed("weight", seed, stem))

    def source(name: str, box: Box | None = None) -> Tensor:
        _, inner, leaf = name.rpartition(".base_layer.")
        if ".lora_" not in name and not (section.initialization == "pissa" and inner and leaf == "weight"):
            # PEFT moves an adapted layer into `base_layer`; the base source has the original name.
            return base(name.replace(".base_layer.", "."), box)
        return part_of(changed(name), box)

    def changed(name: str) -> Tensor:
        """Returns a tensor of an adapter, or a base weight that its initialization changes."""
        stem, _, part = name.partition(".lora_")
        if not part:
            stem = name.rpartition(".base_layer.")[0]
            rest = principal(stem)[2]
            return rest.T.contiguous() if stem in transposed else rest
        if part.startswith("magnitude_vector."):
            norms: Tensor = torch.linalg.norm(weight(stem), dim=1)
            return norms
        if section.initialization == "pissa":
            return principal(stem)[0 if part.startswith("A.") else 1]
        if part.startswith("B."):
            return torch.zeros(shapes[name])
        random = torch.Generator().manual_seed(derive_seed("weight", seed, name))
        if section.initialization == "gaussian":
            return torch.randn(shapes[name], generator=random) / section.rank
        bound = 1 / math.sqrt(shapes[name][1])
        return (torch.rand(shapes[name], generator=random) * 2 - 1) * bound

    return source


def _principal(weight: Tensor, section: LoraSection, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns A (rank, inputs), B (outputs, rank), and the rest of a weight: weight - scale · B A.

    Args:
        weight: (outputs, inputs).
        section: The section `model.lora`.
        seed: The seed of the randomized singular value decomposition (Halko et al., 2011, arXiv:0909.4061).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(section.rank, *weight.shape), niter=_ITERATIONS)
    # The signs of singular vectors are arbitrary. They are fixed, because ranks that hold different shards of A and B
    # compute the decomposition independently.
    signs = v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
    root = (s / scale(section)).sqrt()
    a, b = (v * signs * root).T, u * signs * root
    missing = section.rank - a.shape[0]  # a rank above that of the matrix
    a, b = nn.functional.pad(a, (0, 0, 0, missing)), nn.functional.pad(b, (0, missing))
    return a.contiguous(), b.contiguous(), weight - scale(section) * (b @ a)


def scale(section: LoraSection) -> float:
    """Returns the factor of B A: alpha / rank, or alpha / sqrt(rank) (Kalajdzievski, 2023, arXiv:2312.03732)."""
    return section.alpha / (math.sqrt(section.rank) if section.rslora else section.rank)


def fill_adapters(model: nn.Module, seed: int, section: LoraSection) -> None:
    """Sets the initial values of the adapters of a model that has its weights, in place.

    Args:
        model: The model with adapters.
        seed: The seed of the random weights.
        section: The section `model.lora`.
    """
    values = dict(model.named_parameters())

    def base(name: str, box: Box | None = None) -> Tensor:
        return part_of(values[_inside(name, values)].detach(), box)

    source = adapter_source(base, seed, model, section)
    with torch.no_grad():
        for name, _ in adapted_modules(model):
            parts = [n for n in values if n.startswith(f"{name}.")]
            # All values of a layer are made before its base weight changes (PiSSA).
            for parameter, value in [(values[n], source(n).clone()) for n in parts]:
                parameter.copy_(value)


def _inside(name: str, known: dict[str, Any]) -> str:
    outer, _, leaf = name.rpartition(".")
    return name if name in known else f"{outer}.base_layer.{leaf}"


def merged(
    weight: Tensor, read: Callable[[str], Tensor], stem: str, section: LoraSection, transposed: bool = False
) -> Tensor:
    """Returns a weight with its adapter merged.

    Args:
        weight: The frozen weight, (outputs, inputs), or (inputs, outputs) if `transposed`.
        read: Returns a tensor of the adapter by its name.
        stem: The name of the adapted layer.
        section: The section `model.lora`.
        transposed: Whether the layer stores its weight as (inputs, outputs), as the `Conv1D` of GPT-2 does.
    """
    # PEFT's update has the layout of nn.Linear: (outputs, inputs).
    change = read(f"{stem}.lora_B.default.weight") @ read(f"{stem}.lora_A.default.weight")
    total = weight + (change.T if transposed else change) * scale(section)
    if not section.dora:
        return total
    rows = total.T if transposed else total
    norms: Tensor = torch.linalg.norm(rows, dim=1)
    rows = rows * (read(f"{stem}.lora_magnitude_vector.default.weight") / norms)[:, None]
    return rows.T.contiguous() if transposed else rows


def merge_adapters(model: nn.Module) -> None:
    """Merges the adapters into the weights that they adapt and removes them, in place.

    Quantized layers are dequantized first, so the merged model is the one that was trained.
    """
    remove_quantization(model)
    for name, module in list(adapted_modules(model)):
        module.merge()
        outer, _, last = name.rpartition(".")
        setattr(model.get_submodule(outer), last, module.get_base_layer())
