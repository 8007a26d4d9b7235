"""`myllm-ray explain`: finds planted differences of two runs, and names the cause and its evidence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, MakeConfig, instruction_rows
from spawned import run_all

from myllm_ray import cli
from myllm_ray.config import ConfigError
from myllm_ray.runs.explain import explain
from myllm_ray.runs.explanation import Explanation
from myllm_ray.runs.folder import RunFolder
from myllm_ray.worker import run_local

GPT2 = (
    "model.config={{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, "
    "resid_pdrop: {0}, embd_pdrop: 0.0, attn_pdrop: 0.0}}"
)
COMMON = ("run.max_steps=4", "checkpoint.at_end=false", "data.validation=null")


def explained(make_config: MakeConfig, first: tuple[str, ...], second: tuple[str, ...], **options: Any) -> Explanation:
    """Trains two runs in this process, which differ in the given overrides, and explains their difference."""
    folders = []
    for name, overrides in (("a", first), ("b", second)):
        folders.append(run_local(make_config(*COMMON, f"run.name={name}", *overrides))["folder"])
    return explain(RunFolder(folders[0]), RunFolder(folders[1]), **options)


def cause(found: Explanation) -> str:
    """Returns the only cause of an explanation."""
    assert [c.status for c in found.candidates].count("cause") == 1, found
    assert not found.equal
    return found.causes[0]


def test_seed(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("run.seed=1",))
    assert cause(found) == "run.seed 0 → 1"
    assert found.conclusion == "run.seed 0 → 1 changes the batch of step 1; nothing else does"


def test_learning_rate(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("optimizer.lr=1e-3",))
    assert cause(found) == "optimizer.lr 0.003 → 0.001"
    assert found.conclusion.startswith("optimizer.lr 0.003 → 0.001 changes the loss of step 2 by ")
    assert found.conclusion.endswith("; nothing else does")
    assert any("a is made again here bit for bit (steps 1 to 2)" in note for note in found.notes)
    assert any("a with the changes is made again here bit for bit" in note for note in found.notes)


@pytest.mark.slow
def test_keys_without_effect(make_config: MakeConfig) -> None:
    changes = ("optimizer.lr=1e-3", "run.max_steps=5", "logging.every_steps=2", "scheduler.power=3")
    found = explained(make_config, (), changes)
    assert cause(found) == "optimizer.lr 0.003 → 0.001"
    statuses = {c.changes[0].name: c.status for c in found.candidates}
    assert statuses["scheduler.power"] == "no effect"  # unused by cosine
    assert statuses["run.max_steps"] == "no effect"  # the decay begins after the step that is explained
    assert [c.name for c in found.neutral] == ["logging.every_steps"]


def test_amendment(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("run.amendments=[{at: 2, set: {optimizer.lr: 1e-3}}]",))
    assert cause(found).startswith("run.amendments [] → [")
    assert "changes the loss of step 4 by" in found.conclusion


@pytest.mark.slow
def test_order_of_the_data(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("data.shuffle=none",))
    assert cause(found) == "data.shuffle full → none"
    assert "changes the batch of step 1" in found.conclusion
    assert found.first_batch is not None
    assert found.first_batch.step == 1


@pytest.mark.slow
def test_precision(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("accelerator.precision=bf16",))
    assert cause(found) == "accelerator.precision fp32 → bf16"
    assert "changes the loss of step 1" in found.conclusion


@pytest.mark.slow
def test_dropout(make_config: MakeConfig) -> None:
    found = explained(make_config, (GPT2.format(0.0),), (GPT2.format(0.1),))
    assert cause(found) == "model.config.resid_pdrop 0 → 0.1"
    assert "changes the loss of step 1" in found.conclusion


@pytest.mark.slow
def test_tokenizer(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("tokenizer={train: bpe, vocab_size: 300}",))
    assert "tokenizer kind: bytes" in cause(found)
    assert "changes the batch of step 1" in found.conclusion


@pytest.mark.slow
def test_changed_rows_of_the_data(make_config: MakeConfig, tmp_path: Path) -> None:
    """The file has changed between the runs; A can't be made again, and the hash of the data says why."""
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(instruction_rows(40)))
    first = run_local(make_config(*COMMON, "run.name=a", f"data.train.path={data}"))["folder"]
    rows = instruction_rows(40)
    rows[3]["output"] = "something else"
    data.write_text(json.dumps(rows))
    second = run_local(make_config(*COMMON, "run.name=b", f"data.train.path={data}"))["folder"]
    found = explain(RunFolder(first), RunFolder(second))
    assert found.causes[0].startswith("the data (tokens ")
    assert "it can't be made again" in found.conclusion


