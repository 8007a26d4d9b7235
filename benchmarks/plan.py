"""Measures the planning of an epoch: tokens per second and peak memory, for lengths that are made up.

    python benchmarks/plan.py [--tokens G]... [--mean N]... [--kind KIND]... [--shuffle full|window|none] [--shares S]

For each packing, mean document length and number of tokens (in units of 10^9), it plans one epoch of rows of 2,048
tokens into files of a temporary folder. The length of a document is a function of its number, between 1 and twice the
mean; no token is stored. With `--shares 0.8 0.2`, the documents are those of as many sources of equal size, which are
mixed by these shares. The peak is that of the memory that Python and numpy allocate (`tracemalloc`), measured in a
second pass with `--memory`, because tracing makes the planning slower.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from myllm_ray.data.mixture import UNIT, Mixture, Stage
from myllm_ray.data.order import Order
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.store import TokenStore

_PACKINGS = {
    "continuous": Packing("continuous", 2048, "split"),
    "none": Packing("none", 2048),
    "record": Packing("record", 2048),
    "best_fit": Packing("best_fit", 2048),
}


_IN_MEMORY = 2**22
"""Default of `data.shuffle_in_memory`."""


class MadeUpStore(TokenStore):
    """A store of documents without tokens, whose lengths are a function of their numbers."""

    def __init__(self, folder: Path, documents: int, mean: int, sources: int = 1):
        self.folder, self.mean = folder, mean
        self.sources = [f"made-up-{number}" for number in range(sources)]
        tokens = documents // sources * mean
        self.meta = {"content_hash": f"{documents} {mean}", "sources": [{"kind": "tokens", "tokens": tokens}] * sources}
        self._first = np.arange(sources + 1) * (documents // sources)

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        mixed = documents.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        found: np.ndarray = 1 + (mixed * np.uint64(2 * self.mean - 1) >> np.uint64(24)).astype(np.int64)
        return found


def plan(tokens: float, mean: int, packing: Packing, shuffle: str, shares: Sequence[float] = ()) -> int:
    """Plans an epoch and returns its number of rows."""
    with tempfile.TemporaryDirectory() as folder:
        store = MadeUpStore(Path(folder), int(tokens / mean), mean, max(1, len(shares)))
        by_formula = shuffle == "full" and len(store) > _IN_MEMORY
        packed = packing.kind in ("continuous", "best_fit")
        rows = int(tokens / packing.size) if packed else len(store)
        stage = Stage(None, tuple(round(share * UNIT) for share in shares))
        order = Order(0, shuffle, by_formula=by_formula, mixture=Mixture((stage,), rows) if shares else None)
        return len(RowPlan(store, order, packing).segments(0)[1]) - 1


def measured(options: argparse.Namespace) -> Iterator[str]:
    """Yields a line per packing, mean and number of tokens."""
    for kind in options.kind:
        for mean in options.mean:
            for billions in options.tokens:
                tokens, peak = billions * 1e9, ""
                began = time.perf_counter()
                rows = plan(tokens, mean, _PACKINGS[kind], options.shuffle, options.shares)
                seconds = time.perf_counter() - began
                if options.memory:
                    tracemalloc.start()
                    plan(tokens, mean, _PACKINGS[kind], options.shuffle, options.shares)
                    peak = f", peak {tracemalloc.get_traced_memory()[1] / 2**20:.0f} MiB"
                    tracemalloc.stop()
                mixed = f", shares {' '.join(map(str, options.shares))}" if options.shares else ""
                yield (
                    f"{kind}, shuffle {options.shuffle}{mixed}, {billions:g} G tokens, {mean} per document: "
                    f"{rows:,} rows in {seconds:.1f} s, {tokens / seconds / 1e9:.2f} G tokens/s{peak}"
                )


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=float, nargs="+", default=[1.0], help="units of 10^9 tokens")
    parser.add_argument("--mean", type=int, nargs="+", default=[1000, 200])
    parser.add_argument("--shuffle", choices=["full", "window", "none"], default="full")
    parser.add_argument("--kind", choices=[*_PACKINGS], nargs="+", default=[*_PACKINGS])
    parser.add_argument("--shares", type=float, nargs="+", default=[])
    parser.add_argument("--memory", action="store_true")
    for line in measured(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
