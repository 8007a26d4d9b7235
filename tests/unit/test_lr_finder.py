"""The learning-rate finder: its schedule, its analysis of the losses, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from conftest import MakeConfig, read_jsonl

from myllm_ray import cli
from myllm_ray.config import ConfigError, TrainingError
from myllm_ray.config.scheduler_section import SchedulerSection
from myllm_ray.engine.lr_finder import analyse
from myllm_ray.engine.scheduler import multiplier
from myllm_ray.orchestration.lr_find import find_lr


def test_the_rate_grows_by_one_factor_from_low_to_high() -> None:
    section = SchedulerSection(name="range_test", min_lr_ratio=1e-4, decay_steps=8)
    rates = [multiplier(step, 9, section) for step in range(9)]
    assert rates == pytest.approx([10 ** (-4 + step / 2) for step in range(9)])


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    rates = [10 ** (-5 + i / 20) for i in range(100)]
    losses = [
        4 - 2 / (1 + math.exp(-4 * (math.log10(r) + 3))) + max(0.0, math.log10(r) + 1.5) ** 2 for r in rates
    ]  # steepest at 1e-3
    found = analyse(rates, losses)
    assert 5e-4 < found.steepest < 4e-3  # smoothing shifts the result to a slightly larger rate
    assert found.steepest < found.lowest < 0.2
    assert analyse(rates, [*losses[:80], *[math.nan] * 20]).steepest == found.steepest
    with pytest.raises(TrainingError, match="the loss does not fall"):
        analyse(rates, [1 + r for r in rates])
    with pytest.raises(TrainingError, match="the loss does not fall"):
        analyse(rates, [math.nan] * 100)


def test_the_command(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(json.loads(make_config("checkpoint.every_steps=1").model_dump_json())))
    monkeypatch.setattr("sys.argv", ["myllm-ray", "lr-find", str(path), "--steps", "40"])
    cli.app(standalone_mode=False)
    said = capsys.readouterr().out
    assert "suggestion: optimizer.lr=" in said
    folder = tmp_path / "runs" / "run-lr-find"
    assert '"title":"Loss against learning rate"' in (folder / "lr_find.html").read_text()
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows[0]["learning_rate"] == pytest.approx(1e-6)
    assert len(rows) <= 40
    assert not list(folder.glob("checkpoints/*"))
    assert not (tmp_path / "runs" / "run").exists()


def test_wrong_input_is_reported(make_config: MakeConfig) -> None:
    for options, says in [({"low": 1.0, "high": 0.1}, "low is the smaller one"), ({"steps": 3}, "--steps 10 or more")]:
        with pytest.raises(ConfigError, match=says):
            find_lr(make_config(), **options)  # type: ignore[arg-type]
