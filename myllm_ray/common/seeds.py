"""Random numbers that are a function of where they are used, independent of world size and restarts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed derived from a purpose and numbers, such as `derive_seed("dropout", seed, step, micro)`.

    The result is the same on every machine.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """Returns a numpy generator with the derived seed.

    It uses PCG64, whose stream numpy's compatibility policy guarantees across versions.
    """
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def seed_all(*parts: int | str) -> None:
    """Seeds torch (all devices), numpy and `random` with the derived seed."""
    import torch

    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restores the states of the generators of torch (CPU and current device), numpy and `random` after the block."""
    import torch

    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)
