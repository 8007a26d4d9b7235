"""The memory that glibc's allocator takes from the system for a sequence of allocations.

Runs on a CPU configure the allocator to keep freed blocks (`common/allocator.py`), so their tensors are in one
contiguous heap. Free blocks that are too small for the next tensors are holes, which add to the peak of the process.
Nodes of the graph and other small objects lie between the tensors until the end of a step, so that free blocks do not
join. How many they are is measured: with `_PINNED`, the peak of measured runs is within 10 % of the estimate
(tests/e2e/test_estimated_memory.py).

Source: `_int_malloc`, `_int_free` and `_int_memalign` of glibc (malloc/malloc.c).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_STEPS = 4
"""Number of simulated steps, after which the heap does not grow further."""
_LEAST = 1024
"""Smallest block that is simulated, in bytes. Smaller ones fit into holes."""
_ALIGNMENT = 64
"""Alignment of torch's tensors on the CPU."""
_SLACK = _ALIGNMENT + 32
"""Bytes that the allocator asks for in addition, so that it finds an aligned address in any block."""

_PINNED = 2
"""One of so many blocks has a small object before it until the end of the step."""


class Event(NamedTuple):
    """An allocation, or the release of one."""

    block: int
    """Number of the block."""
    size: int
    """Bytes of the block; 0: the block is released."""


class Heap:
    """A heap that grows at its end. A request takes the smallest free block that is large enough."""

    def __init__(self) -> None:
        self.end = 0
        """Bytes of the heap up to its last used block: what it takes from the system."""
        self.peak = 0
        self._used: dict[int, tuple[int, int]] = {}
        self._free: list[tuple[int, int]] = []
        """(size, start) of the free blocks before `end`, in ascending order."""
        self._at: dict[int, int] = {}
        """Start of a free block to its size."""
        self._ending: dict[int, int] = {}
        """End of a free block to its start."""
        self._allocated = 0
        self._pins: list[int] = []

    def run(self, events: Iterable[Event]) -> None:
        """Makes the allocations and releases in order."""
        for event in events:
            if event.size:
                self.allocate(event.block, event.size)
                self._pin(event.block)
            else:
                self.release(event.block)

    def end_step(self) -> None:
        """Releases the small objects of a step."""
        for pin in self._pins:
            self.release(pin)
        self._pins.clear()

    def _pin(self, block: int) -> None:
        """Puts a small object before a block, if it is its turn."""
        if block not in self._used:
            return
        self._allocated += 1
        if self._allocated % _PINNED == 0:
            start, size = self._used[block]
            pin = -self._allocated
            self._used[block], self._used[pin] = (start + _ALIGNMENT, size - _ALIGNMENT), (start, _ALIGNMENT)
            self._pins.append(pin)

    def allocate(self, block: int, size: int) -> None:
        """Allocates a block of `size` bytes."""
        if size < _LEAST:
            return
        size += -size % _ALIGNMENT
        found = bisect_left(self._free, (size + _SLACK, 0))
        if found == len(self._free):
            start, self.end = self.end, self.end + size + _ALIGNMENT
            self.peak = max(self.peak, self.end)
            self._used[block] = start, size + _ALIGNMENT
            return
        whole, start = self._free[found]
        self._remove(start, whole)
        taken = size + _ALIGNMENT
        self._used[block] = start, taken
        if whole > taken:
            self._add(start + taken, whole - taken)

    def release(self, block: int) -> None:
        """Releases a block, which joins the free blocks beside it."""
        if block not in self._used:
            return
        start, size = self._used.pop(block)
        if (after := self._at.get(start + size)) is not None:
            self._remove(start + size, after)
            size += after
        if (before := self._ending.get(start)) is not None:
            start, size = before, size + start - before
            self._remove(before, self._at[before])
        if start + size == self.end:
            self.end = start
        else:
            self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._free, (size, start))
        self._at[start], self._ending[start + size] = size, start

    def _remove(self, start: int, size: int) -> None:
        del self._free[bisect_left(self._free, (size, start))], self._at[start], self._ending[start + size]


def free_blocks(events: Sequence[Event], live: int, state: Sequence[int]) -> int:
    """Returns the bytes of the heap that no tensor uses when the heap is largest, after some steps.

    Args:
        events: The allocations of a step, without those of the optimizer.
        live: The most bytes that exist at a time in these.
        state: Bytes of the tensors that the optimizer creates at the end of the first step and keeps.
    """
    heap = Heap()
    # Gradients exist until the end of the step, after the optimizer has created its state.
    created = max((i for i, event in enumerate(events) if event.size), default=-1) + 1
    for step in range(_STEPS):
        numbered = [Event(event.block + step * len(events), event.size) for event in events]
        heap.run(numbered[:created])
        if step == 0:
            first = _STEPS * len(events)
            heap.run(Event(first + number, size) for number, size in enumerate(state) if size)
        heap.run(numbered[created:])
        heap.end_step()
    return max(0, heap.peak - live - sum(state))
