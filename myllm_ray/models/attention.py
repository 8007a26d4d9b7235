"""Attention within the documents of packed rows, registered with transformers under one name.

A model that is built with this implementation computes what `sdpa` computes, with the same kernels, as long as its
`forward` receives no `documents`. With `documents` (ops/documents.py) each token attends to the tokens before it in its
own document, and no mask over the row is built. The argument passes through the keyword arguments of every layer, so
that activation checkpointing gives the same boundaries to its recomputation.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from myllm_ray.config.errors import ConfigError
from myllm_ray.ops.documents import Documents

NAME = "myllm_ray_documents"
"""The name of the implementation in transformers."""
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")
"""Arguments of attention that the kernels do not implement: capped scores, sinks, biases, and a cache."""


def implementation(attention: str, model_class: Any) -> str | None:
    """Returns the name by which transformers knows the attention of a model.

    Args:
        attention: The key `model.attention`.
        model_class: The model's class in transformers; None: its code is not part of transformers.

    Returns:
        The name, or None for the default of transformers, which is `sdpa` if the architecture supports it.

    Raises:
        ConfigError: The architecture does not compute attention through transformers' interface.
    """
    if attention in ("sdpa", "eager"):
        return attention
    if model_class is not None and _replaceable(model_class):
        return NAME
    if attention == "auto":
        return None
    raise ConfigError(
        f"model.attention: {attention} needs an architecture whose attention can be replaced; use auto, sdpa or eager"
    )


def _replaceable(model_class: Any) -> bool:
    """Returns whether the attention of a class is `sdpa` of transformers and nothing else depends on its name."""
    if not getattr(model_class, "_supports_sdpa", False) or not model_class._can_set_attn_implementation():
        return False
    return '_attn_implementation == "sdpa"' not in inspect.getsource(inspect.getmodule(model_class) or model_class)


def takes_documents(model: nn.Module) -> bool:
    """Returns whether a wrapped model was built with this implementation."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


def document_inputs(documents: Documents | None, input_ids: Tensor) -> dict[str, Any]:
    """Returns the arguments of a transformers model that restrict attention to documents; empty for None.

    The empty mask has 4 dimensions, so transformers passes it on unchanged instead of building a mask. Attention that
    ignores `documents` fails, because this mask does not fit the scores.
    """
    if documents is None:
        return {}
    return {"documents": documents, "attention_mask": input_ids.new_empty((1, 1, 0, 0), dtype=torch.bool)}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of transformers' interface.

    Args:
        module: The attention layer.
        query: (B, heads, S, D).
        key: (B, key heads, S, D).
        value: (B, key heads, S, D).
        attention_mask: A mask, without `documents`.
        dropout: Probability of dropout, without `documents`.
        scaling: Factor of the scores; default: D ** -0.5.
        sliding_window: Number of tokens that a token attends to, including itself; None: no limit.
        documents: The documents of the rows; None: the attention of `sdpa`.
        others: Other arguments of transformers.

    Returns:
        (B, S, heads, D) outputs, and None.

    Raises:
        ValueError: The layer needs something that attention within documents does not have.
    """
    if documents is None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **others,
        )
        return found
    _check(module, query, key, attention_mask, dropout, documents, others)
    if documents.kernel == "per_document":
        return _per_document(query, key, value, documents, scaling, sliding_window), None
    query, key, value = _autocast(query, key, value)
    if documents.kernel == "flex":
        return _flex(module, query, key, value, documents, scaling, sliding_window), None
    return _flash(query, key, value, documents, scaling, sliding_window), None


def _check(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    dropout: float,
    documents: Documents,
    others: dict[str, Any],
) -> None:
    wrong = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if dropout:
        wrong.append("dropout")
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        wrong.append("attention to later tokens")
    if mask is None or mask.numel():
        wrong.append("a mask")
    if wrong:
        raise ValueError(f"attention within documents does not support {', '.join(wrong)}")
    # A Python comparison of host numbers, without a synchronization.
    width = query.shape[2]
    if key.shape[2] != width or len(documents.lengths) != len(query) or any(sum(r) != width for r in documents.lengths):
        raise ValueError(f"documents of {[sum(r) for r in documents.lengths]} tokens do not fit rows of {width} tokens")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns tensors in the precision of autocast, which does not cover the kernels outside torch's list."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(device)) for t in tensors)


def _per_document(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """Returns (B, S, heads, D) of torch's attention, one call per document."""
    grouped = query.shape[1] != key.shape[1]
    rows = []
    # `split` and not slices: the backward pass of a slice would fill a tensor of the whole row for each document.
    for *row, lengths in zip(query.split(1), key.split(1), value.split(1), documents.lengths, strict=True):
        parts = []
        for q, k, v in zip(*(tensor.split(lengths, 2) for tensor in row), strict=True):
            size = q.shape[2]
            mask = None
            if window is not None and window < size:
                mask = documents.once(("window", size, window, q.device), partial(_window_mask, size, window, q.device))
            part = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
            parts.append(part.transpose(1, 2))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def _window_mask(size: int, window: int, device: torch.device) -> Tensor:
    """Returns (size, size) bool, true where a token attends: to itself and to the `window` - 1 tokens before it."""
    seen = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    return seen & ~seen.tril(-window)


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Returns (B, S, heads, D) of FlexAttention, with a block mask that the layers share."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    device, (count, _, width, _) = query.device, query.shape

    def block_mask() -> Any:
        numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in documents.lengths]
        owner = torch.stack(numbers).to(device)

        def seen(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (q >= k) & (owner[row, q] == owner[row, k])
            return own if window is None else own & (q - k < window)

        return create_block_mask(seen, count, None, width, width, device=str(device))

    mask = documents.once(("flex", window, device), block_mask)
    found: Tensor = flex_attention_forward(module, query, key, value, mask, scaling=scaling)[0]
    return found


def _flash(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scaling: float | None, window: int | None
) -> Tensor:
    """Returns (B, S, heads, D) of FlashAttention on the flattened rows, with the cumulative lengths of documents."""
    from transformers.modeling_flash_attention_utils import _flash_attention_forward

    flat = [length for row in documents.lengths for length in row]
    bounds: Any = documents.once(
        ("flash", query.device), lambda: torch.tensor([0, *flat]).cumsum(0).to(query.device, torch.int32)
    )
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    size, value_size = query.shape[-1], value.shape[-1]
    found: Tensor = _flash_attention_forward(
        query,
        key,
        functional.pad(value, (0, size - value_size)),
        attention_mask=None,
        query_length=query.shape[1],
        is_causal=True,
        softmax_scale=scaling,
        sliding_window=window,
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=max(flat),
        max_length_k=max(flat),
        attn_implementation=f"flash_attention_{documents.kernel[-1]}",
    )
    return found[..., :value_size]


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
