"""Compares the time of dropout by row with that of torch's dropout, in a forward and backward pass of a small GPT-2.

    python benchmarks/dropout.py [--rounds 5] [--rows 2] [--tokens 256] [--layers 2] [--device cpu]

The model has the width of GPT-2 (768, 12 heads) with few layers, in fp32, with dropout 0.1 in all places. The rounds
are interleaved. The output contains the median, the minimum and the maximum of each variant in milliseconds, the ratios
to torch's dropout, and the same for a single dropout of the hidden states. On the CPU, one thread is used and its CPU
time is measured, which depends less on other processes than the wall time does. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from myllm_ray.ops.dropout import RowDropout


def main() -> None:
    """Measures and prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("rows", 2), ("tokens", 256), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    torch.set_num_threads(1)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def model(p: float) -> GPT2LMHeadModel:
        """Returns a model with dropout probability `p`."""
        return (
            GPT2LMHeadModel(
                GPT2Config(
                    n_layer=given.layers,
                    vocab_size=1024,
                    bos_token_id=None,
                    eos_token_id=None,
                    resid_pdrop=p,
                    embd_pdrop=p,
                    attn_pdrop=p,
                )
            )
            .to(device)
            .train()
        )

    dropping, plain = model(0.1), model(0.0)
    ids = torch.randint(0, 1024, (given.rows, given.tokens), device=device)
    rows = torch.arange(given.rows, device=device)
    hidden = torch.randn(given.rows, given.tokens, 768, device=device)

    def by_row() -> AbstractContextManager[object]:
        return RowDropout(1, rows, given.tokens)

    def step(of: GPT2LMHeadModel, mode: Callable[[], AbstractContextManager[object]]) -> None:
        with mode():
            loss = of(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        of.zero_grad()

    def one(mode: Callable[[], AbstractContextManager[object]]) -> None:
        with mode():
            functional.dropout(hidden, 0.1)

    ways: dict[str, Callable[[], None]] = {
        "step, torch's dropout": lambda: step(dropping, nullcontext),
        "step, by row": lambda: step(dropping, by_row),
        "step, no dropout": lambda: step(plain, nullcontext),
        "step, no dropout, mode on": lambda: step(plain, by_row),
        "one call, torch's": lambda: one(nullcontext),
        "one call, by row": lambda: one(by_row),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):
        for name, run in ways.items():
            # CUDA kernels run asynchronously, so the device must be idle before each reading of the clock.
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first round is a warm-up and is not recorded
                times[name].append(1000 * (clock() - started))
    result = {}
    for name, found in times.items():
        reference = times["one call, torch's" if name.startswith("one") else "step, torch's dropout"]
        ratios = [a / b for a, b in zip(found, reference, strict=True)]
        result[name] = {"ms": round(statistics.median(found), 2), "ratio": round(statistics.median(ratios), 3)}
        print(
            f"{name:26} {statistics.median(found):8.2f} ms ({min(found):.2f} to {max(found):.2f}), of torch's: "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
