"""From preferences to rewards with the commands that a user runs one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_jsonl
from transformers import AutoModelForSequenceClassification

from e2e.test_cli import call

SMALL = ["callbacks=[jsonl]", "run.max_steps=4"]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_reward_model_serves_ppo(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's folder and the folder that `export` wrote give the same rewards.

    The trained policy can be sampled and exported.
    """

    def run(*arguments: str) -> str:
        code, out, err = call(capsys, monkeypatch, *arguments)
        assert code == 0, (arguments, err)
        return out

    run("train", "configs/tiny_reward.yaml", *SMALL)
    run("export", "runs/tiny-reward", "judge")
    loaded = AutoModelForSequenceClassification.from_pretrained("judge", dtype=torch.float32)
    assert loaded.score.out_features == 1
    rewards = []
    for name, judge in (("by-run", "runs/tiny-reward"), ("by-folder", "judge")):
        run("train", "configs/tiny_ppo.yaml", *SMALL, f"run.name={name}", "ppo.reward=[]", f"ppo.reward_model={judge}")
        rewards.append(
            [row["score"] for row in read_jsonl(elsewhere / "runs" / name / "metrics.jsonl") if "score" in row]
        )
    assert rewards[0] == rewards[1]
    assert any(abs(r) > 1e-6 for r in rewards[0])
    assert run("sample", "runs/by-run", "--prompt", "1+2=", "--max-new-tokens", "3")
    run("export", "runs/by-run", "policy")
    assert (elsewhere / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["dpo", "reward", "grpo", "ppo"])
def test_what_training_will_see(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """`data` shows prompts and answers, and the hash of a step equals the hash in the ledger."""
    code, out, err = call(capsys, monkeypatch, "data", f"configs/tiny_{name}.yaml", "--rows", "1")
    assert code == 0, err
    assert "+" in out
    assert "=" in out
    code, out, _ = call(capsys, monkeypatch, "data", f"configs/tiny_{name}.yaml", "--step", "2")
    assert code == 0
    code, _, err = call(capsys, monkeypatch, "train", f"configs/tiny_{name}.yaml", *SMALL)
    assert code == 0, err
    rows = read_jsonl(elsewhere / "runs" / f"tiny-{name}" / "ledger.jsonl")
    assert any(row["tokens_hash"] in out for row in rows)


def test_a_missing_model_is_reported(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = call(capsys, monkeypatch, "train", "configs/dpo.yaml")
    assert code == 2
    assert "no folder" in err
    assert "runs/brackets-sft" in err
    assert len(err.strip().splitlines()) == 1
    assert not (elsewhere / "runs" / "dpo-demo").exists()