@pytest.mark.promise
def test_world_size_alone_is_no_difference(make_config: MakeConfig, tmp_path: Path) -> None:
    first = run_all(1, [make_config(*COMMON, "run.name=a")])[0]
    two = make_config(*COMMON, "run.name=b", "accelerator.name=ddp", "scaling.workers=2", "batch.micro_size=1")
    second = run_all(2, [two])[0]
    found = explain(RunFolder(first), RunFolder(second))
    assert found.equal
    assert found.conclusion.startswith("the runs are equal within rounding in all 4 common steps")
    assert "scaling.workers 0 → 2" in found.conclusion
    assert 0 < found.largest.distance < 1e-5  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_cause_is_found_beside_another_world_size(make_config: MakeConfig, tmp_path: Path) -> None:
    """The layout of B is made again with two processes, and is within rounding of A."""
    first = run_all(1, [make_config(*COMMON, "run.name=a")])[0]
    changes = ("accelerator.name=ddp", "scaling.workers=2", "batch.micro_size=1", "optimizer.weight_decay=5")
    second = run_all(2, [make_config(*COMMON, "run.name=b", *changes)])[0]
    found = explain(RunFolder(first), RunFolder(second))
    assert cause(found) == "optimizer.weight_decay 0.1 → 5"
    layout = next(c for c in found.candidates if c.kind == "layout")
    assert layout.status in ("rounding", "no effect"), layout


@pytest.mark.slow
def test_the_rerun_starts_at_a_checkpoint(make_config: MakeConfig) -> None:
    """The schedules are equal in the first four steps: the rerun starts at a checkpoint before the last of them."""
    kept = ("run.max_steps=6", "checkpoint.every_steps=1", "checkpoint.keep_last=null")
    constant, wsd = ("scheduler.name=constant", *kept), ("scheduler.name=wsd", "scheduler.decay_ratio=0.5", *kept)
    found = explained(make_config, constant, wsd)
    assert found.causes == ["scheduler.name constant → wsd", "scheduler.decay_ratio 0.2 → 0.5"]
    assert found.conclusion.startswith(
        "scheduler.name constant → wsd together with scheduler.decay_ratio 0.2 → 0.5 changes the loss of step 6 by "
    )
    assert any("bit for bit (steps 4 to 6)" in note for note in found.notes), found.notes
    # With a decay of 20 %, the learning rate differs only in step 6, and the loss would only in step 7.
    assert next(c for c in found.candidates if "wsd" in c.text).status == "part"


@pytest.mark.slow
def test_changes_that_act_only_together(make_config: MakeConfig) -> None:
    """With one cycle, restarts have no effect; without restarts, cycles have none. The power has none at all."""
    second = ("scheduler.name=cosine_with_restarts", "scheduler.cycles=2", "scheduler.power=3")
    steps = "run.max_steps=5"
    found = explained(make_config, ("scheduler.name=cosine", steps), (*second, steps))
    assert {c.changes[0].name: c.status for c in found.candidates} == {
        "scheduler.name": "part",
        "scheduler.cycles": "part",
        "scheduler.power": "no effect",
    }
    assert found.conclusion.startswith(
        "scheduler.name cosine → cosine_with_restarts together with scheduler.cycles 1 → 2 changes the loss of step "
    )
    assert found.conclusion.endswith("; none does alone")


def test_equal_runs_without_reruns(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ())
    assert found.equal
    assert found.reruns == 0
    assert found.conclusion.endswith("in all 4 common steps; nothing differs in what they were given")


def test_a_difference_without_a_cause_is_stated(make_config: MakeConfig) -> None:
    folders = [Path(run_local(make_config(*COMMON, f"run.name={name}"))["folder"]) for name in "ab"]
    rows = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    rows[2]["loss"] += 0.5
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = explain(RunFolder(folders[0]), RunFolder(folders[1]))
    assert not found.equal
    assert "nothing differs in what the runs were given" in found.conclusion
    environment = json.loads((folders[1] / "environment.json").read_text())
    environment["hardware"]["cpu"] = "another CPU"
    (folders[1] / "environment.json").write_text(json.dumps(environment))
    found = explain(RunFolder(folders[0]), RunFolder(folders[1]))
    assert "another CPU is what remains" in found.conclusion
    assert "other hardware" in found.conclusion


