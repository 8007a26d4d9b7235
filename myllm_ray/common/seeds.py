"""Random numbers as a function of where they are used, so that they depend neither on world size nor on restarts."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a purpose and numbers: `derive_seed("dropout", seed, step, micro)`. Stable across machines."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator with the derived seed. PCG64: its stream is fixed by numpy's compatibility policy."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def seed_all(*parts: int | str) -> None:
    """Seed torch (all devices), numpy and random with the derived seed."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    random.seed(seed)
