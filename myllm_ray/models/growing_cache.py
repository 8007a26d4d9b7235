"""Cache layer with preallocated buffers for keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Cache layer with preallocated buffers for keys and values.

    The cache layer of transformers concatenates, which copies all keys and values at every token.

    Args:
        capacity: The number of tokens to allocate. The buffers double when more tokens arrive.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        shape = (*key_states.shape[:2], self.capacity)
        self.key_buffer = key_states.new_zeros(*shape, key_states.shape[-1])
        self.value_buffer = value_states.new_zeros(*shape, value_states.shape[-1])

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        stop = self.used + key_states.shape[-2]
        if stop > self.capacity:
            self._allocate(max(stop, 2 * self.capacity))
        self.key_buffer[:, :, self.used : stop] = key_states
        self.value_buffer[:, :, self.used : stop] = value_states
        return self._use(stop)

    def get_seq_length(self) -> int:
        return self.used

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows of the batch."""
        self.key_buffer, self.value_buffer = self.key_buffer[rows], self.value_buffer[rows]

    def keep_first(self, tokens: int) -> None:
        """Removes all tokens after the first `tokens`."""
        if self.is_initialized:
            self._use(min(tokens, self.used))

    def remove_first(self, tokens: int) -> None:
        """Removes the first `tokens` columns; the others move to the start of the buffers."""
        if self.is_initialized and tokens:
            left = self.used - tokens
            for buffer in (self.key_buffer, self.value_buffer):
                buffer[:, :, :left] = buffer[:, :, tokens : self.used].clone()
            self._use(left)

    def append_rows(self, others: GrowingLayer) -> None:
        """Appends the rows of another layer. The tokens of all rows then end in the same column.

        The shorter rows have undefined columns on the left, which the attention mask must exclude.
        """
        if not others.is_initialized:
            return
        if not self.is_initialized:
            self.lazy_initialization(others.key_buffer[:0], others.value_buffer[:0])
        used = max(self.used, others.used)
        capacity, rows = max(self.capacity, others.capacity), len(self.key_buffer)
        for name in ("key_buffer", "value_buffer"):
            mine, added = getattr(self, name), getattr(others, name)
            merged = mine.new_zeros(rows + len(added), mine.shape[1], capacity, mine.shape[-1])
            merged[:rows, :, used - self.used : used] = mine[:, :, : self.used]
            merged[rows:, :, used - others.used : used] = added[:, :, : others.used]
            setattr(self, name, merged)
        self.capacity = capacity
        self._use(used)

    def _allocate(self, capacity: int) -> None:
        added = capacity - self.capacity
        self.key_buffer = torch.nn.functional.pad(self.key_buffer, (0, 0, 0, added))
        self.value_buffer = torch.nn.functional.pad(self.value_buffer, (0, 0, 0, added))
        self.capacity = capacity

    def _use(self, tokens: int) -> tuple[Tensor, Tensor]:
        self.used = tokens
        keys, values = self.key_buffer[:, :, :tokens], self.value_buffer[:, :, :tokens]
        self.keys, self.values = keys, values
        return keys, values
