"""The simulated heap of `estimate`: free blocks, their reuse, and the steps of a run."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from myllm_ray.verify.heap import Event, Heap, free_blocks

KB = 1024


def heap_of(*events: tuple[int, int]) -> Heap:
    """Returns a heap without small objects after allocations, (block, size), and releases, (block, 0)."""
    heap = Heap()
    for block, size in events:
        if size:
            heap.allocate(block, size)
        else:
            heap.release(block)
    return heap


def test_a_block_at_the_end_is_given_back_and_a_hole_is_not() -> None:
    two = heap_of((0, 100 * KB), (1, 100 * KB))
    assert two.end == two.peak == pytest.approx(200 * KB, rel=0.01)
    assert heap_of((0, 100 * KB), (1, 100 * KB), (1, 0)).end == pytest.approx(100 * KB, rel=0.01)
    assert heap_of((0, 100 * KB), (1, 100 * KB), (0, 0)).end == two.end
    assert heap_of((0, 100 * KB), (1, 100 * KB), (0, 0), (1, 0)).end == 0


def test_a_smaller_block_takes_the_smallest_hole() -> None:
    holes = [(0, 400 * KB), (1, 8 * KB), (2, 200 * KB), (3, 8 * KB), (0, 0), (2, 0)]
    before = heap_of(*holes).end
    assert heap_of(*holes, (4, 150 * KB), (5, 350 * KB)).end == before
    assert heap_of(*holes, (4, 500 * KB)).end - before == pytest.approx(500 * KB, rel=0.01)


def test_small_blocks_are_not_simulated() -> None:
    assert heap_of((0, 100), (0, 0)).peak == 0


def test_blocks_do_not_overlap() -> None:
    draw, heap, sizes = random.Random(0), Heap(), {}
    for number in range(2000):
        if sizes and draw.random() < 0.5:
            heap.release(chosen := draw.choice([*sizes]))
            del sizes[chosen]
        else:
            sizes[number] = draw.randint(2, 2000) * KB
            heap.allocate(number, sizes[number])
        used = sorted(heap._used.values())
        assert all(start + size <= other for (start, size), (other, _) in pairwise(used))
        assert sum(size for _, size in used) + sum(size for size, _ in heap._free) == heap.end
    assert heap.peak >= sum(sizes.values())


def test_free_blocks_of_steps() -> None:
    """The state is created where activations were, so the activations of the second step do not fit there."""
    step = [Event(0, 800 * KB), Event(1, 300 * KB), Event(0, 0), Event(1, 0)]
    assert free_blocks(step, 1100 * KB, []) < KB
    assert free_blocks(step, 1100 * KB, [500 * KB]) > 200 * KB


def test_small_objects_separate_free_blocks_until_the_end_of_a_step() -> None:
    heap = Heap()
    heap.run([*(Event(number, 100 * KB) for number in range(8)), *(Event(number, 0) for number in range(7))])
    end = heap.end
    heap.run([Event(8, 400 * KB)])
    assert heap.end > end + 300 * KB
    heap.run([Event(8, 0)])
    heap.end_step()
    heap.run([Event(9, 400 * KB)])
    assert heap.end <= end + KB
