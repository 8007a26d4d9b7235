"""Selects and shuffles the documents of an epoch. The result is a pure function of seed and epoch.

Documents are processed in blocks of consecutive numbers. Memory use is bounded by one shuffle window or, for
`shuffle: full`, by one number per document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from myllm_ray.common.seeds import generator
from myllm_ray.data.store import TokenStore

BLOCK = 1024
"""Number of consecutive documents per block. `shuffle: window` shuffles the order of the blocks."""


@dataclass(frozen=True)
class Order:
    """Selection and order of the documents of an epoch.

    Attributes:
        seed: Seed of all random choices.
        shuffle: "none", "full" or "window".
        window: Smallest number of documents that are shuffled together, for `shuffle: window`.
        weights: Passes over each source per epoch. Empty: one pass over each.
        held_out: Share of each source that is reserved for validation.
        validation: Selects the held-out share instead of the rest.
    """

    seed: int = 0
    shuffle: str = "full"
    window: int = 65536
    weights: tuple[float, ...] = ()
    held_out: float = 0.0
    validation: bool = False


def documents(store: TokenStore, order: Order, epoch: int) -> Iterator[np.ndarray]:
    """Yields the document numbers of an epoch in order, as (n,) int64 arrays.

    Arrays have bounded size, except with `shuffle: full`, which yields one array with all documents.
    """
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
    """Returns (source, first document, share) of each block.

    A weight of 2.5 results in two passes over all documents and one pass over half of them.
    """
    weights = order.weights or (1.0,) * len(store.sources)
    found = []
    for source, weight in enumerate(weights):
        shares = [1.0] * int(weight) + ([weight % 1] if weight % 1 else [])
        everything = store.documents_of(source)
        found += [
            (source, first, share) for share in shares for first in range(everything.start, everything.stop, BLOCK)
        ]
    return found


def _take(store: TokenStore, order: Order, epoch: int, source: int, first: int, share: float) -> np.ndarray:
    """Returns the documents of one block that belong to this epoch, in ascending order."""
    block = np.arange(first, min(first + BLOCK, store.documents_of(source).stop), dtype=np.int64)
    if order.held_out:
        held = np.zeros(len(block), bool)
        # The first block of a source holds out at least one document, so that small sources are validated too.
        at_least = 1 if first == store.documents_of(source).start and len(block) > 1 else 0
        count = max(at_least, round(order.held_out * len(block)))
        # The epoch is not part of the seed: the same documents are held out in every epoch.
        held[generator("held-out", order.seed, first).permutation(len(block))[:count]] = True
        block = block[held if order.validation else ~held]
    if share < 1:
        # The epoch is part of the seed: each epoch draws a different subset.
        count = round(share * len(block))
        block = np.sort(generator("share", order.seed, epoch, first).permutation(block)[:count])
    return block


def _windows(
    store: TokenStore, order: Order, epoch: int, blocks: list[tuple[int, int, float]], rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yields the blocks in random order, with at least `order.window` documents at a time shuffled together."""
    waiting: list[np.ndarray] = []
    for number in rng.permutation(len(blocks)):
        waiting.append(_take(store, order, epoch, *blocks[number]))
        if sum(map(len, waiting)) >= order.window:
            yield rng.permutation(np.concatenate(waiting))
            waiting = []
    if waiting:
        yield rng.permutation(np.concatenate(waiting))
