"""The modules that `model.lora` adapts or trains in full, and the parameters that `model.freeze` freezes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import LoraSection

_LINEAR = ("Linear", "Conv1D")
"""Class names of the layers that can have adapters; Conv1D is the linear layer of GPT-2."""


def modules_to_adapt(model: nn.Module, section: LoraSection) -> list[str]:
    """Returns the names of the linear layers that get an adapter, in the order of the model.

    Args:
        model: A transformers model without adapters.
        section: The section `model.lora` of the config.

    Raises:
        ConfigError: An entry of `targets`, `exclude` or `layers` matches nothing, or a target can't have an adapter.
    """
    # A reward model's head is randomly initialized and trained in full.
    linear = [n for n, m in model.named_modules() if type(m).__name__ in _LINEAR and n != "score"]
    if section.targets == "all-linear":
        getter: Any = getattr(model, "get_output_embeddings", None)
        head = getter() if getter is not None else None
        chosen = [n for n in linear if model.get_submodule(n) is not head]
    else:
        chosen = _matching(linear, section.targets, "model.lora.targets", model)
    if section.exclude:
        left_out = {*_matching(chosen, section.exclude, "model.lora.exclude", model)}
        chosen = [n for n in chosen if n not in left_out]
    if section.layers is not None:
        missing = sorted({*section.layers} - {_block(n) for n in chosen})
        if missing:
            blocks = sorted({b for n in chosen if (b := _block(n)) is not None})
            there = f"they are in {blocks[0]} to {blocks[-1]}" if blocks else "they are in no numbered block"
            raise ConfigError(f"model.lora.layers: no targeted layer is in block {missing[0]}; {there}")
        chosen = [n for n in chosen if _block(n) in section.layers]
    if not chosen:
        raise ConfigError("model.lora: no layer is left to adapt; change targets, exclude or layers")
    holders = _holders(model)
    for name in chosen:
        if sharing := _sharing(holders, model.get_submodule(name), name):
            raise ConfigError(
                f"model.lora.targets: {name} shares its weight with {sharing[0]}, which its adapter would change too; "
                "leave it out, or train both in full with model.lora.modules_to_save"
            )
    return chosen


def parameters_to_save(model: nn.Module, section: LoraSection, adapted: Iterable[str]) -> list[nn.Parameter]:
    """Returns the parameters of `modules_to_save`, which are trained in full.

    Args:
        model: A transformers model without adapters.
        section: The section `model.lora` of the config.
        adapted: The result of `modules_to_adapt`.

    Raises:
        ConfigError: An entry matches no module with parameters, a module is adapted too, or it shares its weight with a
            module that is not listed.
    """
    key = "model.lora.modules_to_save"
    owning = {n: m for n, m in model.named_modules() if n and next(m.parameters(), None) is not None}
    names = _matching(list(owning), section.modules_to_save, key, model) if section.modules_to_save else []
    inside = {n for n in owning for name in names if n == name or n.startswith(f"{name}.")}
    holders = _holders(model)
    for name in names:
        if both := next((n for n in adapted if n == name or n.startswith(f"{name}.")), None):
            raise ConfigError(f"{key}: {name} is trained in full, and {both} has an adapter: exclude it (exclude)")
        for inner_name, inner in owning[name].named_modules(prefix=name):
            if other := next((n for n in _sharing(holders, inner, inner_name) if n not in inside), None):
                raise ConfigError(
                    f"{key}: {name} shares its weight with {other} in this model; list both, "
                    f"[{name.rpartition('.')[2]}, {other.rpartition('.')[2]}], to train the shared weight"
                )
    return [p for name in names for p in owning[name].parameters()]


def freeze(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freezes the parameters whose names match one of the patterns (`re.search`), in place.

    Args:
        model: The complete model; the names are those of `optimizer.groups`.
        patterns: Regular expressions, the list `model.freeze` of the config.

    Raises:
        ConfigError: A pattern matches no trainable parameter, or no trainable parameter is left.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for pattern in patterns:
        matched = [p for name, p in trainable.items() if re.search(pattern, name)]
        if not matched:
            some = ", ".join(list(trainable)[:3])
            raise ConfigError(
                f"model.freeze: pattern {pattern!r} matches no trainable parameter; names look like {some}"
            )
        for parameter in matched:
            parameter.requires_grad_(False)
    if trainable and not any(p.requires_grad for p in trainable.values()):
        raise ConfigError("model.freeze: the patterns match every parameter, so nothing is left to train")


def _matching(names: list[str], given: str | list[str], key: str, model: nn.Module) -> list[str]:
    """Returns the names that a regular expression matches completely, or that end with one of the listed parts."""
    if isinstance(given, str):
        found = [n for n in names if re.fullmatch(given, n)]
        if not found:
            raise ConfigError(
                f"{key}: the pattern {given!r} matches no name completely; names look like {_some(names)} "
                "(write a list for the last parts of names)"
            )
        return found
    for entry in given:
        if not any(_ends_with(n, entry) for n in names):
            other = next((m for n, m in model.named_modules() if _ends_with(n, entry)), None)
            what = "matches nothing" if other is None else f"is a {type(other).__name__}, which is not possible here"
            raise ConfigError(f"{key}: {entry!r} {what}; names look like {_some(names)}")
    return [n for n in names if any(_ends_with(n, entry) for entry in given)]


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _some(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in names)) if len(names) < 500 else ", ".join(names[:3])


def _block(name: str) -> int | None:
    """Returns the index of the block that a module is in: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Returns the names of the modules that hold each parameter, by the parameter's id."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    return holders


def _sharing(holders: Mapping[int, list[str]], module: nn.Module, name: str) -> list[str]:
    """Returns the names of the other modules that hold one of the module's own parameters."""
    return [n for p in module.parameters(recurse=False) for n in holders[id(p)] if n != name]
