"""The command line as a user sees it: its output, its exit codes, and the files that it writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, ROOT, instruction_rows, ledger

from myllm_ray import cli


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Runs `myllm-ray ...` in this process; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["myllm-ray", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.json").write_text(json.dumps(instruction_rows()))
    raw = {
        "trainer": "sft",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(tmp_path / "rows.json"), "format": "instruction"},
            "validation": {"split": 0.1},
            "sequence_length": 160,
        },
        "batch": {"global_size": 4, "micro_size": 2},
        "run": {"name": "r", "storage": str(tmp_path / "runs"), "max_steps": 3},
        "callbacks": ["console", "jsonl", "report"],
        "evaluation": {"at_start": True},
    }
    path = tmp_path / "c.json"
    path.write_text(json.dumps(raw))
    return path


def test_train_resume_sample_export(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, monkeypatch, "train", config)
    assert code == 0
    assert re.search(r"3 steps, validation loss \d\.\d+ at step 0 -> \d\.\d+ at step 3", out)
    folder = tmp_path / "runs" / "r"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "events.jsonl",
        "ledger.jsonl",
        "attempts.jsonl",
        "checkpoints",
        "model",
        "tokenizer",
        "report.html",
        "data_summary.json",
    }
    assert '"metric":"validation_loss"' in (folder / "report.html").read_text()

    code, _, err = call(capsys, monkeypatch, "train", config)
    assert code == 2
    assert "contains an earlier run: checkpoint.resume=auto resumes it" in err
    code, out, _ = call(capsys, monkeypatch, "train", config, "checkpoint.resume=auto", "run.max_steps=5")
    assert code == 0
    assert "resuming from step 3" in out
    assert [r["step"] for r in ledger(folder)] == [1, 2, 3, 4, 5]
    code, out, _ = call(
        capsys, monkeypatch, "train", config, "run.name=other", f"checkpoint.resume={folder}", "run.max_steps=7"
    )
    assert code == 0
    assert [r["step"] for r in ledger(tmp_path / "runs" / "other")] == [6, 7]

    code, out, _ = call(capsys, monkeypatch, "sample", folder, "-p", "### Instruction:", "--max-new-tokens", "5")
    assert code == 0
    assert "### Instruction:" in out
    code, _, _ = call(capsys, monkeypatch, "export", folder, tmp_path / "hf")
    assert code == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from myllm_ray.trained_model import open_run

    model, tokenizer = open_run(folder)
    ids = torch.tensor([tokenizer("hello")["input_ids"]])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(exported(ids).logits, model.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("hello")["input_ids"] == ids[0].tolist()
    code, _, err = call(capsys, monkeypatch, "export", folder, tmp_path / "hf")
    assert code == 2
    assert "exists" in err


def test_data_shows_what_training_sees(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, monkeypatch, "data", config)
    assert code == 0
    for piece in ("rows", "48", "tokens per document", "packing fills", "validation rows", "### Response:", "⟦"):
        assert piece in out
    code, out, _ = call(capsys, monkeypatch, "data", config, "--step", "2")
    shown = re.search(r"epoch 0, rows 4 to 7, tokens_hash (\w{16})", out)
    assert shown
    call(capsys, monkeypatch, "train", config)
    assert ledger(tmp_path / "runs" / "r")[1]["tokens_hash"] == shown.group(1)


def test_schema_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(capsys, monkeypatch, "schema")
    assert code == 0
    assert {"trainer", "sft", "pretrain", "optimizer", "include"} <= set(json.loads(out)["properties"])


def files(folder: Path) -> list[str]:
    return sorted(str(p) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimzer.lr=1"], "unknown key optimzer: did you mean optimizer?"),
        (["optimizer.name=adamm"], "optimizer.name: unknown name 'adamm'"),
        (["scheduler.name=cosin"], "did you mean cosine?"),
        (["trainer=stf"], "trainer: unknown name 'stf'; did you mean sft?"),
        (["accelerator.name=dpp"], "did you mean ddp?"),
        (["callbacks=[consol]"], "did you mean console?"),
        (["data.train.format=instuction"], "did you mean instruction?"),
        (["data.train.path=nowhere.json"], "nothing found at"),
        (["data.train.format=chat"], "row 0: field 'messages' must be a non-empty list"),
        (["batch.global_size=3"], "not divisible"),
        (["tokenizer={path: nowhere}"], "tokenizer.path: no folder"),
        (["model.config.hidden_sise=3"], "unknown key model.config.hidden_sise: did you mean hidden_size?"),
        (["model.config.model_type=lama"], "transformers has no model type 'lama'"),
        (["model.config.vocab_size=100"], "100 token embeddings, the tokenizer 260"),
        (["model.config.max_position_embeddings=100"], "exceeds the model's maximum of 100 positions"),
        (["model={name: ./nothing-here}"], "model.name: no folder './nothing-here'"),
        (["data.overflow=error", "data.sequence_length=32"], "more than data.sequence_length=32"),
        (["checkpoint.resume=/nowhere"], "checkpoint.resume: /nowhere is not a checkpoint"),
        (["run.storage=/proc/nowhere"], "can't be written"),
        (["optimizer.groups=[{pattern: zzz}]"], "matches no parameter"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_half_written(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    overrides: list[str],
    said: str,
) -> None:
    code, _, err = call(capsys, monkeypatch, "train", config, *overrides)
    assert code == 2, err
    line = err.strip().splitlines()
    assert len(line) == 1
    assert line[0].startswith("error: ")
    assert said in line[0]
    assert files(tmp_path / "runs" / "r") == [], "no half-written run"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.config.hidden_size=32"], "model.config.hidden_size was 64, now it is 32"),
        (["run.seed=1"], "run.seed was 0, now it is 1"),
        (["data.sequence_length=96"], "data.sequence_length was 160, now it is 96"),
        (["batch.global_size=8"], "batch.global_size has changed"),
        (["data.train.limit=10"], "the data itself"),
    ],
)
def test_a_resume_with_another_model_or_data_is_refused(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    overrides: list[str],
    said: str,
) -> None:
    call(capsys, monkeypatch, "train", config)
    before = {p: p.read_bytes() for p in (tmp_path / "runs" / "r").rglob("*") if p.is_file()}
    code, _, err = call(capsys, monkeypatch, "train", config, "checkpoint.resume=auto", "run.max_steps=6", *overrides)
    assert code == 2
    assert said in err
    assert {p: p.read_bytes() for p in (tmp_path / "runs" / "r").rglob("*") if p.is_file()} == before


def test_skipped_rows_are_counted_in_the_metrics(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = "".join(json.dumps(r) + "\n" for r in instruction_rows()) + '{"no": 1}\nbroken\n'
    (tmp_path / "rows.jsonl").write_text(rows)
    overrides = [f"data.train.path={tmp_path / 'rows.jsonl'}", "data.sequence_length=64"]
    code, _, err = call(capsys, monkeypatch, "train", config, *overrides)
    assert code == 2
    assert "rows.jsonl:49: no field 'output'" in err
    code, _, _ = call(capsys, monkeypatch, "train", config, *overrides, "data.on_bad_row=skip")
    assert code == 0
    last = json.loads((tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped_rows"] == 2
    assert last["long_documents"] > 0
    _, out, _ = call(capsys, monkeypatch, "data", config, *overrides, "data.on_bad_row=skip")
    assert "2 rows skipped" in out


def test_loss_per_source_is_logged(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sources = [
        {"path": str(tmp_path / "rows.json"), "format": "instruction", "name": name} for name in ("left", "right")
    ]
    code, _, err = call(capsys, monkeypatch, "train", config, f"data.train={json.dumps(sources)}")
    assert code == 0, err
    last: dict[str, Any] = json.loads((tmp_path / "runs" / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    low, high = sorted((last["loss/left"], last["loss/right"]))
    assert low <= last["loss"] <= high


@pytest.mark.parametrize("name", ["tiny_pretrain", "tiny_sft"])
def test_tiny_configs_run(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, err = call(
        capsys, monkeypatch, "train", ROOT / "configs" / f"{name}.yaml", f"run.storage={tmp_path}", "run.max_steps=4"
    )
    assert code == 0, err
    assert "done: 4 steps" in out


@pytest.mark.promise
def test_the_by_hand_example_runs_unchanged(tmp_path: Path) -> None:
    """The manually constructed run of the design page works in a plain script, and Ray is never imported."""
    shutil.copy(ROOT / "examples" / "by_hand.py", tmp_path)
    code = (tmp_path / "by_hand.py").read_text() + "\nimport sys\nassert 'ray' not in sys.modules\n"
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "done: 24 steps" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["by_hand.py"], "nothing is written without being asked for"
    saving = code.replace("CheckpointManager(trainer.model)", "CheckpointManager(trainer.model, folder='kept')")
    subprocess.run([sys.executable, "-c", saving], cwd=tmp_path, capture_output=True, check=True)
    assert (tmp_path / "kept" / "step-00000024" / "manifest.json").is_file()


def test_local_mode_never_imports_ray(config: Path, tmp_path: Path) -> None:
    code = (
        f"import sys\nfrom myllm_ray import train\nresult = train({str(config)!r})\n"
        "assert result.step == 3 and len(result.history) == 4\nassert 'ray' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.promise
def test_doctor_reports_what_works_and_exits() -> None:
    """Regression test: four runs of five hung, because a process group's destructor and a gloo thread deadlocked."""
    done = subprocess.run(
        [sys.executable, "-m", "myllm_ray.cli", "doctor"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for backend in ("single", "ddp", "fsdp", "accelerate", "deepspeed stage 3"):
        line = next(row for row in done.stdout.splitlines() if f"│ {backend}, fp32, cpu " in row)
        assert "yes" in line
