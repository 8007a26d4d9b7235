"""`myllm-ray runs diff` and `rm`: the differences and the removal of runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from conftest import MakeConfig
from e2e.test_cli import call
from run_folders import beating, write_run

from myllm_ray.config import ConfigError
from myllm_ray.runs.difference import compare, first_batch, first_metric
from myllm_ray.runs.folder import RunFolder
from myllm_ray.runs.listing import list_runs
from myllm_ray.runs.removal import plan_removal, remove
from myllm_ray.worker import run_local


def test_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert compare(RunFolder(a), RunFolder(b)).equal
    code, out, _ = call(capsys, monkeypatch, "runs", "diff", a, b)
    assert code == 0
    assert "no difference" in out
    raw = yaml.safe_load((b / "config.yaml").read_text())
    raw["optimizer"] = {"lr": 1e-3}
    (b / "config.yaml").write_text(yaml.safe_dump(raw))
    (b / "environment.json").write_text(json.dumps({"torch": "2.14.0"}))
    for name in ("metrics.jsonl", "ledger.jsonl"):
        rows = [json.loads(line) for line in (b / name).read_text().splitlines()]
        rows[1].update({"loss": 3.0 + 1e-12} if "loss" in rows[1] else {"tokens_hash": "f" * 16})
        (b / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = RunFolder(a), RunFolder(b)
    found = compare(first, second)
    assert [(c.kind, c.name, c.a, c.b) for c in found.changes] == [
        ("config", "optimizer.lr", None, 1e-3),
        ("package", "torch", "2.13.0", "2.14.0"),
    ]
    batch, loss = first_batch(first, second), first_metric(first, second)
    assert batch is not None
    assert (batch.step, batch.b) == (2, "f" * 16)
    assert loss is not None
    assert (loss.step, loss.name) == (2, "loss")  # exact values, not rounded ones
    code, out, _ = call(capsys, monkeypatch, "runs", "diff", a, b)
    assert code == 1
    for part in ("optimizer.lr", "2.14.0", "first step with another batch: step 2", "first step with another loss"):
        assert part in out
    code, out, _ = call(capsys, monkeypatch, "runs", "diff", a, b, "--json")
    assert json.loads(out)["loss"]["step"] == 2
    os.truncate(b / "environment.json", 5)
    code, _, err = call(capsys, monkeypatch, "runs", "diff", a, b)
    assert code == 2
    assert "environment.json: can't be read" in err


def test_a_run_without_records_is_compared_as_far_as_possible(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (b / "metrics.jsonl").unlink()
    found = compare(RunFolder(a), RunFolder(b))
    assert found.loss is None
    assert any("no metrics.jsonl" in note for note in found.notes)


def test_rm_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "r")
    link = tmp_path / "link"
    link.symlink_to(run)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="is a link to"):
        plan_removal(link)
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        plan_removal(tmp_path / "folder")
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        plan_removal(tmp_path / "runs")
    with beating(run), pytest.raises(ConfigError, match=r"a run is active there .*myllm-ray stop"):
        plan_removal(run)
    monkeypatch.chdir(run)
    with pytest.raises(ConfigError, match="contains the working directory"):
        plan_removal(run)
    assert run.is_dir()


def test_rm_asks_and_removes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    code, _, err = call(capsys, monkeypatch, "runs", "rm", first)
    assert code == 2
    assert "add --yes" in err
    code, _, err = call(capsys, monkeypatch, "runs", "rm", first, tmp_path / "none", "--yes")
    assert code == 2
    assert first.is_dir()  # all are checked before the first is removed
    assert call(capsys, monkeypatch, "runs", "rm", first, second, "--yes")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_the_base_of_adapters_is_kept(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("run.max_steps=2", "data.validation=null")
    base = Path(run_local(make_config(*common, "run.name=base", "checkpoint.every_steps=1"))["folder"])
    adapters = make_config(*common, "run.name=adapters", model={"name": str(base), "lora": {"rank": 2}})
    run = Path(run_local(adapters)["folder"])
    code, _, err = call(capsys, monkeypatch, "runs", "rm", base, "--yes")
    assert code == 2
    assert "its checkpoints hold only the weights that it trained; remove it too, or first export it" in err
    assert call(capsys, monkeypatch, "runs", "rm", base, "--checkpoints-only", "--yes")[0] == 2
    # An older checkpoint is not needed.
    assert call(capsys, monkeypatch, "runs", "rm", base, "--checkpoints-only", "--keep-last", 1, "--yes")[0] == 0
    manifest = next(run.glob("checkpoints/*/manifest.json"))
    text = manifest.read_text()
    manifest.write_text("{")
    assert call(capsys, monkeypatch, "runs", "rm", base, "--checkpoints-only", "--keep-last", 1, "--yes")[0] == 0
    manifest.write_text(text)
    assert call(capsys, monkeypatch, "runs", "rm", base, run, "--yes")[0] == 0
    assert not base.exists()


def test_rm_of_checkpoints_states_what_happens_to_the_remote_copies(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = tmp_path / "mirror"
    config = make_config(
        "run.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=3", f"checkpoint.mirror={mirror}"
    )
    folder = Path(run_local(config)["folder"])
    code, out, _ = call(capsys, monkeypatch, "runs", "rm", folder, "--checkpoints-only", "--keep-last", 1, "--yes")
    assert code == 0
    assert "2 checkpoints" in out
    assert f"2 copies in {mirror}/run are kept (--remote removes them)" in out
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert len(list((mirror / "run").glob("step-*"))) == 3
    assert (folder / "metrics.jsonl").is_file()
    code, out, _ = call(capsys, monkeypatch, "runs", "rm", folder, "--remote", "--yes")
    assert code == 0
    assert "3 copies" in out
    assert "are removed, too" in out
    assert not folder.exists()
    assert not list((mirror / "run").iterdir())


def test_more_checkpoints_are_kept_than_exist(make_config: MakeConfig) -> None:
    steps = ("run.max_steps=3", "checkpoint.every_steps=1", "checkpoint.keep_last=3")
    folder = Path(run_local(make_config(*steps))["folder"])
    for keep, removed in ((1, 2), (2, 1), (3, 0), (4, 0), (9, 0)):
        assert len(plan_removal(folder, checkpoints_only=True, keep_last=keep).paths) == removed, keep


def test_a_run_that_starts_after_the_question_is_not_removed(tmp_path: Path) -> None:
    planned = plan_removal(write_run(tmp_path / "a"))
    with beating(planned.run), pytest.raises(ConfigError, match="a run is active there"):
        remove(planned)
    assert (planned.run / "config.yaml").is_file()


def test_a_removal_that_fails_leaves_no_half_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "r")

    def fails(path: Path) -> None:
        raise OSError("busy")

    monkeypatch.setattr("myllm_ray.runs.removal.shutil.rmtree", fails)
    with pytest.raises(ConfigError, match=r"files remain in .*\.removed-r-.*busy"):
        remove(plan_removal(run))
    assert not run.exists()
    assert list_runs(tmp_path) == []
