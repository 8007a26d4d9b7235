"""Selects and shuffles the documents of an epoch. The result is a pure function of seed and epoch.

Documents are processed in blocks of consecutive numbers. Memory use is bounded by one shuffle window or, for
`shuffle: full`, by one number per document. With `Order.by_formula` no list of the documents exists; the document at
any position follows from permutations (`permutation.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import overload

import numpy as np

from myllm_ray.common.seeds import generator
from myllm_ray.data.mixture import Mixture
from myllm_ray.data.permutation import Permutation
from myllm_ray.data.store import TokenStore

BLOCK = 1024
"""Number of consecutive documents per block. `shuffle: window` shuffles the order of the blocks."""
_PIECE = 32768
"""Number of documents whose positions are computed together, with `Order.by_formula`."""


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
        mixture: Shares of the sources, in place of `weights`; see `mixture.py`.
        by_formula: All choices are made by `Permutation`, in bounded memory. For `shuffle: full`, and for the
            validation share of such data, which then has a random order.
    """

    seed: int = 0
    shuffle: str = "full"
    window: int = 65536
    weights: tuple[float, ...] = ()
    held_out: float = 0.0
    validation: bool = False
    by_formula: bool = False
    mixture: Mixture | None = None


def documents(store: TokenStore, order: Order, epoch: int, source: int | None = None) -> Iterator[np.ndarray]:
    """Yields the document numbers of an epoch in order, as (n,) int64 arrays.

    With a source, only its documents are yielded, once each, in an order of their own; `epoch` is the number of the
    pass.

    Arrays have bounded size, except with `shuffle: full` without `by_formula`, which yields one array with all
    documents.
    """
    seed: tuple[int | str, ...] = ("order", order.seed, epoch)
    if source is not None:
        order = replace(order, weights=tuple(float(i == source) for i in range(len(store.sources))))
        seed = (*seed, source)
    if order.by_formula:
        yield from _by_formula(store, order, epoch, seed)
        return
    blocks = _Blocks(store, order)
    rng = generator(*seed)
    if order.shuffle == "none":
        yield from (_take(store, order, epoch, *block) for block in blocks)
    elif order.shuffle == "full":
        every = np.concatenate([np.empty(0, np.int64), *(_take(store, order, epoch, *block) for block in blocks)])
        rng.shuffle(every)
        yield every
    else:
        yield from _windows(store, order, epoch, blocks, rng)


def documents_in_passes(store: TokenStore, weights: Sequence[float]) -> int:
    """Returns the number of documents of an epoch, held-out ones included, with a partial pass counted as a whole."""
    return sum(ceil(weight) * len(store.documents_of(source)) for source, weight in enumerate(weights))


def _shares(weight: float) -> list[float]:
    """Returns the share of each pass. A weight of 2.5 results in two whole passes and one over half of the source."""
    return [1.0] * int(weight) + ([weight % 1] if weight % 1 else [])


class _Blocks(Sequence[tuple[int, int, float]]):
    """The (source, first document, share) of each block of an epoch, computed on access."""

    def __init__(self, store: TokenStore, order: Order):
        weights = order.weights or (1.0,) * len(store.sources)
        self._passes = [
            (source, store.documents_of(source), share)
            for source, weight in enumerate(weights)
            for share in _shares(weight)
        ]
        self._firsts = np.cumsum([0, *(-(-len(numbers) // BLOCK) for _, numbers, _ in self._passes)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @overload
    def __getitem__(self, number: int) -> tuple[int, int, float]: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[tuple[int, int, float]]: ...
    def __getitem__(self, number: int | slice) -> tuple[int, int, float] | Sequence[tuple[int, int, float]]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number >= len(self):
            raise IndexError(number)
        at = int(np.searchsorted(self._firsts, number, side="right")) - 1
        source, numbers, share = self._passes[at]
        return source, numbers.start + (int(number) - int(self._firsts[at])) * BLOCK, share


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
    store: TokenStore, order: Order, epoch: int, blocks: _Blocks, rng: np.random.Generator
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


def _by_formula(store: TokenStore, order: Order, epoch: int, seed: tuple[int | str, ...]) -> Iterator[np.ndarray]:
    """Yields the documents of an epoch; the held-out share and partial passes are exact to one document per source."""
    passes = [
        _Pass(store, order, epoch, source, share)
        for source, weight in enumerate(order.weights or (1.0,) * len(store.sources))
        for share in _shares(weight)
    ]
    firsts = np.cumsum([0, *map(len, passes)])
    shuffled = Permutation(int(firsts[-1]), *seed) if order.shuffle != "none" else None
    for first in range(0, int(firsts[-1]), _PIECE):
        places: np.ndarray = np.arange(first, min(first + _PIECE, int(firsts[-1])))
        if shuffled is not None:
            places = shuffled(places)
        which = np.searchsorted(firsts, places, side="right") - 1
        for number in np.flatnonzero(np.bincount(which)):
            of_pass = which == number
            places[of_pass] = passes[number].documents(places[of_pass] - firsts[number])
        yield places


class _Pass:
    """One pass over a source, or over a share of it: numbers below its length are mapped to its documents."""

    def __init__(self, store: TokenStore, order: Order, epoch: int, source: int, share: float):
        numbers = store.documents_of(source)
        self._first, self._skipped = numbers.start, 0
        self._held: Permutation | None = None
        self._drawn: Permutation | None = None
        self._count = len(numbers)
        if order.held_out:
            # The epoch is not part of the seed: the same documents are held out in every epoch.
            self._held = Permutation(len(numbers), "held-out", order.seed, source)
            count = max(1 if len(numbers) > 1 else 0, round(order.held_out * len(numbers)))
            self._skipped = 0 if order.validation else count
            self._count = count if order.validation else len(numbers) - count
        if share < 1:
            # The epoch is part of the seed: each epoch draws a different subset.
            self._drawn = Permutation(self._count, "share", order.seed, epoch, source)
            self._count = round(share * self._count)

    def __len__(self) -> int:
        return self._count

    def documents(self, places: np.ndarray) -> np.ndarray:
        """Returns the document numbers (n,) at the given places (n,) of the pass."""
        if self._drawn is not None:
            places = self._drawn(places)
        if self._held is not None:
            places = self._held(places + self._skipped)
        documents: np.ndarray = self._first + places
        return documents
