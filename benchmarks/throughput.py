"""Compares the throughput of pretraining and SFT with a tuned bare loop, HF Trainer, TRL and Ray Train, on the CPU.

    pip install -e '.[bench]'
    python benchmarks/throughput.py [--rounds 5] [--documents 120] [--vocabulary 4k] [--workload sft] [--out FILE]
    python benchmarks/throughput.py --check FILE       compare the ratios of a result with benchmarks/baseline.json

Every side trains the same Llama (6 layers of width 256) in fp32 with AdamW on the same documents for one epoch, with
about 1024 tokens per optimizer step. A rate is the number of tokens of the documents, without padding, per second,
from the end of the first step to the end of the last one. Each side is measured in a process of its own, and the sides
are interleaved. A ratio is that of one round; tables contain medians, with the smallest and the largest value.

Sides:
    ours            `myllm_ray train` in this process, without callbacks
    bare            a loop in plain PyTorch: packed rows, the head only at targets, fused AdamW, our allocator settings
    hf              transformers' Trainer; in SFT with padded rows
    trl             TRL's SFTTrainer with padded rows, its default
    trl-allocator   the same with our allocator settings
    trl-packed      TRL's SFTTrainer with packing, with our allocator settings
    ray             the bare loop in a TorchTrainer of Ray with one worker, pretraining only
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import resource
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from peers import ALLOCATOR, VOCABULARIES, here, interleave, measure, ratios
from sides import bare, documents, in_ray, ours, threads, with_trainer

BASELINE = Path(__file__).with_name("baseline.json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- table: make bench -->\n", "<!-- end of table: make bench -->\n"
TOLERANCE = 0.15
"""Largest relative loss of a ratio that `--check` accepts."""
SIDES = {
    "pretrain": ("ours", "bare", "hf", "ray"),
    "sft": ("ours", "bare", "hf", "trl", "trl-allocator", "trl-packed"),
}
NEEDS = {"trl": "trl", "trl-allocator": "trl", "trl-packed": "trl", "hf": "accelerate", "ray": "ray"}
"""Modules that a side needs."""
NAMES = {
    "bare": "tuned bare loop",
    "hf": "HF Trainer",
    "trl": "TRL",
    "trl-allocator": "TRL, our allocator settings",
    "trl-packed": "TRL, packed, our allocator settings",
    "ray": "Ray TorchTrainer with the bare loop",
}


def run_side(side: str, workload: str, vocabulary: str, count: int) -> dict[str, Any]:
    """Runs one side and returns its rate, its steps and its peak memory in MB."""
    from myllm_ray.common.allocator import keep_large_blocks

    made = documents(vocabulary, count)
    if side == "bare":
        keep_large_blocks()
    with tempfile.TemporaryDirectory() as name:
        if side == "ours":
            epoch = ours(workload, vocabulary, made, Path(name))
        elif side == "bare":
            epoch = bare(workload, vocabulary, made)
        elif side == "ray":
            epoch = in_ray(vocabulary, made, Path(name), threads())
        else:
            epoch = with_trainer(side, workload, vocabulary, made, Path(name))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"rate": epoch.rate, "steps": len(epoch.times), "peak_mb": memory}


def compare_workload(workload: str, vocabulary: str, rounds: int, count: int) -> dict[str, Any]:
    """Measures all sides of a workload that are installed and returns their rates and ratios."""
    sides = [s for s in SIDES[workload] if importlib.util.find_spec(NEEDS.get(s, "torch")) is not None]
    for missing in sorted({NEEDS[s] for s in SIDES[workload] if s not in sides}):
        print(f"{missing} is not installed and not measured: pip install -e '.[bench]'", file=sys.stderr)
    arguments = ("--workload", workload, "--documents", str(count))
    found = interleave(
        {
            side: partial(
                measure,
                here(__file__),
                side,
                vocabulary,
                ALLOCATOR if side in ("trl-allocator", "trl-packed") else None,
                *arguments,
            )
            for side in sides
        },
        rounds,
    )
    return {
        "workload": workload,
        "vocabulary": vocabulary,
        "sides": {
            side: {
                "rates": [round(r["rate"], 1) for r in results],
                "steps": results[-1]["steps"],
                "peak_mb": max(r["peak_mb"] for r in results),
                "ratios": [round(r, 3) for r in ratios(found["ours"], results)],
            }
            for side, results in found.items()
        },
    }


def table(results: dict[str, Any]) -> str:
    """Returns the results as a table in Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, TRL {machine['trl']}; {results['rounds']} interleaved rounds: median (smallest to "
        "largest).\n",
        "| workload | vocabulary | | tokens/s | myllm_ray / it | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for found in results["results"]:
        for side, values in found["sides"].items():
            rates, quotients = values["rates"], values["ratios"]
            ratio = f"{statistics.median(quotients):.2f} ({quotients[0]:.2f} to {quotients[-1]:.2f})"
            lines.append(
                f"| {found['workload']} | {found['vocabulary']} | {NAMES.get(side, 'myllm_ray')} | "
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | "
                f"{'' if side == 'ours' else ratio} | {values['peak_mb'] if side != 'ray' else ''} |"
            )
    return "\n".join(lines) + "\n"


def write_table(results: dict[str, Any], page: Path) -> bool:
    """Writes the table between the markers of a page and returns whether the page has them."""
    old = page.read_text(encoding="utf-8") if page.is_file() else ""
    if BEGIN not in old or END not in old:
        return False
    before, _, rest = old.partition(BEGIN)
    page.write_text(before + BEGIN + table(results) + END + rest.partition(END)[2], encoding="utf-8")
    return True


def check(results: dict[str, Any], baseline: dict[str, float]) -> list[str]:
    """Returns a line for each median ratio that is more than `TOLERANCE` below the baseline."""
    found = median_ratios(results)
    return [
        f"{name}: {found[name]:.2f} times the peer's rate, {was:.2f} in the baseline"
        for name, was in baseline.items()
        if name in found and found[name] < (1 - TOLERANCE) * was
    ]


def median_ratios(results: dict[str, Any]) -> dict[str, float]:
    """Returns the median ratios to the peers, by `workload/vocabulary/side`."""
    return {
        f"{found['workload']}/{found['vocabulary']}/{side}": round(statistics.median(values["ratios"]), 3)
        for found in results["results"]
        for side, values in found["sides"].items()
        if side != "ours"
    }


def machine() -> dict[str, Any]:
    """Returns the CPU, the number of threads and the versions of the libraries."""
    from importlib import metadata

    def version(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return {
        "cpu": named[1] if named else platform.machine(),
        "threads": threads(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }


def main() -> None:
    """Runs the comparisons, one side with `--side`, or the check with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=120)
    parser.add_argument("--vocabulary", choices=list(VOCABULARIES))
    parser.add_argument("--workload", choices=list(SIDES))
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose table is replaced, if it has the markers")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="results to compare with the baseline")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run_side(given.side, given.workload, given.vocabulary, given.documents)))
        return
    if given.check:
        worse = check(json.loads(given.check.read_text()), json.loads(BASELINE.read_text()))
        sys.exit("\n".join(worse) if worse else 0)
    results = {
        "machine": machine(),
        "rounds": given.rounds,
        "results": [
            compare_workload(workload, vocabulary, given.rounds, given.documents)
            for workload in ([given.workload] if given.workload else SIDES)
            for vocabulary in ([given.vocabulary] if given.vocabulary else VOCABULARIES)
        ],
    }
    print(table(results))
    if not write_table(results, given.page):
        print(f"{given.page} has no line {BEGIN.strip()}: the table is not written", file=sys.stderr)
    if given.out:
        given.out.write_text(json.dumps({**results, "ratios": median_ratios(results)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
