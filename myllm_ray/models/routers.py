"""Routers of mixture-of-experts models: recording of their decisions, and the loss that balances the experts.

transformers declares which modules are routers (`_can_record_outputs["router_logits"]`). A forward hook on each router
keeps its full output: the logits and the selected experts. These are not always the experts with the largest logits
(DeepSeek-V3 adds a bias and selects groups first).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from myllm_ray.common.types import RouterLosses
from myllm_ray.config.errors import ConfigError
from myllm_ray.ops.load_balancing import load_balancing_loss, router_probabilities

_OWN_WEIGHT = ("router_aux_loss_coef", "aux_loss_coef")
CHOSEN_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "top_k")
"""Names of the number of experts per token, in a router or in the config of a model."""


class Routers:
    """The routers of one or more trunks that run in the same forward pass.

    The outputs are stored as attributes of the router modules, so that the hook is a plain function: a copy of the
    model has its own outputs, and torch.compile can trace the hook.

    Args:
        trunks: Base models of transformers. The reported load is that of the first one.
    """

    def __init__(self, trunks: Sequence[nn.Module]):
        found = [list(_routers_of(trunk)) for trunk in trunks]
        self.routers = [router for routers in found for router in routers]
        self.layers = [_layer(name, number) for number, (name, *_) in enumerate(found[0] if found else ())]
        """Indices of the layers of the first trunk that have a router."""
        self.scoring = {id(module): _scoring(module, config) for _, module, _, config in self.routers}
        for _, module, _, _ in self.routers:
            # A copied model already has the hook. Writing to __dict__ bypasses nn.Module.__setattr__.
            if "_records_routing" not in module.__dict__:
                module.__dict__.update(_records_routing=False, _routing=None)
                module.register_forward_hook(_keep)

    def __len__(self) -> int:
        return len(self.routers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records the outputs of the routers inside the block.

        The recomputation of activation checkpointing runs after the block, so it is not recorded.
        """
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for _, module, _, _ in self.routers:
            module.__dict__["_records_routing"] = on

    def losses(self, sequences: Tensor, weights: Tensor) -> RouterLosses:
        """Returns the load-balancing loss of the recorded outputs and the load of each layer's experts.

        The loss is the mean over the layers, summed over the trunks. The recorded outputs are cleared.

        Args:
            sequences: (B, S) index of each token's sequence; -1 for padding.
            weights: (N,) weights of the sequences.
        """
        total, loads = torch.zeros((), device=sequences.device), []
        flat = sequences.flatten()
        for _, module, index, config in self.routers:
            output, module.__dict__["_routing"] = module.__dict__["_routing"], None
            logits = _logits(output, index).flatten(0, -2)
            probabilities = router_probabilities(logits, self.scoring[id(module)])
            # The loss is computed in fp32 under mixed precision too.
            with torch.autocast(logits.device.type, enabled=False):
                loss, load = load_balancing_loss(probabilities, _chosen(output, logits, module, config), flat, weights)
            total = total + loss
            loads.append(load.detach())
        # The sum over all routers divided by the routers per trunk is the sum of the trunks' means.
        trunks = len(self.routers) / max(1, len(self.layers))
        return RouterLosses(total * trunks / len(self.routers), torch.stack(loads[: len(self.layers)]))


def own_router_loss_weight(config: Any) -> float:
    """Returns the coefficient of the router loss in a model's config, or 0 if the config has none."""
    text = config.get_text_config()
    return float(next((value for name in _OWN_WEIGHT if (value := getattr(text, name, None)) is not None), 0.0))


def router_loss_weight(routers: Routers, config: Any, given: float | None) -> float:
    """Returns the weight of the router loss: `given`, or else the model's own coefficient.

    Args:
        routers: The routers of the model.
        config: The transformers config of the model.
        given: The value of `model.router_loss_weight`, if any.

    Raises:
        ConfigError: A weight is given for a model without routers.
    """
    if given is not None and not len(routers):
        raise ConfigError(
            f"model.router_loss_weight={given:g}: {getattr(config, 'model_type', type(config).__name__)} has no "
            "routers that transformers can record; remove the key"
        )
    return (own_router_loss_weight(config) if given is None else given) if len(routers) else 0.0


def _keep(module: nn.Module, _: Any, output: Any) -> None:
    if module._records_routing:
        module._routing = output


def _routers_of(trunk: nn.Module) -> Iterator[tuple[str, nn.Module, int, Any]]:
    """Yields the name, the router, the index of the logits in its output and the config, in module order."""
    seen: set[int] = set()
    inner: list[tuple[str, Any]] = [
        (prefix, m) for prefix, m in trunk.named_modules() if isinstance(m, PreTrainedModel)
    ]
    for prefix, model in inner:
        specs = (getattr(type(model), "_can_record_outputs", None) or {}).get("router_logits", [])
        for name, module in model.named_modules(prefix=prefix):
            for spec in specs if isinstance(specs, list) else [specs]:
                kind: Any = getattr(spec, "target_class", None) if not isinstance(spec, type) else spec
                layer_name = getattr(spec, "layer_name", None)
                if (
                    kind is None
                    or not isinstance(module, kind)
                    or (layer_name and f".{layer_name}." not in f".{name}.")
                ):
                    continue
                if id(module) in seen:  # already found in an enclosing model
                    continue
                seen.add(id(module))
                yield name, module, int(getattr(spec, "index", 1)), model.config.get_text_config()


def _layer(name: str, number: int) -> int:
    """Returns the layer index in a module's name such as `layers.3.mlp.gate`, or `number` if it has none."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else number


def _scoring(router: nn.Module, config: Any) -> str:
    """Returns how a router turns logits into scores, in the terms of `router_probabilities`.

    It is `scoring_func` of the config if that is set. Most models of transformers do not have this attribute, and then
    the source code of the router is searched.
    """
    named = getattr(config, "scoring_func", None)
    if named:
        return str(named)
    try:
        source = inspect.getsource(type(router))
    except (OSError, TypeError):
        return "softmax"
    if "return router_probabilities" in source:
        return "probabilities"
    return "sigmoid" if "sigmoid(" in source else "softmax"


def _logits(output: Any, index: int) -> Tensor:
    logits: Tensor = output[index] if isinstance(output, tuple) else output
    return logits


def _chosen(output: Any, logits: Tensor, router: nn.Module, config: Any) -> Tensor:
    """Returns the (T, K) indices of the selected experts.

    They are taken from the router's output if it contains them; otherwise they are the experts with the largest logits.
    """
    # The indices are the integer tensor with one row per token and at most as many columns as there are experts.
    for value in output if isinstance(output, tuple) else ():
        if (
            isinstance(value, Tensor)
            and not value.is_floating_point()
            and value.dim() > 1
            and value.shape[-1] < logits.shape[-1] + 1
        ):
            flat = value.flatten(0, -2)
            if len(flat) == len(logits):
                return flat
    for owner in (router, config):
        for name in CHOSEN_PER_TOKEN:
            if isinstance(count := getattr(owner, name, None), int):
                return logits.topk(count, -1).indices
    raise ConfigError(f"model: {type(router).__name__} does not declare its number of experts per token")
