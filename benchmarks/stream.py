"""Measures how many micro-batches per second a worker reads from prepared data, in one thread.

    python benchmarks/stream.py [--mean 200 1000] [--micro 1 4] [--rounds 5]

Rows have 2,048 tokens, packed from documents of random lengths between 1 and twice the mean, in a random order. A
micro-batch is read from the token store, built and converted to tensors. Printed are the median and the range of the
rounds. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from myllm_ray.common.types import Position
from myllm_ray.data.order import Order
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.shards import write_shard
from myllm_ray.data.store import TokenStore
from myllm_ray.data.store_writer import SourceShards, write_store
from myllm_ray.data.stream import LocalStream, StreamSpec

_TOKENS, _ROW, _VOCABULARY, _BATCH = 800_000, 2048, 50_000, 8


def make_store(folder: Path, mean: int) -> TokenStore:
    """Writes a store of random tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2 * mean, _TOKENS // mean)
    tokens = pa.array(random.integers(0, _VOCABULARY, lengths.sum(), dtype=np.int32))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    batch = pa.record_batch([pa.ListArray.from_arrays(offsets, tokens)], ["tokens"])

    def write(beside: Path, index: int) -> Iterator[pa.RecordBatch]:
        yield write_shard(beside, f"{index}-00000", "made-up", [batch], _VOCABULARY, None)

    write_store(folder, [SourceShards("made-up", write, None)], {})
    return TokenStore(folder)


def main() -> None:
    """Prints a line per mean length and micro-batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mean", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for mean in given.mean:
        with tempfile.TemporaryDirectory() as name:
            store = make_store(Path(name) / "store", mean)
            for micro in given.micro:
                plan = RowPlan(store, Order(0, "full"), Packing("continuous", _ROW, "split"))
                stream = LocalStream(StreamSpec(plan, _BATCH, micro, 0), 0, 1)
                steps = stream.steps_in_epoch(0) - 1
                rates = []
                for _ in range(given.rounds):
                    began = time.perf_counter()
                    read = sum(len(batch.micros) for batch in stream.batches(Position(), steps))
                    rates.append(read / (time.perf_counter() - began))
                print(
                    f"documents of {mean} tokens, micro-batches of {micro} rows: {statistics.median(rates):,.0f} per "
                    f"second ({min(rates):,.0f} to {max(rates):,.0f})"
                )


if __name__ == "__main__":
    main()
