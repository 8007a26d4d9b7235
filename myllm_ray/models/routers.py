"""Routers of mixture-of-experts models: what they decide in a forward pass, and the loss that balances their experts.

transformers declares which modules are routers (`_can_record_outputs["router_logits"]`). A hook on each keeps its whole output:
the logits, and the experts that were chosen, which are not always those with the largest logits (DeepSeek-V3 adds a bias and
chooses groups first).
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
_CHOSEN_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "top_k")


class Routers:
    """The routers inside some trunks, which are used together in one forward pass.

    Args:
        trunks: base models of transformers. The load is that of the first.

    The outputs live as attributes of the router modules, so that the hook is a plain function: a copy of the model keeps its own,
    and torch.compile traces it.
    """

    def __init__(self, trunks: Sequence[nn.Module]):
        found = [list(_routers_of(trunk)) for trunk in trunks]
        self.routers = [router for routers in found for router in routers]
        self.layers = [_layer(name, number) for number, (name, *_) in enumerate(found[0] if found else ())]
        """Numbers of the layers of the first trunk that have a router."""
        self.scoring = {id(module): _scoring(module, config) for _, module, _, config in self.routers}
        for _, module, _, _ in self.routers:
            if "_records_routing" not in module.__dict__:
                module.__dict__.update(_records_routing=False, _routing=None)
                module.register_forward_hook(_keep)

    def __len__(self) -> int:
        return len(self.routers)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the routers decide meanwhile. The passes that activation checkpointing repeats later are not kept."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def _switch(self, on: bool) -> None:
        for _, module, _, _ in self.routers:
            module.__dict__["_records_routing"] = on

    def losses(self, sequences: Tensor, weights: Tensor) -> RouterLosses:
        """The loss of what was recorded, the mean over layers, and the load of each layer's experts.

        Args:
            sequences: (B, S) the sequence of each token; -1: padding.
            weights: (N,) of the sequences.
        """
        total, loads = torch.zeros((), device=sequences.device), []
        flat = sequences.flatten()
        for _, module, index, config in self.routers:
            output, module.__dict__["_routing"] = module.__dict__["_routing"], None
            logits = _logits(output, index).flatten(0, -2)
            probabilities = router_probabilities(logits, self.scoring[id(module)])
            with torch.autocast(logits.device.type, enabled=False):
                loss, load = load_balancing_loss(probabilities, _chosen(output, logits, module, config), flat, weights)
            total = total + loss
            loads.append(load.detach())
        trunks = len(self.routers) / max(1, len(self.layers))
        return RouterLosses(total * trunks / len(self.routers), torch.stack(loads[: len(self.layers)]))


def own_router_loss_weight(config: Any) -> float:
    """The coefficient that a model's config has for the loss of its routers; 0 where it has none."""
    text = config.get_text_config()
    return float(next((value for name in _OWN_WEIGHT if (value := getattr(text, name, None)) is not None), 0.0))


def router_loss_weight(routers: Routers, config: Any, given: float | None) -> float:
    """What the loss of the routers is multiplied by: `given`, or the model's own.

    Raises:
        ConfigError: a weight is given for a model without routers.
    """
    if given is not None and not len(routers):
        raise ConfigError(f"model.router_loss_weight={given:g}: {getattr(config, 'model_type', type(config).__name__)} has no routers of "
                          "experts that transformers records; leave it out")
    return (own_router_loss_weight(config) if given is None else given) if len(routers) else 0.0


def _keep(module: nn.Module, _: Any, output: Any) -> None:
    if module._records_routing:
        module._routing = output


def _routers_of(trunk: nn.Module) -> Iterator[tuple[str, nn.Module, int, Any]]:
    """Name, router, place of the logits in its output, config; in the order of the modules."""
    seen: set[int] = set()
    inner: list[tuple[str, Any]] = [(prefix, m) for prefix, m in trunk.named_modules() if isinstance(m, PreTrainedModel)]
    for prefix, model in inner:
        specs = (getattr(type(model), "_can_record_outputs", None) or {}).get("router_logits", [])
        for name, module in model.named_modules(prefix=prefix):
            for spec in specs if isinstance(specs, list) else [specs]:
                kind: Any = getattr(spec, "target_class", None) if not isinstance(spec, type) else spec
                layer_name = getattr(spec, "layer_name", None)
                if kind is None or not isinstance(module, kind) or (layer_name and f".{layer_name}." not in f".{name}."):
                    continue
                if id(module) in seen:  # inside a model inside this one
                    continue
                seen.add(id(module))
                yield name, module, int(getattr(spec, "index", 1)), model.config.get_text_config()


def _layer(name: str, number: int) -> int:
    """The number of the layer in a module's name, such as layers.3.mlp.gate."""
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found.group(1)) if found else number


def _scoring(router: nn.Module, config: Any) -> str:
    """How a router scores experts. transformers has no attribute for it in most models: what the code calls decides."""
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
    """(T, K) the experts that a router chose: from its output, or those with the largest logits."""
    for value in output if isinstance(output, tuple) else ():
        if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() > 1 and value.shape[-1] < logits.shape[-1] + 1:
            flat = value.flatten(0, -2)
            if len(flat) == len(logits):
                return flat
    for owner in (router, config):
        for name in _CHOSEN_PER_TOKEN:
            if isinstance(count := getattr(owner, name, None), int):
                return logits.topk(count, -1).indices
    raise ConfigError(f"model: {type(router).__name__} does not say how many experts it chooses for a token")