def test_wrong_inputs(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [Path(run_local(make_config(*COMMON, f"run.name={name}"))["folder"]) for name in "ab"]

    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["myllm-ray", "explain", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    code, out, _ = call(*folders)
    assert code == 0
    assert "equal, bit for bit" in out
    code, out, _ = call(*folders, "--json")
    assert json.loads(out)["equal"] is True
    code, _, err = call(folders[0], tmp_path)
    assert code == 2
    assert "is not the folder of a run" in err
    raw = (folders[1] / "config.yaml").read_text()
    (folders[1] / "config.yaml").write_text(raw.replace("trainer: sft", "trainer: pretrain"))
    code, out, _ = call(*folders)
    assert code == 1
    assert "different trainers: sft and pretrain, so nothing was made again" in out
    (folders[1] / "config.yaml").write_text(raw.replace("hidden_size: 64", "hidden_size: 128"))
    assert "different models: model.config.hidden_size is 64 and 128" in call(*folders)[1]
    (folders[1] / "config.yaml").write_text("a: [")
    code, _, err = call(*folders)
    assert code == 2
    assert "config.yaml: can't be read" in err
    (folders[1] / "config.yaml").write_text(raw)
    for name in ("metrics.jsonl", "ledger.jsonl"):
        (folders[1] / name).unlink()
    with pytest.raises(ConfigError, match="nothing to compare: no step is in its ledger"):
        explain(RunFolder(folders[0]), RunFolder(folders[1]))


def test_only_the_records(make_config: MakeConfig) -> None:
    found = explained(make_config, (), ("optimizer.lr=1e-3",), rerun=False)
    assert found.reruns == 0
    assert "not made again (--no-rerun); what may be the cause: optimizer.lr" in found.conclusion
    found = explain(RunFolder(found.a), RunFolder(found.b), most_steps=1)
    assert "--steps 2 makes them again" in found.conclusion


# Differences of code and packages: the runs are trained in processes with their own import paths.

TRAINER = """
from myllm_ray.trainers.sft import SFTTrainer
from myllm_ray.common.types import StepOutput


class Mine(SFTTrainer):
    def train_step(self, micro):
        output = super().train_step(micro)
        return StepOutput(output.loss_sum * FACTOR, output.metrics)
"""


def train_in_a_process(config: Path, *overrides: str, path: tuple[Path, ...] = (), **variables: str) -> Path:
    """Trains in a process with more folders on its import path. Returns the run's folder."""
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, "-m", "myllm_ray.cli", "train", str(config), *overrides]
    done = subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    raw = json.loads(config.read_text())
    name = next(o.partition("=")[2] for o in overrides if o.startswith("run.name="))
    return Path(raw["run"]["storage"]) / name


def write_config(make_config: MakeConfig, tmp_path: Path, **top: Any) -> Path:
    raw = make_config(*COMMON, "run.max_steps=3").model_dump(mode="json")
    raw.update(top)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.slow
def test_allocator_alone_is_no_difference(make_config: MakeConfig, tmp_path: Path) -> None:
    config = write_config(make_config, tmp_path)
    first = train_in_a_process(config, "run.name=a")
    second = train_in_a_process(config, "run.name=b", MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536")
    found = explain(RunFolder(first), RunFolder(second))
    assert found.equal
    assert found.conclusion.startswith("the runs are equal, bit for bit, in all 3 common steps; no effect: MALLOC_")


@pytest.mark.slow
def test_package(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two versions of a package with a custom trainer, in two folders; a third folder has no effect."""
    for version, factor in (("1.0", "1.0"), ("2.0", "1.01")):
        folder = tmp_path / f"v{version}"
        info = folder / f"my_lab-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my-lab\nVersion: {version}\n")
        (folder / "my_lab.py").write_text(TRAINER.replace("FACTOR", factor))
    config = write_config(make_config, tmp_path, trainer="my_lab:Mine")
    raw = json.loads(config.read_text())
    raw.pop("sft")
    config.write_text(json.dumps(raw))
    first = train_in_a_process(config, "run.name=a", path=(tmp_path / "v1.0",))
    second = train_in_a_process(config, "run.name=b", path=(tmp_path / "v2.0",))
    found = explain(RunFolder(first), RunFolder(second))
    assert cause(found) == "my-lab 1.0 → 2.0"
    assert found.conclusion.startswith("my-lab 1.0 → 2.0 changes the loss of step 1 by ")
    assert found.conclusion.endswith("; nothing else does")
    shutil.rmtree(tmp_path / "v2.0")
    found = explain(RunFolder(first), RunFolder(second))
    assert found.causes == []
    assert "my-lab 1.0 → 2.0 is what remains" in found.conclusion
    assert "my-lab 2.0 is not installed here" in found.conclusion


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_changed_line_of_code(make_config: MakeConfig, tmp_path: Path) -> None:
    """The earlier code is taken from its git commit; code that was not committed can't be made again."""
    repository = tmp_path / "repository"
    repository.mkdir()
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=repository, env=environment, check=True, capture_output=True)

    config = write_config(make_config, tmp_path, trainer="mine:Mine")
    raw = json.loads(config.read_text())
    raw.pop("sft")
    config.write_text(json.dumps(raw))
    git("init", "-q")
    runs = []
    for name, factor, commits in (("a", "1.0", True), ("b", "1.01", True), ("c", "1.02", False)):
        (repository / "mine.py").write_text(TRAINER.replace("FACTOR", factor))
        if commits:
            git("add", "mine.py")
            git("commit", "-q", "-m", name)
        runs.append(RunFolder(train_in_a_process(config, f"run.name={name}", path=(repository,))))
    a, b, c = runs
    found = explain(a, b)  # neither is what is in the folder
    assert cause(found).startswith("mine ")
    assert "changes the loss of step 1 by" in found.conclusion
    assert any("a is made again here bit for bit" in note for note in found.notes), found.notes
    (repository / "mine.py").write_text(TRAINER.replace("FACTOR", "1.03"))
    found = explain(a, c)
    assert "is what remains" in found.conclusion
    assert "modified and not committed" in found.conclusion
