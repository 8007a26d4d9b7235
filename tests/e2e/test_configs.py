"""Every file in configs/ runs in a fresh clone, or its first line names the run that it starts from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl

from e2e.test_cli import call

TINY = sorted(path.name for path in (ROOT / "configs").glob("tiny_*.yaml"))
OTHERS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("tiny_"))
SHORT = [
    "run.max_steps=4",
    "run.epochs=null",
    "scaling.workers=0",
    "callbacks=[jsonl]",
    "evaluation.every_steps=null",
    "evaluation.max_batches=1",
    "checkpoint.every_steps=null",
]
SMALL = [
    "model.config.num_hidden_layers=1",
    "model.config.hidden_size=96",
    "model.config.intermediate_size=64",
    "data.train.limit=100",
    "accelerator.name=single",
    "accelerator.precision=fp32",
]


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder that resembles a fresh clone, in which nothing has run yet."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for name in ("MODEL", "DATA", "TOKENIZER"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, *overrides: str) -> None:
    code, _, err = call(capsys, monkeypatch, "train", f"configs/{name}", *SHORT, *overrides)
    assert code == 0, (name, err)


@pytest.mark.parametrize(
    "name",
    [
        "tiny_pretrain.yaml",
        "tiny_sft.yaml",
        "tiny_dpo.yaml",
        "tiny_reward.yaml",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in TINY
            if name not in ("tiny_pretrain.yaml", "tiny_sft.yaml", "tiny_dpo.yaml", "tiny_reward.yaml")
        ),
    ],
)
def test_a_tiny_config_runs(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run(capsys, monkeypatch, name)
    assert len(read_jsonl(next(fresh.glob("runs/*/metrics.jsonl")))) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_config_runs_small(
    fresh: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = (ROOT / "configs" / name).read_text().splitlines()[0]
    needed = re.fullmatch(r"# Begins from the run runs/[\w-]+: myllm-ray train configs/(\w+\.yaml)", first)
    if needed:
        code, _, err = call(capsys, monkeypatch, "train", f"configs/{name}", *SHORT)
        assert code == 2, "the first line says what is missing"
        assert "runs/brackets-sft" in err
        run(capsys, monkeypatch, needed[1])
    run(capsys, monkeypatch, name, *([] if needed else SMALL))


def test_no_config_names_a_file_that_a_clone_does_not_have() -> None:
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        text = path.read_text()
        for found in re.findall(r"path: [\"']?([^\s,}\"']+)", re.sub(r"^\s*#.*$", "", text, flags=re.M)):
            assert (ROOT / found).exists(), (path.name, found)
