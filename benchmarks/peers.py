"""Common code of the benchmarks that compare this package with other libraries.

Both sides use the same model and data. Each side is measured in a separate process, and the sides alternate.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

VOCABULARIES = {"4k": 4096, "gpt2": 50257}
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment in which glibc keeps large blocks instead of returning them to the system after every step."""


def model_config(vocabulary: str) -> dict[str, Any]:
    """Returns the config of a Llama model with 6 layers of width 256."""
    return {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARIES[vocabulary],
        "tie_word_embeddings": True,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }


def measure(
    script: str,
    side: str,
    vocabulary: str,
    environment: dict[str, str] | None = None,
    *arguments: str,
    python: str | None = None,
) -> dict[str, Any]:
    """Runs one side of a comparison in a separate process and returns its result.

    Args:
        script: Path of the benchmark. The last line of its output is JSON.
        side: Name of the side, the argument `--side` of the script.
        vocabulary: A key of `VOCABULARIES`.
        environment: Additional environment variables.
        arguments: Additional arguments of the script.
        python: The Python interpreter; default: the current one.
    """
    command = [python or sys.executable, script, "--side", side, "--vocabulary", vocabulary, *arguments]
    base = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    before = _cpu_seconds()
    done = subprocess.run(
        command,
        env={**base, "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "others": _others_share(before)}


class _Seconds(NamedTuple):
    """Seconds since some start."""

    wall: float
    machine: float
    """CPU time of all processes of the machine, with the time that the host of a virtual machine has taken."""
    own: float
    """CPU time of this process and of its children that have ended."""


def _cpu_seconds() -> _Seconds:
    stat = Path("/proc/stat")
    machine = 0.0
    if stat.is_file():
        user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(
            int, stat.read_text().split("\n")[0].split()[1:]
        )
        machine = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return _Seconds(time.monotonic(), machine, own.user + own.system + own.children_user + own.children_system)


def _others_share(before: _Seconds) -> float:
    """Returns the share of the machine's CPU time that other programs have used, 0 on systems without `/proc/stat`.

    Processes that a side leaves to the system, such as those of Ray, count as other programs.
    """
    wall, machine, own = (b - a for a, b in zip(before, _cpu_seconds(), strict=True))
    return round(max(0.0, machine - own) / (wall * (os.cpu_count() or 1)), 3)


def measure_undisturbed(way: Callable[[], dict[str, Any]], limit: float, attempts: int = 3) -> dict[str, Any]:
    """Measures until other programs use at most a share of the CPUs, and returns the result with the smallest share.

    Args:
        way: Measures a side; see `measure`.
        limit: The share.
        attempts: Largest number of measurements.
    """
    found = [way()]
    while found[-1]["others"] > limit and len(found) < attempts:
        found.append(way())
    return min(found, key=lambda result: float(result["others"]))


def interleave(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measures every side once per round and returns the results of each side, one per round.

    The order alternates from round to round, so that a drift of the machine affects no side more than the others.

    Args:
        sides: A function per name, which measures the side and returns its `rate` and other values.
        rounds: Number of rounds.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 == 0 else reversed(list(sides)):
            found[name].append(sides[name]())
    return found


def ratios(ours: list[dict[str, Any]], peer: list[dict[str, Any]]) -> list[float]:
    """Returns the ratio of the rates of each round, in increasing order."""
    return sorted(a["rate"] / b["rate"] for a, b in zip(ours, peer, strict=True))


def compare(
    name: str,
    script: str,
    vocabulary: str,
    rounds: int,
    unit: str,
    ours: tuple[str, ...],
    peer: tuple[str, ...],
    peer_environment: dict[str, str] | None = None,
    peer_python: str | None = None,
) -> None:
    """Measures both sides in interleaved rounds and prints their medians as one line of JSON.

    Args:
        name: Name of the benchmark.
        script: Path of the benchmark.
        vocabulary: A key of `VOCABULARIES`.
        rounds: Number of rounds.
        unit: Unit of the rates.
        ours: Arguments of the script for this package.
        peer: Arguments of the script for the other library.
        peer_environment: Additional environment variables for the other library.
        peer_python: The Python interpreter for the other library.
    """
    found = interleave(
        {
            "ours": partial(measure, script, "ours", vocabulary, None, *ours),
            "peer": partial(measure, script, "peer", vocabulary, peer_environment, *peer, python=peer_python),
        },
        rounds,
    )
    medians = {side: statistics.median(r["rate"] for r in results) for side, results in found.items()}
    extra = {f"{k}_{side}": v for side, results in found.items() for k, v in results[-1].items() if k != "rate"}
    print(
        json.dumps(
            {
                "benchmark": name,
                "vocabulary": vocabulary,
                **{k: round(v, 2) for k, v in medians.items()},
                "ratio": round(medians["ours"] / medians["peer"], 2),
                "ratios": [round(r, 2) for r in ratios(found["ours"], found["peer"])],
                "unit": unit,
                **extra,
                "allocator_of_peer": "as ours" if peer_environment else "default",
                "rounds": {side: [round(r["rate"], 2) for r in results] for side, results in found.items()},
            }
        ),
        flush=True,
    )


def here(file: str) -> str:
    """Returns the absolute path of a file."""
    return str(Path(file).resolve())


def word_tokenizer(size: int) -> Any:
    """Returns a tokenizer whose token i is the word `wi`, so that texts can be built from token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<eos>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
