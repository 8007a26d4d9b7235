"""`myllm-ray evaluate`: the losses of runs and exports, answers, win rates, kept results, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA, instruction_rows

from e2e.test_cli import call
from myllm_ray.config import validate
from myllm_ray.worker import run_local

PROMPTS = [{"prompt": f"say {word} ", "answer": word, "number": i} for i, word in enumerate(["red", "green", "blue"])]


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "trainer": "sft",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(folder / "rows.json"), "format": "instruction"},
            "validation": {"path": str(folder / "held.json"), "format": "instruction"},
            "sequence_length": 160,
        },
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"name": name, "storage": str(folder / "runs"), "max_steps": 4},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"every_steps": 2},
        "callbacks": ["jsonl"],
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, two runs of a language model, an export, and a run of a reward model."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "rows.json").write_text(json.dumps(instruction_rows()))
    (folder / "held.json").write_text(json.dumps(instruction_rows(7, seed=5)))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("hé llo", "worlds apart")))
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    pairs = [{"prompt": f"say {i} ", "chosen": "aa", "rejected": "b" * (i + 1)} for i in range(4)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    run_local(validate(settings(folder, "own")))
    run_local(
        validate(
            settings(folder, "other", run={"name": "other", "storage": str(folder / "runs"), "max_steps": 2, "seed": 3})
        )
    )
    data = {"train": {"path": str(folder / "pairs.json"), "format": "preference"}, "sequence_length": 160}
    run_local(validate(settings(folder, "judge", trainer="reward", data=data)))
    return folder


def evaluated(capsys: Any, monkeypatch: Any, *arguments: Any) -> list[dict[str, Any]]:
    code, out, err = call(capsys, monkeypatch, "evaluate", *arguments, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)
    return found


def validation(folder: Path, step: int) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["step"] == step and "validation_loss" in row)


def test_every_checkpoint_has_the_validation_metrics_of_the_run(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "runs" / "own"
    arguments = ("--data", place / "held.json", "--format", "instruction", "--all-checkpoints")
    found = evaluated(capsys, monkeypatch, run, *arguments, "--batch-size", 3)
    assert [result["step"] for result in found] == [2, 4]
    for result in found:
        recorded = validation(run, result["step"])
        for name in ("loss", "perplexity", "token_accuracy", "bits_per_byte"):
            assert result["metrics"][name] == pytest.approx(recorded[f"validation_{name}"], rel=1e-6), name
    assert found[0]["metrics"]["loss"] != found[1]["metrics"]["loss"]
    packed = evaluated(capsys, monkeypatch, run, *arguments[:4], "--packing")
    assert packed[0]["metrics"]["loss"] == pytest.approx(found[1]["metrics"]["loss"], rel=1e-6)
    code, out, err = call(capsys, monkeypatch, "evaluate", run, place / "runs" / "other", *arguments[:4])
    assert code == 0, err
    assert "read from" in out
    assert "perplexity" in out
    assert "runs/other" in out
