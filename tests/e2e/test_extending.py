"""The components of docs/extending.md, each in one file: trained, refused with a suggestion, and in the schema."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, comparable

from e2e.test_cli import call
from e2e.test_docs import blocks
from myllm_ray.config import ConfigError, validate
from myllm_ray.config.load import merge

PAGE = "docs/extending.md"
BASE = {
    "trainer": "sft",
    "model": {"factory": "bigram:build", "options": {"vocab_size": 260}},
    "tokenizer": {"kind": "bytes"},
    "data": {"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "sequence_length": 32},
    "batch": {"global_size": 2},
    "optimizer": {"lr": 0.05},
    "callbacks": ["jsonl"],
    "run": {"name": "base", "max_steps": 4},
}
OPTIONS = {
    "my_trainer": ("options", "z_weight", "trainer", "my_trainer:ZLossTrainer"),
    "my_accelerator": ("accelerator.options", "noise", "accelerator", "my_accelerator:NoisyAccelerator"),
    "my_callback": ("callbacks.my_callback:StopAtLoss", "below", "callback", "my_callback:StopAtLoss"),
    "my_tracker": ("tracking.my_tracker:CSVTracker", "csv_file", "tracker", "my_tracker:CSVTracker"),
    "my_format": ("data.train.options", "prefix", "format", "my_format:QuestionAnswer"),
}
"""By module: the key of its options, one option, and how `myllm-ray schema` takes it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns a folder with the files of the page, in which the commands run."""
    for code in blocks(PAGE, "python"):
        name = re.match(r"# (\w+)\.py\n", code)
        assert name is not None
        (tmp_path / f"{name[1]}.py").write_text(code)
    rows = [{"question": f"{i}?", "answer": str(i), "prompt": f"{i}?", "completion": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "custom_trainer"))
    yield tmp_path
    for name in OPTIONS:
        sys.modules.pop(name, None)


def changes(module: str) -> dict:
    """Returns the page's change of a config for one component."""
    return next(found for text in blocks(PAGE, "yaml") if module in text for found in [yaml.safe_load(text)])


def train(folder: Path, name: str, change: dict, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> list:
    config = merge(merge(BASE, change), {"run": {"name": name}})
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    code, _, err = call(capsys, patch, "train", f"{name}.yaml")
    assert code == 0, err
    return comparable(folder / "runs" / name)


@pytest.mark.parametrize("module", OPTIONS)
def test_a_component_of_the_page(
    module: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    key, option, flag, path = OPTIONS[module]
    plain = train(folder, "plain", {}, capsys, monkeypatch)
    change = changes(module)
    rows = train(folder, module, change, capsys, monkeypatch)
    if module == "my_callback":
        assert len(rows) < len(plain), "the callback stops the run"
    elif module == "my_tracker":
        assert rows == plain, "a tracker does not change the run"
        sent = [line.split(",") for line in (folder / "losses.csv").read_text().splitlines()]
        assert [(run, int(step), float(loss)) for run, step, loss in sent] == [
            ("llm/my_tracker", row["step"], row["loss"]) for row in rows
        ]
    else:
        assert rows[-1]["loss"] != plain[-1]["loss"], "the component changes the run"
    misspelt = json.loads(json.dumps(change).replace(f'"{option}"', f'"{option}s"'))
    with pytest.raises(ConfigError, match=rf"{re.escape(key)}.*{option}s: did you mean .*{option}\?"):
        validate(merge(BASE, misspelt))
    (folder / "wrong.yaml").write_text(yaml.safe_dump(merge(merge(BASE, misspelt), {"run": {"name": "wrong"}})))
    code, _, err = call(capsys, monkeypatch, "train", "wrong.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert not (folder / "runs" / "wrong").exists()
    code, out, _ = call(capsys, monkeypatch, "schema", f"--{flag}", path)
    assert code == 0
    assert f'"{option}"' in out
    assert f'"{option}"' not in (ROOT / "configs" / "schema.json").read_text()
