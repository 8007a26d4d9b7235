"""The parts of the benchmarks that measure nothing: the rows of the peers, ratios, tables and the comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import throughput
from one_gpu import flops_per_token
from peers import interleave, measure_undisturbed, ratios
from sides import LENGTH, Epoch, documents, epoch_of, rows_of


def result(*quotients: float, side: str = "trl") -> dict[str, Any]:
    values = {
        "rates": [100.0, 130.0],
        "undisturbed": [110.0, 140.0],
        "steps": 3,
        "peak_mb": 900,
        "ratios": sorted(quotients),
    }
    ours = {**values, "undisturbed": [420.0, 400.0], "ratios": [1.0]}
    return {
        "machine": {"cpu": "a CPU", "threads": 2, "torch": "2", "transformers": "5", "trl": "1"},
        "results": [{"workload": "sft", "vocabulary": "4k", "documents": 9, "sides": {"ours": ours, side: values}}],
    }


def test_sides_alternate_and_ratios_are_those_of_a_round() -> None:
    order: list[str] = []
    values = {"a": iter([{"rate": 6.0}, {"rate": 2.0}]), "b": iter([{"rate": 3.0}, {"rate": 4.0}])}

    def one(name: str) -> dict[str, Any]:
        order.append(name)
        return next(values[name])

    found = interleave({name: lambda name=name: one(name) for name in values}, 2)
    assert order == ["a", "b", "b", "a"]
    assert ratios(found["a"], found["b"]) == [0.5, 2.0]


def test_the_rows_of_the_peers_contain_every_document_once() -> None:
    made = documents("4k", 20)
    total = sum(len(p) + len(a) for p, a in made)
    for workload in ("pretrain", "sft"):
        rows = rows_of(workload, made)
        assert all(len(values) == LENGTH for row in rows for values in row.values())
        ids = [t for row in rows for t in row["input_ids"]]
        if workload == "pretrain":
            assert ids[:total] == [t for p, a in made for t in (*p, *a)]
            assert len(rows) == -(-total // LENGTH)
        # A document starts at position 0 and its first token has no label.
        starts = [(r, i) for r in rows for i, p in enumerate(r["position_ids"]) if p == 0 and r["labels"][i] != -100]
        assert workload == "pretrain" or not starts
        answers = [t for row in rows for t in row["labels"] if t != -100]
        if workload == "sft":
            assert answers == [t for _, a in made for t in a]
    assert Epoch([0.0, 1.0, 2.0, 3.0, 9.0], 40.0).undisturbed == 10.0
    epoch = epoch_of(made, [5.0, 6.0, 8.0, 8.5], 17, 5)  # steps of 5, 5, 5 and 2 examples
    assert epoch.rate == pytest.approx(total * 10 / 17 / 3)


def test_a_ratio_far_below_the_baseline_is_reported() -> None:
    baseline = {"sft/4k/trl": 2.0, "sft/4k/absent": 3.0}
    assert throughput.check(result(1.6, 1.75, 1.9), baseline) == []
    (line,) = throughput.check(result(1.5, 1.6, 1.9), baseline)
    assert line == "sft/4k/trl: 1.60 times the peer's rate, 2.00 in the baseline"


def test_the_table_replaces_the_one_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{throughput.BEGIN}old\n{throughput.END}after\n")
    assert throughput.write_table(result(2.0, 3.0, 4.0), page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| sft | 4k | TRL | 2 | 3 | 115 (100 to 130) | 3.00 (2.00 to 4.00) | 3.00 | 900 |" in text
    page.write_text("no markers")
    assert not throughput.write_table(result(2.0), page)
    assert page.read_text() == "no markers"


def test_missing_rounds_are_added_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def made(rate: float, memory: int) -> dict[str, Any]:
        return {"rate": rate, "undisturbed": rate + 1, "steps": 7, "peak_mb": memory, "others": 0.0}

    monkeypatch.setattr(throughput, "SIDES", {"pretrain": ("ours", "bare"), "sft": ("ours", "bare")})
    monkeypatch.setattr(throughput, "measure", lambda script, side, *_: order.append(side) or measured[side])
    page, file = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(throughput.BEGIN + throughput.END)

    def call(*arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["throughput", "--page", str(page), "--out", str(file), *arguments])
        throughput.main()
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    measured = {"ours": made(9.0, 2), "bare": made(10.0, 3)}
    call("--workload", "sft", "--vocabulary", "4k", "--rounds", "1")
    measured = {"ours": made(8.0, 1), "bare": made(4.0, 3)}
    call("--workload", "sft", "--vocabulary", "4k", "--rounds", "2", "--resume")
    assert order == ["ours", "bare", "bare", "ours"]
    found = call("--workload", "pretrain", "--vocabulary", "gpt2", "--rounds", "1", "--resume")
    assert found["results"][0]["sides"] == {
        "ours": {
            "rates": [9.0, 8.0],
            "undisturbed": [10.0, 9.0],
            "others": [0.0, 0.0],
            "steps": 7,
            "peak_mb": 2,
            "ratios": [1.0, 1.0],
        },
        "bare": {
            "rates": [10.0, 4.0],
            "undisturbed": [11.0, 5.0],
            "others": [0.0, 0.0],
            "steps": 7,
            "peak_mb": 3,
            "ratios": [0.9, 2.0],
        },
    }
    assert found["ratios"] == {"sft/4k/bare": 1.45, "pretrain/gpt2/bare": 2.0}
    assert "| sft | 4k | tuned bare loop | 2 | 7 |" in page.read_text()
    assert "| pretrain | gpt2 | tuned bare loop | 1 | 7 |" in page.read_text()
    with pytest.raises(SystemExit, match="sft 4k with 120 documents"):
        call("--workload", "sft", "--vocabulary", "4k", "--documents", "60", "--resume")
    assert len(call("--workload", "sft", "--vocabulary", "4k", "--rounds", "1")["results"]) == 1


def test_a_side_is_measured_until_other_programs_are_quiet() -> None:
    shares = iter([0.5, 0.2, 0.05, 0.0])
    assert measure_undisturbed(lambda: {"others": next(shares)}, 0.1)["others"] == 0.05
    assert next(shares) == 0.0
    shares = iter([0.5, 0.2, 0.4])
    assert measure_undisturbed(lambda: {"others": next(shares)}, 0.1, attempts=3)["others"] == 0.2


def test_results_of_another_machine_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps(result(2.0)))
    with pytest.raises(SystemExit, match="another machine"):
        throughput.earlier(file, {"cpu": "another", "threads": 1})
    assert throughput.earlier(file, result(2.0)["machine"])["results"] == result(2.0)["results"]


def test_flops_of_a_token_by_hand() -> None:
    """Llama 3.2 1B: 973 M parameters in its layers and 263 M in its head; documents of 1000 tokens."""
    matrices = 16 * (2048 * 2048 * 2 + 2048 * 512 * 2 + 3 * 2048 * 8192) + 2048 * 128256
    assert flops_per_token([[0] * 1000] * 3) == 6 * matrices + 6 * 16 * 2048 * 1000
