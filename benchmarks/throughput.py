"""Compares the throughput of pretraining and SFT with a tuned bare loop, HF Trainer, TRL and Ray Train, on the CPU.

    pip install -e '.[bench]'
    python benchmarks/throughput.py [--rounds 5] [--documents 120] [--vocabulary 4k] [--workload sft]
                                    [--without ray] [--quiet SHARE] [--out FILE [--resume]]
    python benchmarks/throughput.py --check FILE       compare the ratios of a result with benchmarks/baseline.json

Every side trains the same Llama (6 layers of width 256) in fp32 with AdamW on the same documents for one epoch, with
about 1024 tokens per optimizer step. A rate is the number of tokens of the documents, without padding, per second,
from the end of the first step to the end of the last one but one: the last step has fewer documents, and myllm_ray
fills it up with empty rows. Each side is measured in a process of its own, and the sides are interleaved. A ratio is
that of one round; tables contain medians, with the smallest and the largest value.

With `--quiet 0.1` a side is measured again, up to two times, if other programs used more than 10 % of the CPU time.
The side `ray` is not, because processes of Ray count as other programs.

Other programs on the machine disturb a measurement. The column `undisturbed` is less affected: it is the ratio of the
largest rates over the rounds, where all steps of a run count with the first quartile of their times.

`--out` is written after each round. With `--resume` the rounds in that file are kept and only the missing ones are
measured, so several calls, for example one for each workload and vocabulary, give one file and one table.

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
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peers import ALLOCATOR, VOCABULARIES, here, interleave, measure, measure_undisturbed
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
    return {"rate": epoch.rate, "undisturbed": epoch.undisturbed, "steps": len(epoch.times), "peak_mb": memory}


def available(workload: str, without: Sequence[str]) -> list[str]:
    """Returns the sides of a workload whose libraries are installed, except those in `without`."""
    wanted = [s for s in SIDES[workload] if s not in without]
    sides = [s for s in wanted if importlib.util.find_spec(NEEDS.get(s, "torch")) is not None]
    for missing in sorted({NEEDS[s] for s in wanted if s not in sides}):
        print(f"{missing} is not installed and not measured: pip install -e '.[bench]'", file=sys.stderr)
    return sides


def measure_round(entry: dict[str, Any], quiet: float) -> None:
    """Measures each side of an entry of the results once more and updates the entry.

    Args:
        entry: The entry.
        quiet: See `measure_undisturbed`.
    """
    workload, vocabulary, sides = entry["workload"], entry["vocabulary"], entry["sides"]
    arguments = ("--workload", workload, "--documents", str(entry["documents"]))
    allocator = {side: ALLOCATOR if side in ("trl-allocator", "trl-packed") else None for side in sides}
    ways = {
        side: partial(
            measure_undisturbed,
            partial(measure, here(__file__), side, vocabulary, allocator[side], *arguments),
            1.0 if side == "ray" else quiet,
        )
        for side in (sides if rounds_of(entry) % 2 == 0 else reversed(list(sides)))
    }
    for side, (found,) in interleave(ways, 1).items():
        values = sides[side]
        values["rates"].append(round(found["rate"], 1))
        values["undisturbed"].append(round(found["undisturbed"], 1))
        values["others"].append(found["others"])
        values["steps"] = found["steps"]
        values["peak_mb"] = max(values["peak_mb"], found["peak_mb"])
    for values in sides.values():
        values["ratios"] = sorted(round(a / b, 3) for a, b in zip(sides["ours"]["rates"], values["rates"], strict=True))


def rounds_of(entry: dict[str, Any]) -> int:
    """Returns the number of rounds that an entry of the results contains."""
    return len(entry["sides"]["ours"]["rates"])


def entry_of(
    results: dict[str, Any], workload: str, vocabulary: str, count: int, without: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the entry of a workload and a vocabulary, which is added to the results if they have none.

    Raises:
        SystemExit: the entry has other sides or another number of documents.
    """
    sides = available(workload, without)
    for entry in results["results"]:
        if (entry["workload"], entry["vocabulary"]) == (workload, vocabulary):
            if list(entry["sides"]) != sides or entry["documents"] != count:
                sys.exit(
                    f"The file has {workload} {vocabulary} with {entry['documents']} documents and the sides "
                    f"{', '.join(entry['sides'])}; this call would measure {count} documents and the sides "
                    f"{', '.join(sides)}. Use another file."
                )
            found: dict[str, Any] = entry
            return found
    new: dict[str, dict[str, Any]] = {
        side: {"rates": [], "undisturbed": [], "others": [], "steps": 0, "peak_mb": 0, "ratios": []} for side in sides
    }
    entry = {"workload": workload, "vocabulary": vocabulary, "documents": count, "sides": new}
    results["results"].append(entry)
    return entry


