"""The lengths of the documents of a row, for attention that is computed within each document.

Boundaries are computed on the host, from position ids that restart at each document. A padded tail is a document of its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Kernel = Literal["per_document", "flex", "flash2", "flash3"]
"""How the attention within documents is computed (models/attention.py)."""
KernelChoice = Literal["auto", "per_document", "flex", "flash2", "flash3"]
"""A kernel for all rows, or `auto`: `per_document` for the rows for which `pays_off` is true."""

LEAST_WIDTH = 1024
"""Smallest row, in tokens, for which `pays_off` is true."""
_MOST_WORK = 0.75
"""Largest sum of the documents' squared lengths, relative to that of the rows, for which `pays_off` is true."""
_LEAST_MEAN = 16
"""Smallest mean length of the documents for which `pays_off` is true: each document is a separate call."""

Made = TypeVar("Made")


class Documents:
    """The documents of the rows of a micro-batch, in order.

    Args:
        lengths: (rows, most documents of a row) number of tokens of each document; 0 where a row has fewer documents.
        kernel: How attention is computed.
    """

    def __init__(self, lengths: Tensor, kernel: Kernel):
        self.lengths: tuple[tuple[int, ...], ...] = tuple(tuple(n for n in row if n) for row in lengths.tolist())
        self.kernel = kernel
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Returns the result of `make` of the first call with this key, so that the layers of a model share it."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found


def document_lengths(position_ids: Tensor) -> Tensor:
    """Returns (rows, most documents of a row) the lengths of the documents, 0 where a row has fewer documents.

    A document begins where a position is not that of the previous token plus 1, as in transformers. On a device other
    than the CPU this synchronizes with the device.

    Args:
        position_ids: (rows, tokens).
    """
    positions = position_ids.cpu()
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return torch.nn.utils.rnn.pad_sequence(
        [row.nonzero()[:, 0].diff(append=torch.tensor([positions.shape[1]])) for row in begins], batch_first=True
    )


def pays_off(lengths: Tensor) -> bool:
    """Returns whether a separate call for each document is faster on a CPU than a mask over the whole rows.

    It depends on the layout of the rows only, so a run remains a function of its config. Rows of fewer than
    `LEAST_WIDTH` tokens and rows with a single document keep the mask.

    Args:
        lengths: (rows, most documents of a row), see `document_lengths`.
    """
    width = int(lengths[0].sum())
    total, count = width * len(lengths), int((lengths > 0).sum())
    return (
        width >= LEAST_WIDTH
        and total >= _LEAST_MEAN * count
        and int(lengths.square().sum()) <= _MOST_WORK * total * width
    )


def chosen_kernel(choice: KernelChoice | None, lengths: Tensor) -> Kernel | None:
    """Returns the kernel for rows of these lengths, or None for attention with a mask.

    Args:
        choice: The kernel of the run; None: a mask for all rows.
        lengths: (rows, most documents of a row), see `document_lengths`.
    """
    if choice == "auto":
        return "per_document" if pays_off(lengths) else None
    return choice
