"""The sections of a run's page. Each function returns None if the run has nothing to show there."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from myllm_ray.common.files import read_jsonl
from myllm_ray.common.flatten import flatten
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.reporting import evaluations
from myllm_ray.engine.reporting.attempts import Attempt, interventions
from myllm_ray.engine.reporting.config_values import config_values, show
from myllm_ray.engine.reporting.curves import Curves
from myllm_ray.engine.reporting.evaluations import EvaluationResult
from myllm_ray.engine.reporting.page import (
    Cell,
    Chart,
    Charts,
    Facts,
    Preview,
    Section,
    Table,
    Text,
    duration,
    large,
    number,
)

_SAMPLES, _SAMPLE_BYTES, _EVALUATIONS, _ATTEMPTS = 200, 150_000, 200, 200
_TIMES = re.compile(r"^time/|(?:^|[_/])seconds(?:$|/)|_seconds$")
_MEMORY = re.compile(r"memory|(?:^|[_/])bytes$")


def metrics(curves: Curves) -> Section | None:
    """First, last, lowest and highest value of each metric."""
    if not curves.series:
        return None
    rows, odd = [], 0
    for name in sorted(curves.series):
        found = curves.summary(name)
        odd += found["bad"]
        if "last" not in found:
            rows.append([Cell(name, "strong"), *[Cell("–")] * 6, Cell(f"{found['count']:,}"), _count(found["bad"])])
            continue
        (low, low_step), (high, high_step) = found["min"], found["max"]
        cells = [number(found["first"]), number(found["last"]), number(low), f"{low_step:,}"]
        cells += [number(high), f"{high_step:,}", f"{found['count']:,}"]
        rows.append([Cell(name, "strong"), *map(Cell, cells), _count(found["bad"])])
    columns = [("metric", False), ("first", True), ("last", True), ("lowest", True), ("at step", True)]
    columns += [("highest", True), ("at step", True), ("logged", True), ("not finite", True)]
    if not odd:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Section("Metrics", [Table("Metrics", columns, rows, filter="filter" if len(rows) > 12 else "")])


def _count(bad: int) -> Cell:
    return Cell(f"{bad:,}", "bad" if bad else "")


def timeline(folder: Path, attempts: Sequence[Attempt], curves: Curves) -> Section | None:
    """Starts and ends, interventions, and where the time went."""
    blocks: list[Any] = []
    if attempts:
        rows = []
        for attempt in attempts[-_ATTEMPTS:]:
            seconds, how = attempt.seconds, attempt.how or "no end recorded"
            rows.append(
                [
                    Cell(_moment(attempt.started)),
                    Cell(f"{attempt.first:,}"),
                    Cell("–" if attempt.last is None else f"{attempt.last:,}"),
                    Cell("–" if seconds is None else duration(seconds)),
                    Cell(how[:1000], "good" if how == "done" else ""),
                ]
            )
        columns = [("started (UTC)", False), ("from step", True), ("to step", True), ("duration", True), ("end", False)]
        blocks.append(Table("Starts and ends", columns, rows))
    found = interventions(folder)
    if found:
        rows = [
            [Cell(f"{row['step']:,}"), Cell(str(row.get("action", ""))), Cell(str(row.get("reason", "")))]
            for row in found[-_ATTEMPTS:]
        ]
        blocks.append(Table("Interventions", [("step", True), ("action", False), ("reason", False)], rows))
    blocks.extend(_time_and_memory(attempts, curves))
    return Section("Timeline", blocks) if blocks else None


def _time_and_memory(attempts: Sequence[Attempt], curves: Curves) -> list[Any]:
    facts = []
    known = [a.seconds for a in attempts if a.seconds is not None]
    if len(attempts) > 1 and known:
        between = sum(
            after.started - before.ended
            for before, after in pairwise(attempts)
            if before.ended is not None and after.started is not None
        )
        facts += [("training", duration(sum(known)), ""), ("between starts", duration(max(0.0, between)), "")]
    for name in sorted(curves.series):
        if _MEMORY.search(name) and "last" in (found := curves.summary(name)):
            value, step = found["max"]
            facts.append((f"highest {name.replace('_', ' ')}", large(value), f"step {step:,}"))
    blocks: list[Any] = [Facts(facts)] if facts else []
    times = {name: curves.points(name)[1] for name in sorted(curves.series) if _TIMES.search(name)}
    means = {name: float(v[v == v].mean()) for name, v in times.items() if (v == v).any()}
    if means:
        bars: dict[str, Any] = {"type": "bar", "orientation": "h", "y": list(means), "x": list(means.values())}
        bars |= {"marker": {"color": "$c0"}, "hovertemplate": "%{y}: %{x:.4~g} s<extra></extra>"}
        layout = {"xaxis": {"title": "seconds"}, "yaxis": {"automargin": True}}
        blocks.append(Charts("", [Chart("Mean time of a step", figure={"data": [bars], "layout": layout})]))
    return blocks


def _moment(seconds: float | None) -> str:
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def evaluation(curves: Curves, results: Sequence[EvaluationResult] = ()) -> Section | None:
    """The values on held-out data, one row for each evaluation, and the results of `myllm-ray evaluate`."""
    blocks, note = _held_out(curves)
    found = evaluations.table(results)
    blocks = blocks if found is None else [*blocks, found]
    return Section("Evaluation", blocks, note) if blocks else None


def _held_out(curves: Curves) -> tuple[list[Any], str]:
    """Returns the table of the values on held-out data, and a note."""
    names = [name for name in sorted(curves.series) if name.startswith("validation_")]
    if not names:
        return [], ""
    names.sort(key=lambda name: name != "validation_loss")
    values: dict[int, dict[str, float]] = {}
    for name in names:
        for step, value in zip(*(part.tolist() for part in curves.points(name)), strict=True):
            values.setdefault(step, {})[name] = value
    best = curves.summary(names[0]).get("min", (None, None))[1] if names[0] == "validation_loss" else None
    kept = sorted(values)
    omitted = max(0, len(kept) - _EVALUATIONS)
    kept = [step for place, step in enumerate(kept) if step == best or place >= omitted]
    rows = [
        [
            Cell(f"{step:,}", "strong"),
            *(
                Cell(number(values[step].get(name)), "good" if step == best and name == names[0] else "")
                for name in names
            ),
        ]
        for step in kept
    ]
    columns = [("step", True), *((name.removeprefix("validation_").replace("_", " "), True) for name in names)]
    note = f"The last {_EVALUATIONS} evaluations and the best one." if omitted else ""
    return [Table("Evaluations on held-out data", columns, rows)], note


def samples(folder: Path) -> Section | None:
    """The newest sampled answers."""
    rows = list(read_jsonl(folder / "samples.jsonl"))
    if not rows:
        return None
    kept: list[dict[str, Any]] = []
    size = 0
    for row in reversed(rows):
        size += sum(len(str(value).encode()) for value in row.values())
        if len(kept) >= _SAMPLES or (kept and size > _SAMPLE_BYTES):
            break
        kept.append(row)
    names = list(dict.fromkeys(name for row in kept for name in row))
    numeric = {n: all(_is_number(row.get(n)) for row in kept if row.get(n) is not None) for n in names}
    shown = [[_sample(row.get(name), numeric[name]) for name in names] for row in kept]
    note = "Newest first." if len(kept) == len(rows) else f"The newest {len(kept):,} of {len(rows):,}."
    columns = [(name.replace("_", " "), numeric[name]) for name in names]
    return Section("Samples", [Table("Samples", columns, shown, filter="filter")], note)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sample(value: Any, numeric: bool) -> Cell:
    if value is None:
        return Cell("–")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if numeric:
        return Cell(number(value))
    text = value if isinstance(value, str) else show(value)
    return Cell(text[:2000] + ("…" if len(text) > 2000 else ""), "text" if len(text) > 24 else "")


def data(found: Mapping[str, Any]) -> Section | None:
    """What the training data is (`data_summary.json`)."""
    if not found:
        return None
    sampled = found.get("sampled_documents")
    mixed = "run_rows" in found
    rows, steps = (found["run_rows"], found["run_steps"]) if mixed else (found["rows"], found["steps"])
    facts = [
        ("documents", f"{found['documents']:,}", ""),
        ("tokens", large(found["tokens"]), ""),
        (
            "rows of the run" if mixed else "rows per epoch",
            f"{rows:,}",
            f"{_plural(steps, 'step')}, {found['row_tokens']:,} tokens a row",
        ),
        ("packing efficiency", f"{found['efficiency']:.1%}", found.get("packing") or ""),
        ("trained tokens", f"{found['trained_share']:.1%}", "of all tokens"),
        ("longer than a row", f"{found['longer_than_row']:.1%}", "of the documents"),
        ("skipped rows", f"{sum(s['skipped'] for s in found['sources']):,}", ""),
        ("validation rows", f"{found['validation_rows']:,}", ""),
    ]
    blocks: list[Any] = [Facts(facts)]
    if sampled:
        blocks.append(
            Text(f"Shares and lengths are those of {sampled:,} documents that are spread over all of them.", "note")
        )
    blocks.extend(Text(note, "warning") for note in found.get("notes", []))
    first = next((n for n, (*_, count) in enumerate(found["histogram"]) if count), 0)
    bins = found["histogram"][first:]
    names = [f"{low:,}–{high:,}" if high > low else f"{low:,}" for low, high, _ in bins]
    bars = {"type": "bar", "x": names, "y": [count for *_, count in bins], "marker": {"color": "$c0"}}
    bars |= {"hovertemplate": "%{x} tokens: %{y:,} documents<extra></extra>"}
    layout = {
        "xaxis": {"title": "tokens", "type": "category", "showgrid": False},
        "yaxis": {"title": "documents", "tickformat": "~s"},
        "bargap": 0.12,
    }
    blocks.append(
        Charts("", [Chart("Length of documents", figure={"data": [bars], "layout": layout}, wide=len(names) > 8)])
    )
    numbers = ["documents", "tokens", "skipped rows", "duplicates", *(["share of the run", "passes"] if mixed else [])]
    columns = [("source", False), *((name, True) for name in numbers)]
    cells = [
        [
            Cell(str(s["name"]), "strong"),
            Cell(f"{s['documents']:,}"),
            Cell(f"{s['tokens']:,}"),
            _count(s["skipped"]),
            Cell(f"{s['duplicates']:,}"),
            *([Cell(f"{s['share']:.1%}"), Cell(f"{s['passes']:.3g}")] if mixed else []),
        ]
        for s in found["sources"]
    ]
    blocks.append(Table("Sources", columns, cells))
    blocks.extend(
        Text(f"{s['name']}: the first skipped row: {s['first_skipped']}", "warning")
        for s in found["sources"]
        if s["skipped"]
    )
    if found.get("preview"):
        blocks.append(Text("The first rows of the first epoch. Tokens that are trained on have a background.", "note"))
        blocks.append(Preview([_preview(row) for row in found["preview"]]))
    return Section("Data", blocks)


def _preview(row: Mapping[str, Any]) -> tuple[str, list[tuple[str, str, bool]]]:
    label = f", {row['label']}" if row.get("label") else ""
    title = f"row {row['row']}: {_plural(row['tokens'], 'token')}, {_plural(len(row['documents']), 'document')}{label}"
    return title, [(str(part), str(text), bool(trained)) for part, text, trained in row["pieces"]]


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def config(raw: Mapping[str, Any]) -> Section | None:
    """All values of the config; those that differ from their default are marked."""
    if not raw:
        return None
    values, known = config_values(raw)
    rows = [
        [
            Cell(v.key, "key"),
            Cell(v.value[:2000], "mark" if v.differs else ""),
            Cell("–" if v.default is None else v.default),
        ]
        for v in values
    ]
    columns = [("key", False), ("value", False), ("default", False)]
    if not known:
        columns, rows = columns[:2], [row[:2] for row in rows]
        note = "The defaults are not known: this version can't validate the config."
        return Section("Config", [Table("Config", columns, rows, filter="filter")], note)
    return Section("Config", [Table("Config", columns, rows, filter="filter", marked_only="only what is not default")])


def environment(found: Mapping[str, Any]) -> Section | None:
    """Versions, hardware and the command (`environment.json`)."""
    if not found:
        return None
    rows = [
        [Cell(key, "strong"), Cell(" ".join(map(str, value)) if isinstance(value, list) else show(value)[:2000])]
        for key, value in flatten(found).items()
        if value is not None
    ]
    return Section("Environment", [Table("Environment", [("what", False), ("value", False)], rows)])


def checkpoints(folder: Path) -> Section | None:
    """The checkpoints in the folder, with their sizes."""
    found = CheckpointManager(folder=folder / "checkpoints").all()
    if not found:
        return None
    rows = []
    for path in found:
        size = sum(file.stat().st_size for file in sorted(path.iterdir()) if file.is_file())
        written = (path / "manifest.json").stat().st_mtime
        cells = [f"{int(path.name.rpartition('-')[2]):,}", _bytes(size), _moment(written), path.name]
        rows.append([Cell(text) for text in cells])
    columns = [("step", True), ("size", True), ("written (UTC)", False), ("folder", False)]
    return Section("Checkpoints", [Table("Checkpoints", columns, rows)])


def _bytes(size: int) -> str:
    power = min(int(math.log(max(size, 1), 1000)), 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