def earlier(path: Path, this: dict[str, Any]) -> dict[str, Any]:
    """Returns the results in a file, or empty results if there is no file.

    Raises:
        SystemExit: the results are those of another machine or of other versions of the libraries.
    """
    if not path.is_file():
        return {"machine": this, "results": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["machine"] != this:
        sys.exit(f"{path} contains the results of another machine or of other versions: {found['machine']}")
    return {"machine": this, "results": found["results"]}


def save(results: dict[str, Any], path: Path | None) -> None:
    """Writes the results and their median ratios to a file."""
    if path:
        made = path.with_name(f"{path.name}.part")
        made.write_text(json.dumps({**results, "ratios": median_ratios(results)}, indent=1) + "\n", encoding="utf-8")
        made.replace(path)


def table(results: dict[str, Any]) -> str:
    """Returns the results as a table in Markdown."""
    machine = results["machine"]
    made = (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, TRL {machine['trl']}; interleaved rounds: median (smallest to largest)."
    )
    lines = [
        f"{textwrap.fill(made, 120)}\n",
        "| workload | vocabulary | | rounds | steps | tokens/s | myllm_ray / it | undisturbed | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in results["results"]:
        for side, values in found["sides"].items():
            rates, quotients = values["rates"], values["ratios"]
            compared = "|"
            if side != "ours":
                undisturbed = max(found["sides"]["ours"]["undisturbed"]) / max(values["undisturbed"])
                compared = (
                    f"{statistics.median(quotients):.2f} ({quotients[0]:.2f} to {quotients[-1]:.2f}) | "
                    f"{undisturbed:.2f}"
                )
            lines.append(
                f"| {found['workload']} | {found['vocabulary']} | {NAMES.get(side, 'myllm_ray')} | "
                f"{len(rates)} | {values['steps']} | "
                f"{statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | "
                f"{compared} | {values['peak_mb'] if side != 'ray' else ''} |"
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
    parser.add_argument("--without", nargs="*", choices=list(NAMES), default=[], help="sides that are not measured")
    parser.add_argument("--quiet", type=float, default=1.0, metavar="SHARE", help="largest CPU share of other programs")
    parser.add_argument("--out", type=Path, help="file for the results as JSON")
    parser.add_argument("--resume", action="store_true", help="keep the rounds that are in the file of --out")
    parser.add_argument("--check", type=Path, metavar="FILE", help="results to compare with the baseline")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(run_side(given.side, given.workload, given.vocabulary, given.documents)))
        return
    if given.check:
        worse = check(json.loads(given.check.read_text()), json.loads(BASELINE.read_text()))
        sys.exit("\n".join(worse) if worse else 0)
    if given.resume and not given.out:
        parser.error("--resume needs --out")
    this = machine()
    results = earlier(given.out, this) if given.resume else {"machine": this, "results": []}
    for workload in [given.workload] if given.workload else SIDES:
        for vocabulary in [given.vocabulary] if given.vocabulary else VOCABULARIES:
            entry = entry_of(results, workload, vocabulary, given.documents, given.without)
            while rounds_of(entry) < given.rounds:
                measure_round(entry, given.quiet)
                save(results, given.out)
    print(table(results))
    if not write_table(results, given.page):
        print(f"{given.page} has no line {BEGIN.strip()}: the table is not written", file=sys.stderr)


if __name__ == "__main__":
    main()
