"""Optimizers by name, with parameter groups."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from myllm_ray.common.modules import whole_shape
from myllm_ray.common.types import as_mapping
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object

_ALIASES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "adafactor": "Adafactor"}
_OPTIONAL = ("betas", "eps", "momentum")


class OptimizerManager:
    """Builds the optimizer of a config, and holds it.

    `optimizer` is built on the model that was given as soon as somebody asks for it; a backend that wraps or shards the
    model first calls `build` on what it made.

    Args:
        model: the model to train.
        config: a run's config (its `optimizer` section is read), as a model or as a plain dict.
    """

    def __init__(self, model: nn.Module, config: Any = None):
        self._model = model
        section = as_mapping(config).get("optimizer") or {}
        self.section: dict[str, Any] = {"name": "adamw", "lr": 3e-4, "weight_decay": 0.0, **section}
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer or self.build(self._model)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer on `model`'s trainable parameters.

        Raises:
            ConfigError: an unknown optimizer or option, a pattern that matches nothing, or nothing to train.
        """
        cls = optimizer_class(str(self.section["name"]))
        groups = parameter_groups(model, self.section)
        accepted = set(inspect.signature(cls).parameters)
        arguments: dict[str, Any] = {"lr": self.section["lr"]}
        for name in _OPTIONAL:
            value = self.section.get(name)
            if value is None:
                continue
            if name not in accepted:
                raise ConfigError(f"optimizer.{name}: {cls.__name__} has no such option; it takes "
                                  f"{', '.join(sorted(accepted - {'params'}))}")
            arguments[name] = tuple(value) if isinstance(value, list) else value
        arguments.update(self.section.get("options") or {})
        arguments.update(_fused(cls, accepted, self.section.get("fused"), groups))
        try:
            self._optimizer = cls(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer: {cls.__name__} refuses its options: {error}") from None
        return self._optimizer


def optimizer_class(name: str) -> Any:
    """A class of torch.optim by its name in any case, or by import path."""
    if ":" in name:
        return load_object(name, "optimizer.name")
    known = {key.lower(): key for key, value in vars(torch.optim).items()
             if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"}
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"optimizer.name: there is no {name!r}; {hint}choose from {', '.join(sorted(known))}, "
                          "or give an import path")
    return getattr(torch.optim, known[name.lower()])


def parameter_groups(model: nn.Module, section: dict[str, Any]) -> list[dict[str, Any]]:
    """Trainable parameters in groups: each pattern's, then the rest, each split by whether weight decay applies.

    Weight decay is for matrices; norms and biases (one dimension) get none, as is usual for transformers.

    Raises:
        ConfigError: a pattern matches no parameter that an earlier one left, or nothing is trainable.
    """
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not left:
        raise ConfigError("the model has no trainable parameters")
    groups: list[dict[str, Any]] = []
    for given in section.get("groups") or []:
        matched = {n: p for n, p in left.items() if re.search(given["pattern"], n)}
        if not matched:
            some = ", ".join(list(left)[:3])
            raise ConfigError(f"optimizer.groups: pattern {given['pattern']!r} matches no parameter; names look like {some}")
        left = {n: p for n, p in left.items() if n not in matched}
        own = {k: given[k] for k in ("lr", "weight_decay") if given.get(k) is not None}
        groups += _by_decay(matched, {**section, **own}, {**own, **(given.get("options") or {})})
    groups += _by_decay(left, section, {})
    return groups


def _by_decay(named: dict[str, nn.Parameter], section: dict[str, Any], own: dict[str, Any]) -> list[dict[str, Any]]:
    decay = float(section.get("weight_decay") or 0.0)
    matrices = [p for p in named.values() if len(whole_shape(p)) >= 2]
    others = [p for p in named.values() if len(whole_shape(p)) < 2]
    return [{**own, "params": params, "weight_decay": value} for params, value in ((matrices, decay), (others, 0.0)) if params]


def _fused(cls: Any, accepted: set[str], wanted: bool | None, groups: list[dict[str, Any]]) -> dict[str, bool]:
    """`fused=True` where it was asked for, or where nothing was said and torch has a fused kernel for class, device and kind of tensor.

    Else nothing, so that torch chooses: `fused=False` would select its loop over single tensors instead of foreach on CUDA.
    """
    if "fused" not in accepted:
        if wanted:
            raise ConfigError(f"optimizer.fused: {cls.__name__} has no fused form; leave optimizer.fused out")
        return {}
    tensors = [p.data for g in groups for p in g["params"]]
    if wanted is False or any(t.is_meta for t in tensors):  # meta: a model without memory, built to check the config
        return {}
    sharded = any(isinstance(t, DTensor) for t in tensors)
    if sharded and not issubclass(cls, torch.optim.Adam):  # AdamW is one; torch 2.13 has no rule for the others' kernels
        if wanted:
            raise ConfigError(f"optimizer.fused: {cls.__name__} has no fused form for sharded tensors; leave optimizer.fused out")
        return {}
    known = all(type(t) in (torch.Tensor, DTensor) and t.is_floating_point() for t in tensors)
    return {"fused": True} if known or wanted else {}
