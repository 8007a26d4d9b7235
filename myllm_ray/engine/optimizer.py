"""Optimizers of torch.optim and of other libraries by name, custom optimizers by import path, and parameter groups."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from myllm_ray.accelerators.optimizer_state import OptimizerLayout
from myllm_ray.common.extras import require
from myllm_ray.common.modules import whole_shape
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.sections import OptimizerSection, ParameterGroup
from myllm_ray.config.validation import section_of
from myllm_ray.engine.muon import Muon, hidden_matrices, split_groups
from myllm_ray.engine.optimizer_check import Build, check_optimizer

_OPTIONAL = ("betas", "eps", "momentum")
_EXTRA = "myllm_ray[optim]"


class Library(NamedTuple):
    """An optimizer of another library."""

    path: str
    """The import path of its class."""
    options: dict[str, Any]
    """Options that differ from the defaults of the class."""


LIBRARIES = {
    "lion": Library("pytorch_optimizer:Lion", {}),
    # The paper's weight decay is decoupled (Pagliardini et al., 2024, arXiv:2409.03137).
    "ademamix": Library("pytorch_optimizer:AdEMAMix", {"weight_decouple": True}),
}
"""Optimizers of the packages in the extra `optim`, by short name."""
_CHECKED = (torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Rprop, torch.optim.ASGD)
"""Optimizers of torch that are checked like those of other libraries: their state does not start at 0, or they need a
closure or sparse gradients."""


class OptimizerManager:
    """Builds and holds the optimizer of a config.

    `optimizer` is built on `model` at its first use. A backend that shards the model calls `build` with the sharded
    model before that.

    Args:
        model: the model to train.
        config: a run's config, as a `TrainerConfig` or a plain dict. Only its section `optimizer` is read.
    """

    def __init__(self, model: nn.Module, config: Any = None):
        self._model = model
        self.section = section_of(config, "optimizer", OptimizerSection)
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer or self.build(self._model)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns a new optimizer of the trainable parameters of `model`.

        Raises:
            ConfigError: the optimizer or an option is unknown, a pattern matches no parameter, or no parameter is
                trainable.
        """
        cls = optimizer_class(self.section.name)
        groups = parameter_groups(model, self.section)
        arguments = self._arguments(cls)
        self._check_options(cls)
        if cls is Muon:
            pattern, adamw_lr = arguments.pop("matrices", None), arguments.pop("adamw_lr", None)
            if adamw_lr is not None and not (isinstance(adamw_lr, (int, float)) and adamw_lr > 0):
                raise ConfigError(f"optimizer.options.adamw_lr: must be a number above 0, got {adamw_lr!r}")
            groups = split_groups(groups, hidden_matrices(model, pattern), adamw_lr)
        arguments.update(_fused(cls, {*inspect.signature(cls).parameters}, self.section.fused, groups))
        try:
            self._optimizer = cls(groups, **arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer: {cls.__name__} does not accept its options: {error}") from None
        return self._optimizer

    def check(self, layout: OptimizerLayout) -> None:
        """Checks that the optimizer keeps the loss curve on a backend, at any number of workers and after a resume.

        Args:
            layout: how the backend passes parameters to the optimizer.

        Raises:
            ConfigError: it does not; the message contains the reason.
        """
        name, cls = self.section.name, optimizer_class(self.section.name)
        if cls is Muon:
            if layout.startswith("slices"):
                raise ConfigError(
                    "optimizer.name=muon needs whole matrices, but this backend passes flat slices of several tensors: "
                    "use fsdp, ddp, or deepspeed with accelerator.stage=0"
                )
            return
        if cls.__module__.startswith("torch.optim") and cls not in _CHECKED:
            return  # the backends accept or refuse these by name
        if hasattr(cls, "train") and hasattr(cls, "eval"):
            raise ConfigError(
                f"optimizer.name={name}: a schedule-free optimizer trains other weights than those to evaluate and "
                "save, and is not supported: use another optimizer, with the section `ema` for averaged weights"
            )
        arguments = {**self._arguments(cls), "lr": 0.1}
        self._check_options(cls)
        decay = self.section.weight_decay
        groups = ({"weight_decay": decay}, *(self._own(given) for given in self.section.groups))
        for own in groups:
            check_optimizer(_builder(cls, own, arguments), name, layout)

    def _own(self, given: ParameterGroup) -> dict[str, Any]:
        decay = self.section.weight_decay if given.weight_decay is None else given.weight_decay
        return {"weight_decay": decay, **given.options}

    def _arguments(self, cls: Any) -> dict[str, Any]:
        """Returns the keyword arguments of the optimizer, without the one for its fused kernel."""
        accepted = set(inspect.signature(cls).parameters)
        library = LIBRARIES.get(self.section.name.lower())
        arguments: dict[str, Any] = {"lr": self.section.lr, **(library.options if library else {})}
        for name in _OPTIONAL:
            value = getattr(self.section, name)
            if value is None:
                continue
            if name not in accepted:
                raise ConfigError(
                    f"optimizer.{name}: {cls.__name__} has no such option; it takes "
                    f"{', '.join(sorted(accepted - {'params'}))}"
                )
            arguments[name] = value
        # `options` may override the keys above.
        return {**arguments, **self.section.options}

    def _check_options(self, cls: Any) -> None:
        """Refuses options that the class would ignore: unknown ones of a class with **kwargs, and of a group."""
        parameters = inspect.signature(cls).parameters
        named = self.section.name.lower() in LIBRARIES
        if any(p.kind == p.VAR_KEYWORD for p in parameters.values()) and not named:
            return  # a custom class with **kwargs knows its options
        names = {n for n, p in parameters.items() if p.kind != p.VAR_KEYWORD} - {"params"}
        for key, options in (
            ("optimizer.options", self.section.options if named else {}),  # other classes refuse them themselves
            *((f"optimizer.groups: pattern {given.pattern}", given.options) for given in self.section.groups),
        ):
            for unknown in sorted(set(options) - names):
                raise ConfigError(f"{key}: {cls.__name__} has no option {unknown}; it takes {', '.join(sorted(names))}")


def _builder(cls: Any, group: dict[str, Any], arguments: dict[str, Any]) -> Build:
    return lambda parameters: cls([{"params": parameters, **group}], **arguments)


def optimizer_class(name: str) -> Any:
    """Returns an optimizer class by its name in torch.optim or `LIBRARIES`, ignoring case, or by import path.

    Raises:
        ConfigError: there is no such class.
    """
    if ":" in name:
        return load_object(name, "optimizer.name")
    if name.lower() == "muon":
        return Muon  # torch.optim.Muon trains matrices only
    if library := LIBRARIES.get(name.lower()):
        module, _, attribute = library.path.partition(":")
        return getattr(require(module, _EXTRA, f"optimizer.name={name}"), attribute)
    classes = {
        key.lower(): key
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"
    }
    known = {**classes, **{key: key for key in LIBRARIES}}
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"optimizer.name: unknown name {name!r}; {hint}choose from {', '.join(sorted(known))}, "
            "or give an import path"
        )
    return getattr(torch.optim, known[name.lower()])


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Returns the trainable parameters as groups for an optimizer.

    There are two groups for each pattern of the config and two for the remaining parameters: weight decay applies to
    parameters with at least two dimensions, but not to norms and biases, as is usual for transformers. A parameter
    belongs to the first pattern that matches its name. Empty groups are omitted.

    Raises:
        ConfigError: a pattern matches none of the parameters left by earlier patterns, or no parameter is trainable.
    """
    # `named_parameters` yields a tied parameter once, so it is in one group only.
    left = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not left:
        raise ConfigError("the model has no trainable parameters")
    groups: list[dict[str, Any]] = []
    for given in section.groups:
        matched = {n: p for n, p in left.items() if re.search(given.pattern, n)}
        if not matched:
            some = ", ".join(list(left)[:3])
            raise ConfigError(
                f"optimizer.groups: pattern {given.pattern!r} matches no parameter; names look like {some}"
            )
        left = {n: p for n, p in left.items() if n not in matched}
        own = given.model_dump(include={"lr", "weight_decay"}, exclude_none=True)
        decay = section.weight_decay if given.weight_decay is None else given.weight_decay
        groups += _by_decay(matched, decay, {**own, **given.options})
    groups += _by_decay(left, section.weight_decay, {})
    return groups


def _by_decay(named: dict[str, nn.Parameter], decay: float, own: dict[str, Any]) -> list[dict[str, Any]]:
    # Not `p.shape`: ZeRO-3 replaces a partitioned parameter by an empty tensor with one dimension.
    matrices = [p for p in named.values() if len(whole_shape(p)) >= 2]
    others = [p for p in named.values() if len(whole_shape(p)) < 2]
    return [
        {**own, "params": params, "weight_decay": value}
        for params, value in ((matrices, decay), (others, 0.0))
        if params
    ]


def _fused(cls: Any, accepted: set[str], wanted: bool | None, groups: list[dict[str, Any]]) -> dict[str, bool]:
    """Returns `fused=True` if it is requested, or by default if torch has a fused kernel for the class and the tensors.

    Otherwise the result is empty, and torch selects the implementation. It must not be `fused=False`, which selects the
    loop over single tensors instead of the foreach implementation on CUDA.
    """
    if "fused" not in accepted:
        if wanted:
            raise ConfigError(f"optimizer.fused: {cls.__name__} has no fused kernel; leave optimizer.fused out")
        return {}
    tensors = [p.data for g in groups for p in g["params"]]
    if wanted is False or any(t.is_meta for t in tensors):  # a model on the meta device only serves to check the config
        return {}
    sharded = any(isinstance(t, DTensor) for t in tensors)
    # AdamW is a subclass of Adam, and `Muon` passes the option to AdamW. torch 2.13 has no sharding rule for other
    # fused kernels.
    if sharded and not issubclass(cls, (torch.optim.Adam, Muon)):
        if wanted:
            raise ConfigError(
                f"optimizer.fused: {cls.__name__} has no fused kernel for sharded tensors; leave optimizer.fused out"
            )
        return {}
    # Fused kernels support floating-point tensors only, and may not support other subclasses of torch.Tensor.
    known = all(type(t) in (torch.Tensor, DTensor) and t.is_floating_point() for t in tensors)
    return {"fused": True} if known or wanted else {}
