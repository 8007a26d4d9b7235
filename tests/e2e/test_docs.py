"""The README's commands and the Python code in the docs work as documented."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from e2e.test_cli import call
from myllm_ray.common.types import RunState
from myllm_ray.engine.callbacks import Callback


def blocks(path: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(), re.S | re.M)
    return [text for name, text in found if name == language]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a folder with the configs and the README, in which the commands write nothing to the checkout."""
    for name in ("configs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.promise
def test_readme_commands(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fork_server: None
) -> None:
    lines = [
        line
        for block in blocks("README.md", "")
        for line in block.splitlines()
        if line.startswith(".venv/bin/myllm-ray")
    ]
    assert len(lines) == 18
    for line in lines:
        code, out, err = call(capsys, monkeypatch, *shlex.split(line)[1:])
        assert code == 0, (line, err)
        assert out
    assert (elsewhere / "hf-model" / "config.json").is_file()


def test_the_pages_of_preferences_and_rollouts(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the commands of both pages with fewer steps, and the manually constructed run."""
    done = set()
    for page in ("docs/preferences.md", "docs/rollouts.md"):
        for line in blocks(page, "")[0].splitlines():
            if line not in done:
                done.add(line)
                short = (
                    ["run.max_steps=4", "evaluation.every_steps=4", "callbacks=[jsonl]"] if " train " in line else []
                )
                code, _out, err = call(capsys, monkeypatch, *shlex.split(line)[1:], *short)
                assert code == 0, (line, err)
    assert (elsewhere / "runs" / "dpo-demo" / "config.yaml").is_file()
    exec(blocks("docs/preferences.md", "python")[0], {})


def test_a_new_stage_as_the_page_says(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in next(b for b in blocks("docs/training.md", "") if "tiny_dpo" in b).splitlines():
        code, _out, err = call(capsys, monkeypatch, *shlex.split(line)[1:], "run.max_steps=2", "callbacks=[jsonl]")
        assert code == 0, (line, err)
    assert "runs/tiny-sft/checkpoints/step-00000002" in (elsewhere / "runs" / "tiny-dpo" / "config.yaml").read_text()


def test_the_page_lists_every_hook_and_every_field_of_the_state() -> None:
    """The page lists the hooks with their arguments."""
    page = (ROOT / "docs" / "training.md").read_text().partition("## Callbacks")[2].partition("\n## ")[0]
    hooks, state = page.split("`state` is a `RunState`")
    listed = [name for row in re.findall(r"^\| (`.*?) \|", hooks, re.M) for name in re.findall(r"`([^`]+)`", row)]
    own = [
        (name, method) for name, method in vars(Callback).items() if inspect.isfunction(method) and name != "__init__"
    ]
    assert listed == [f"{name}({', '.join(list(inspect.signature(method).parameters)[1:])})" for name, method in own]
    fields = [name for row in re.findall(r"^\| (`.*?) \|", state, re.M) for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(fields) == sorted([*(field.name for field in dataclasses.fields(RunState)), "request(what, reason)"])


def test_readme_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("README.md", "")), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_ci_runs_targets_that_exist_and_the_readmes_test_command() -> None:
    makefile, script = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text()
    targets = (
        next(line for line in script.splitlines() if line.startswith("for target in ")).removesuffix("; do").split()[3:]
    )
    assert targets[:2] == ["check", "test"]
    for target in targets:
        assert re.search(rf"^(?:[\w -]+ )?{target}(?: [\w -]+)?:", makefile, re.M), target


def test_readme_config_is_valid(tmp_path: Path) -> None:
    from myllm_ray import load_config

    (tmp_path / "c.yaml").write_text(blocks("README.md", "yaml")[0])
    assert load_config(tmp_path / "c.yaml").scaling.workers == 2


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if target.startswith("https://"):
                continue
            assert (page.parent / target).exists(), (page.name, target)


def test_readme_python(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("README.md", "python")[0], {})
    assert (elsewhere / "runs" / "tiny-sft" / "metrics.jsonl").is_file()
