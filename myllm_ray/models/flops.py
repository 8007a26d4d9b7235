"""The floating-point operations of a training step, from the modules of a model and the lengths of the documents.

A product of a (m, k) and a (k, n) matrix is 2·m·k·n operations. For each token, a linear layer of N weights takes
2·N in the forward pass, 2·N for the gradient of its input and 2·N for that of its weight: 6·N (Kaplan et al., 2020,
arXiv:2001.08361, §2.1). Counted are the operations that the algorithm needs (model FLOPs; Chowdhery et al., 2022,
arXiv:2204.02311, appendix B):

- Linear layers, per token; the experts of a layer by the number that a token selects. Not the embedding lookup.
- The head, at the positions with a target if the model skips the others, else at all tokens.
- Attention, by document: only tokens that may be attended to, within causal, sliding and chunked masks.
- Frozen layers without the gradient of their weight, and without that of their input if nothing before is trained.

Not counted are norms, activations and the softmax, padding, operations that activation checkpointing or a kernel
repeats, the recurrence of linear attention and state-space layers, and whatever is not the training pass of the
trained model: the passes of reference and reward models, sampling, evaluation, the optimizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from myllm_ray.common.modules import repeated_blocks, whole_shape
from myllm_ray.models.routers import CHOSEN_PER_TOKEN
from myllm_ray.ops.workload import Workload, pairs_of

_ATTENTION = re.compile(r"Attention$")
_WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent")
"""Types of layers whose cost is linear in the length of a document."""
_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class ModelFlops:
    """The operations of forward and backward pass of one model; `of` returns those of a workload."""

    per_token: float
    """Operations per token, of everything but attention and the head."""
    per_prediction: float
    """Operations of the head, per position at which it is computed."""
    per_pair: dict[tuple[int | None, int | None], float] = field(default_factory=dict)
    """Operations of all attention layers per pair of a token and an attended token, by (window, chunk)."""
    head_everywhere: bool = False
    """Whether the head is computed at all tokens, also at those without a target."""

    def of(self, work: Workload) -> float:
        """Returns the operations of a workload."""
        predicted = work.tokens if self.head_everywhere else work.predicted
        attention = sum(each * pairs_of(work, *mask) for mask, each in self.per_pair.items())
        return self.per_token * work.tokens + self.per_prediction * predicted + attention


def model_flops(model: nn.Module, training: bool = True) -> ModelFlops:
    """Returns the operations of a model, which may be on the meta device.

    Attention is found in modules of transformers with a class name `...Attention`; in other models it is not counted.

    Args:
        model: the model, possibly one of the wrappers of this package.
        training: whether to count the backward pass.
    """
    heads = _heads(model)
    per_token = per_prediction = 0.0
    per_pair: dict[tuple[int | None, int | None], float] = {}
    flows = _Flow(model) if training else None
    for name, module in model.named_modules():
        upstream = flows is not None and flows.upstream(name)
        weights = [] if id(module) in heads else list(_weights(name, module, model))
        for weight, count in weights:
            per_token += 2 * count * (1 + upstream + (training and weight.requires_grad))
        if mask := _mask(module, model):
            # Its two products have two gradients each, if anything before them or in them is trained.
            backward = flows is not None and (upstream or flows.trains(name))
            per_pair[mask] = per_pair.get(mask, 0.0) + 2 * _pair_sizes(module, model) * (1 + 2 * backward)
    for head in heads.values():
        count = whole_shape(head.weight).numel()
        gradients = 0 if flows is None else int(flows.trained_before_head) + int(head.weight.requires_grad)
        per_prediction += 2 * count * (1 + gradients)
    skips = getattr(model, "fused", None) is not False
    return ModelFlops(per_token, per_prediction, per_pair, head_everywhere=not skips)


def _heads(model: nn.Module) -> dict[int, Any]:
    """Returns the output heads by id: of language models, score heads of reward models and value heads."""
    found: dict[int, Any] = {}
    for module in model.modules():
        getter: Any = getattr(module, "get_output_embeddings", None)
        head = None if getter is None else getter()
        for linear in (head, getattr(module, "score", None), getattr(module, "value", None)):
            if isinstance(linear, nn.Linear) or (linear is head and head is not None):
                found[id(linear)] = linear
    return {key: head for key, head in found.items() if isinstance(getattr(head, "weight", None), Tensor)}


def _weights(name: str, module: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """Yields the matrices of a module itself, with the number of their elements that a token is multiplied with."""
    share = _share(name, model) if _EXPERT.search(f"{name}.") else 1.0
    if isinstance(module, nn.Linear):
        weight = module._parameters.get("weight")  # None in a quantized layer, whose base weight is frozen
        frozen = next(iter(module.buffers(recurse=False)), None)
        if (tensor := frozen if weight is None else weight) is not None:
            yield tensor, share * module.in_features * module.out_features
        return
    if isinstance(module, nn.Embedding):
        return
    for key, parameter in module.named_parameters(recurse=False):
        shape = whole_shape(parameter)
        if len(shape) == 3 and "experts" in f"{name}.{key}".lower() and not key.endswith("bias"):
            yield parameter, shape.numel() * min(1.0, _chosen(model) / shape[0])
        elif len(shape) >= 2 and key == "weight":
            yield parameter, share * shape.numel()


def _share(name: str, model: nn.Module) -> float:
    """Returns the share of the experts of a list that a token selects. `name`: the name of a module of one of them."""
    prefix = re.split(r"(?<=experts)\.\d+", name, maxsplit=1)[0]
    return min(1.0, _chosen(model) / max(1, len(list(model.get_submodule(prefix).children()))))


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _chosen(model: nn.Module) -> float:
    """Returns the number of experts per token; infinity if the config does not name it, so that all are counted."""
    config = _text_config(model)
    found = next((v for n in CHOSEN_PER_TOKEN if isinstance(v := getattr(config, n, None), int)), None)
    return float("inf") if found is None else found


def _mask(module: nn.Module, model: nn.Module) -> tuple[int | None, int | None] | None:
    """Returns (window, chunk) of an attention layer, or None if the module is none."""
    config, layer = _text_config(model), getattr(module, "layer_idx", None)
    if config is None or not _ATTENTION.search(type(module).__name__) or not isinstance(layer, int):
        return None
    if any(_ATTENTION.search(type(child).__name__) for child in module.modules() if child is not module):
        return None  # a wrapper around the layer
    types = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    kind = types[layer] if isinstance(types, (list, tuple)) and layer < len(types) else None
    window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
    if kind is None:
        return (window if getattr(config, "use_sliding_window", True) else None), None
    if kind in _WITHOUT_ATTENTION:
        return None
    if kind == "chunked_attention":
        return None, getattr(config, "attention_chunk_size", None)
    return (window if kind in ("sliding_attention", "local") else None), None


def _pair_sizes(module: nn.Module, model: nn.Module) -> float:
    """Returns the sizes of a key and of a value, summed over the query heads."""
    config = _text_config(model)
    heads = getattr(config, "num_attention_heads", 0)
    if isinstance(heads, (list, tuple)):
        heads = heads[int(getattr(module, "layer_idx", 0))]  # type: ignore[arg-type]
    default = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    size = getattr(module, "head_dim", None)
    size = size if isinstance(size, int) else default
    key = getattr(module, "qk_head_dim", None)
    value = getattr(module, "v_head_dim", None)
    return heads * ((key if isinstance(key, int) else size) + (value if isinstance(value, int) else size))


class _Flow:
    """Which modules get a gradient of their input: those with a trained parameter before them.

    The order of the modules of a model is that of its computation, except inside attention and the MLP, whose first
    layers share an input. Only the last layer of such a part, and the second matrix of an adapter, follow the others.
    """

    def __init__(self, model: nn.Module):
        blocks = {id(block) for block in repeated_blocks(model)}
        self._unit: dict[str, str] = {}  # the part of a block, such as its attention, or the module itself
        self._last: dict[str, str] = {}
        inside: dict[str, str] = {}
        for name, module in model.named_modules():
            above = name.rpartition(".")[0]
            if id(module) in blocks:
                inside[name] = name
            elif above in inside:
                inside[name] = inside[above]
            block = inside.get(name)
            child = name if block is None or name == block else f"{block}.{name[len(block) + 1 :].partition('.')[0]}"
            if block is not None and not any(p.dim() > 1 for p in model.get_submodule(child).parameters()):
                child = block  # a norm: it comes before the layers that use it, in whatever order they are declared
            self._unit[name] = child
            if isinstance(module, nn.Linear) and "lora_" not in name:
                self._last[child] = name
        self._sizes = Counter(self._unit.values())
        trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        order = {unit: place for place, unit in enumerate(dict.fromkeys(self._unit.values()))}
        units = sorted({order[self._unit[name.rpartition(".")[0]]] for name in trained})
        self._order, self._trained, self._first = order, set(units), units[0] if units else len(order)
        heads = {id(head) for head in _heads(model).values()}
        own = {self._unit[name] for name, module in model.named_modules() if id(module) in heads}
        self.trained_before_head = any(place not in {order[unit] for unit in own} for place in units)

    def upstream(self, name: str) -> bool:
        """Returns whether the gradient of the input of a module is computed."""
        unit = self._unit[name]
        if self._first < self._order[unit]:
            return True
        follows = "lora_B" in name or name == self._last.get(unit)
        return self._first == self._order[unit] and follows and self._sizes[unit] > 1

    def trains(self, name: str) -> bool:
        """Returns whether the part of the block that contains a module has trained parameters."""
        return self._order[self._unit[name]] in self._trained
