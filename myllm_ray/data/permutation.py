"""Permutations by formula: the number at any position is computed without a list of all numbers.

A permutation is a Feistel network on pairs (left, right) with left < a and right < b, where a·b is the smallest such
product with a = ⌈√n⌉ that is at least n. Numbers from n on are mapped again until they are below n (cycle walking).
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, §3 and §4.
"""

from __future__ import annotations

from math import isqrt

import numpy as np

from myllm_ray.common.seeds import derive_seed

_ROUNDS = 8
_LARGEST = 2**62


class Permutation:
    """A permutation of the numbers below `count`, at most 2**62, that is determined by a purpose and numbers.

    Args:
        count: Number of numbers.
        parts: See `seeds.derive_seed`.
    """

    def __init__(self, count: int, *parts: int | str):
        if not 0 <= count <= _LARGEST:
            raise ValueError(f"a permutation of {count} numbers: at least 0 and at most 2**62 are supported")
        self.count = count
        self._left = isqrt(max(count, 1) - 1) + 1
        self._right = -(-max(count, 1) // self._left)
        self._keys = [np.uint64(derive_seed("permutation", *parts, number)) for number in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.count

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the numbers (n,) int64 at the given positions (n,), which are below `count`."""
        numbers = self._mapped(positions.astype(np.uint64))
        while (outside := np.flatnonzero(numbers >= np.uint64(self.count))).size:
            numbers[outside] = self._mapped(numbers[outside])
        return numbers.astype(np.int64)

    def _mapped(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the permutation of the numbers below a·b, (n,) uint64."""
        right: np.ndarray = numbers // np.uint64(self._left)
        left: np.ndarray = numbers - right * np.uint64(self._left)
        for number, key in enumerate(self._keys):
            if number % 2:
                _add(right, _below(left, key, self._right), self._right)
            else:
                _add(left, _below(right, key, self._left), self._left)
        right *= np.uint64(self._left)
        right += left
        return right


def _below(values: np.ndarray, key: np.uint64, limit: int) -> np.ndarray:
    """Returns hashes of values (n,) uint64 below `limit`, which is at most 2**32."""
    # The first half of the finalizer of SplitMix64 (Steele et al., "Fast Splittable Pseudorandom Number Generators",
    # 2014), and a product in place of a modulo.
    mixed: np.ndarray = values ^ key
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed >>= np.uint64(32)
    mixed *= np.uint64(limit)
    mixed >>= np.uint64(32)
    return mixed


def _add(values: np.ndarray, terms: np.ndarray, limit: int) -> None:
    """Adds terms to values modulo `limit`; all are (n,) uint64 below `limit`."""
    values += terms
    # Where the sum is below the limit, the difference wraps around and is the larger one.
    np.minimum(values, values - np.uint64(limit), out=values)
