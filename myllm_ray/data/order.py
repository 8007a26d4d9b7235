"""The order of documents: which ones an epoch holds, and how they are shuffled. A pure function of seed and epoch.

Documents are handled in blocks of consecutive numbers, so that nothing here needs more memory than one window (or, for
`shuffle: full`, one number a document).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from myllm_ray.common.seeds import generator
from myllm_ray.data.store import TokenStore

BLOCK = 1024
"""Consecutive documents that stay together when blocks are shuffled for `shuffle: window`."""


@dataclass(frozen=True)
class Order:
    """How an epoch's documents are chosen and ordered.

    `held_out`: share of each source that is kept for validation; `validation` asks for just that share instead.
    `weights`: passes over each source per epoch.
    """

    seed: int = 0
    shuffle: str = "full"
    window: int = 65536
    weights: tuple[float, ...] = ()
    held_out: float = 0.0
    validation: bool = False


def documents(store: TokenStore, order: Order, epoch: int) -> Iterator[np.ndarray]:
    """Document numbers of an epoch, in order, in pieces of bounded size ((n,) int64 each)."""
    blocks = _blocks(store, order)
    rng = generator("order", order.seed, epoch)
    if order.shuffle == "none":
        yield from (_take(store, order, epoch, *block) for block in blocks)
    elif order.shuffle == "full":
        chosen = [_take(store, order, epoch, *block) for block in blocks]
        every = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
        yield rng.permutation(every)
    else:
        yield from _windows(store, order, epoch, blocks, rng)


def _blocks(store: TokenStore, order: Order) -> list[tuple[int, int, float]]:
    """(source, first document, share) of every block; a weight of 2.5 is two whole passes and one of a half."""
    weights = order.weights or (1.0,) * len(store.sources)
    found = []
    for source, weight in enumerate(weights):
        shares = [1.0] * int(weight) + ([weight % 1] if weight % 1 else [])
        everything = store.documents_of(source)
        found += [(source, first, share) for share in shares for first in range(everything.start, everything.stop, BLOCK)]
    return found


def _take(store: TokenStore, order: Order, epoch: int, source: int, first: int, share: float) -> np.ndarray:
    """The documents of one block that belong to this epoch, ascending."""
    block = np.arange(first, min(first + BLOCK, store.documents_of(source).stop), dtype=np.int64)
    if order.held_out:
        held = np.zeros(len(block), bool)
        at_least = 1 if first == store.documents_of(source).start and len(block) > 1 else 0
        count = max(at_least, round(order.held_out * len(block)))
        held[generator("held-out", order.seed, first).permutation(len(block))[:count]] = True
        block = block[held if order.validation else ~held]
    if share < 1:
        count = round(share * len(block))
        block = np.sort(generator("share", order.seed, epoch, first).permutation(block)[:count])
    return block


def _windows(store: TokenStore, order: Order, epoch: int, blocks: list[tuple[int, int, float]],
             rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Blocks in random order, documents of neighbouring blocks shuffled together, `order.window` at a time."""
    waiting: list[np.ndarray] = []
    for number in rng.permutation(len(blocks)):
        waiting.append(_take(store, order, epoch, *blocks[number]))
        if sum(map(len, waiting)) >= order.window:
            yield rng.permutation(np.concatenate(waiting))
            waiting = []
    if waiting:
        yield rng.permutation(np.concatenate(waiting))
