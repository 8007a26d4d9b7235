"""The search of transformers for rows with several documents, without reading from the device.

transformers finds packed rows in the position ids: `masking_utils.find_packed_sequence_indices` numbers the documents
and asks whether there is more than one. The answer is a value on the device, so every forward pass waits for it. The
caller of a model often knows the answer on the host. This module replaces the function by one that uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from transformers import masking_utils

_packed: ContextVar[bool | None] = ContextVar("packed", default=None)
_search = getattr(masking_utils, "find_packed_sequence_indices", None)


@contextmanager
def known_packing(packed: bool | None) -> Iterator[None]:
    """A context in which transformers does not search the position ids for packed rows.

    Masks are made once per forward pass, before the blocks, so the recomputation of activation checkpointing, which
    runs outside the context, does not search either.

    Args:
        packed: Whether a row has more than one document; None: transformers searches.
    """
    if packed is None or torch.compiler.is_compiling():  # a traced search has no branch on a value
        yield
        return
    token = _packed.set(packed)
    try:
        yield
    finally:
        _packed.reset(token)


def _find(position_ids: Tensor) -> Tensor | None:
    packed = None if torch.compiler.is_compiling() else _packed.get()
    if packed is None:
        found: Tensor | None = _search(position_ids) if _search is not None else None
        return found
    if not packed:
        return None
    # As in transformers: a document begins where positions do not continue.
    return (torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1).cumsum(-1)


if _search is not None:  # other versions of transformers search themselves
    masking_utils.find_packed_sequence_indices = _find
