"""Mixtures by share in configs: what is refused, the stages, streams, resuming, and what reports show."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig, instruction_rows

from myllm_ray import cli
from myllm_ray.common.types import Position
from myllm_ray.config import ConfigError
from myllm_ray.config.errors import CheckpointError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data import mixture as mixing
from myllm_ray.data import plan as planning
from myllm_ray.data.inspect import describe
from myllm_ray.data.mixture import UNIT, Mixture, Stage
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.summary import summarize
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.reporting.run_sections import data
from myllm_ray.engine.run_folder import check_same_run


@pytest.fixture
def mixed(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """Returns a function that builds a config with two sources, `long` and `short`, without shares."""
    for name, count in (("long", 40), ("short", 9)):
        (tmp_path / f"{name}.json").write_text(json.dumps(instruction_rows(count, seed=count)))

    def make(*overrides: str, **top: Any) -> TrainerConfig:
        sources = [f"{{name: {name}, path: {tmp_path}/{name}.json, format: instruction}}" for name in ("long", "short")]
        return make_config(f"data.train=[{', '.join(sources)}]", *overrides, **top)

    return make


def shares(long: float, short: float) -> tuple[str, str]:
    return f"data.train.0.share={long}", f"data.train.1.share={short}"


LONG, BOTH = "{shares: {long: 1}}", "{shares: {long: 0.5, short: 0.5}}"


def until(end: Any, stage: str) -> str:
    return stage.replace("{shares", f"{{until: {end}, shares", 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train.0.share=0.8"], "data: train.share: give every source a share, or none"),
        ([*shares(0.8, 0.3)], "train.share: the shares must add up to 1 .they add up to 1.1"),
        ([*shares(0, 1)], "data.train.0.share: input should be greater than 0"),
        ([*shares(1e-7, 1 - 1e-7)], "the smallest share above 0 is 1e-06"),
        ([*shares(0.8, 0.2), "data.train.0.weight=2"], "train.weight is a number of passes per epoch"),
        ([*shares(0.8, 0.2), "run.max_steps=null", "run.epochs=2"], "run.epochs: sources with shares"),
        ([*shares(0.8, 0.2), f"data.mixture=[{BOTH}]"], "mixture and train.share exclude each other"),
        (["data.mixture=[]"], "mixture is an empty list"),
        ([f"data.mixture=[{BOTH}]", "data.train.1.weight=0.5"], "train.weight is a number of passes"),
        ([f"data.mixture=[{BOTH}]", "data.train.1.name=null"], "give every entry of data.train a name"),
        ([f"data.mixture=[{BOTH}]", "data.train.1.name=long"], "give every entry of data.train a name"),
        ([f"data.mixture=[{LONG}]"], "source short has no share in any stage"),
        (["data.mixture=[{shares: {long: 0.5, shrot: 0.5}}]"], "no source is named shrot .names: long, short"),
        (["data.mixture=[{shares: {long: 0.5, short: 0.4}}]"], "mixture.0: shares: the shares must add up to 1"),
        (["data.mixture=[{shares: {long: 1.5, short: -0.5}}]"], "less than or equal to 1"),
        ([f"data.mixture=[{LONG}, {BOTH}]"], "only the last stage can be without until"),
        ([f"data.mixture=[{until(3, BOTH)}]"], "the last stage ends with the run: leave until=3 out"),
        ([f"data.mixture=[{until('50%', BOTH)}]"], "the last stage ends with the run"),
        ([f"data.mixture=[{until('0%', LONG)}, {BOTH}]"], "give an optimizer step, or a part of the run"),
        ([f"data.mixture=[{until('101%', LONG)}, {BOTH}]"], "give an optimizer step, or a part of the run"),
        ([f"data.mixture=[{until('2B', LONG)}, {BOTH}]"], "give an optimizer step, or a part of the run"),
        ([f"data.mixture=[{until(0.5, LONG)}, {BOTH}]"], "until"),
        ([f"data.mixture=[{until(0, LONG)}, {BOTH}]"], "until"),
        ([f"data.mixture=[{until('100%', LONG)}, {BOTH}]"], "must ascend"),
        ([f"data.mixture=[{until('20%', LONG)}, {until('10%', BOTH)}, {LONG}]"], "must ascend"),
        ([f"data.mixture=[{until(4, LONG)}, {until(4, BOTH)}, {LONG}]"], "must ascend"),
        ([f"data.mixture=[{until(4, LONG)}, {until('90%', BOTH)}, {LONG}]"], "as a step in all stages"),
        ([*shares(0.8, 0.2), "data.validation={split: 0.1, share: 0.5}"], "share belongs to data.train"),
        (["evaluation.tasks=[{data: {path: x.json, share: 1}}]"], "share belongs to data.train"),
        (["data.train.0.proportion=0.8"], "use data.train.share"),
    ],
)
def test_contradictory_shares_are_one_line(mixed: MakeConfig, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        mixed(*overrides)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "stages"),
    [
        ([*shares(0.8, 0.2)], [(None, 0.8)]),
        ([f"data.mixture=[{BOTH}]"], [(None, 0.5)]),
        ([f"data.mixture=[{until('100%', BOTH)}]"], [(None, 0.5)]),
        ([f"data.mixture=[{until(3, LONG)}, {BOTH}]"], [(24, 1), (None, 0.5)]),
        ([f"data.mixture=[{until(3, LONG)}, {until('100%', BOTH)}]"], [(24, 1), (None, 0.5)]),
        ([f"data.mixture=[{until('10%', LONG)}, {BOTH}]", "run.max_steps=25"], [(16, 1), (None, 0.5)]),
        ([f"data.mixture=[{until('1%', LONG)}, {BOTH}]", "run.max_steps=25"], [(0, 1), (None, 0.5)]),
        ([f"data.mixture=[{until('33.4%', LONG)}, {BOTH}]", "run.max_steps=1000"], [(2672, 1), (None, 0.5)]),
        ([f"data.mixture=[{until(100, LONG)}, {BOTH}]"], [(800, 1), (None, 0.5)]),  # after the end of the run
    ],
)
def test_the_stages_of_a_config(
    mixed: MakeConfig, overrides: list[str], stages: list[tuple[int | None, float]]
) -> None:
    order = prepare(mixed(*overrides, "data.validation=null")).train.plan.order
    assert order.mixture == Mixture(
        tuple(Stage(end, (round(s * UNIT), round((1 - s) * UNIT))) for end, s in stages), 4096
    )
    assert order.weights == ()
    assert order.mixture.stage_at(0)[1] == order.mixture.stages[stages[0][0] == 0]


def test_the_store_does_not_depend_on_the_shares(mixed: MakeConfig) -> None:
    plans = [prepare(mixed(*given)).train.plan for given in ([], shares(0.8, 0.2), shares(0.7, 0.3))]
    assert len({plan.store.folder for plan in plans}) == 1
    assert len({plan.key for plan in plans}) == 3


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("trainer", ["sft", "pretrain"])
@pytest.mark.parametrize("shuffle", ["full", "none"])
def test_any_world_size_and_any_resume_give_the_same_rows(
    mixed: MakeConfig, monkeypatch: pytest.MonkeyPatch, packing: str, trainer: str, shuffle: str
) -> None:
    monkeypatch.setattr(mixing, "_LEAST_ROWS", 24)  # several epochs
    monkeypatch.setattr(planning, "_ROUND_ROWS", 32)
    given = [f"data.mixture=[{until(5, BOTH)}, {{shares: {{long: 0.8, short: 0.2}}}}]", "run.max_steps=16"]
    spec = prepare(mixed(*given, f"data.packing={packing}", f"data.shuffle={shuffle}", trainer=trainer)).train
    whole = list(LocalStream(spec, 0, 1).batches(Position(), 16))
    assert whole[-1].position.epoch >= 2
    for at in (0, 1, 4, 5, 11, 15):
        other = pickle.loads(pickle.dumps(spec))  # as another process gets it
        rest = [list(LocalStream(other, rank, 4).batches(whole[at].position, 16 - at)) for rank in range(4)]
        for batch, *parts in zip(whole[at:], *rest, strict=True):
            assert (sum(part.fingerprint for part in parts) - batch.fingerprint) % 2**64 == 0
            assert {part.position for part in parts} == {batch.position}
    first = spec.plan.rows(0, 0, 24)
    sources = [int(spec.plan.store.source_of(np.asarray(row[0].document))) for row in first]
    assert {0, 1} == set(sources)


@pytest.mark.parametrize("least_rows", [160, 4096])
@pytest.mark.parametrize("trainer", ["sft", "pretrain"])
def test_the_use_of_the_sources_is_that_of_the_run(
    mixed: MakeConfig, monkeypatch: pytest.MonkeyPatch, trainer: str, least_rows: int
) -> None:
    """All rows are counted here; the report counts those of the first epoch and knows the shares of the others."""
    monkeypatch.setattr(mixing, "_LEAST_ROWS", least_rows)
    monkeypatch.setattr(planning, "_ROUND_ROWS", 32)
    stages = f"data.mixture=[{until('25%', BOTH)}, {{shares: {{long: 0.8, short: 0.2}}}}]"
    prepared = prepare(mixed(stages, "run.max_steps=40", trainer=trainer))
    spec, batches = prepared.train, 40
    rows = [row for p in spec.positions(Position(), batches) for row in spec.plan.rows(p.epoch, p.row, p.row + 8)]
    segments = np.asarray([segment for row in rows for segment in row])
    sources = spec.plan.store.source_of(segments[:, 0])
    report = describe(prepared, open_tokenizer(prepared.tokenizer_folder), batches)
    assert (report.rows, report.steps, report.mixed) == (320, 40, True)
    held = [4, 1]
    for number, (source, documents_held) in enumerate(zip(report.sources, held, strict=True)):
        mine = segments[sources == number]
        assert source.use is not None
        assert source.use.share == pytest.approx(mine[:, 2].sum() / segments[:, 2].sum(), abs=0.01)
        passes = (mine[:, 1] == 0).sum() / (source.documents - documents_held)
        assert source.use.passes == pytest.approx(passes, rel=0.1)
        expected = (0.25 * 0.5 + 0.75 * 0.8, 0.25 * 0.5 + 0.75 * 0.2)[number]
        assert source.use.share == pytest.approx(expected, abs=0.01)
    assert not [line for line in report.warnings if "cuts off" in line]
    summary = summarize(prepared, open_tokenizer(prepared.tokenizer_folder), batches)
    assert [s["share"] for s in summary["sources"]] == [s.use.share for s in report.sources if s.use]
    assert (summary["run_rows"], summary["run_steps"]) == (320, 40)
    page = data(summary)
    assert page is not None
    shown = repr(page)
    assert "share of the run" in shown
    assert "rows of the run" in shown


def test_the_command_shows_the_shares(
    mixed: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(mixed(*shares(0.8, 0.2), "run.max_steps=60").model_dump_json())
    monkeypatch.setattr(sys, "argv", ["myllm-ray", "data", str(path), "--rows", "0"])
    cli.app(standalone_mode=False)
    shown = capsys.readouterr().out
    assert "rows of 160 tokens of the run: 480 (60 steps)" in shown
    assert re.search(r"long .* (79|80|81)\.\d% ", shown)
    assert re.search(r"short .* (19|20|21)\.\d% ", shown)


def test_preferences_are_mixed_by_rows(make_config: MakeConfig, preference_files: tuple[Path, Path, Path]) -> None:
    train, held_out, _ = preference_files
    sources = [
        f"{{name: {n}, path: {p}, format: preference, share: {s}}}"
        for n, p, s in (("a", train, 0.75), ("b", held_out, 0.25))
    ]
    plan = prepare(make_config(f"data.train=[{', '.join(sources)}]", "data.validation=null", trainer="dpo")).train.plan
    rows = plan.rows(0, 0, 400)
    assert all(len(row) == 1 for row in rows)
    given = np.cumsum([row[0].document >= 7 for row in rows])
    exact = 0.25 * np.arange(1, 401)
    assert (abs(given - exact) < 1).all()


def test_amendments_that_would_move_a_stage_are_refused(mixed: MakeConfig) -> None:
    steps, parts = f"data.mixture=[{until(3, LONG)}, {BOTH}]", f"data.mixture=[{until('50%', LONG)}, {BOTH}]"
    longer, larger = (
        f"run.amendments=[{{at: 2, set: {{{what}}}}}]" for what in ("run.max_steps: 9", "batch.global_size: 16")
    )
    mixed(steps, longer)
    mixed(*shares(0.8, 0.2), longer)
    mixed(*shares(0.8, 0.2), larger)
    with pytest.raises(ConfigError, match=r"run.max_steps can't change: the stages of data.mixture are parts of it"):
        mixed(parts, longer)
    for stages in (steps, parts):
        with pytest.raises(ConfigError, match=r"batch.global_size can't change: the stages of data.mixture"):
            mixed(stages, larger)


def test_a_run_does_not_resume_with_other_shares(mixed: MakeConfig, tmp_path: Path) -> None:
    parts, steps = f"data.mixture=[{until('50%', LONG)}, {BOTH}]", f"data.mixture=[{until(3, LONG)}, {BOTH}]"

    def saved(name: str, *overrides: str) -> Path:
        config = mixed(*overrides)
        content = {
            "position": {"epoch": 0, "row": 8},
            "config": config.model_dump(mode="json"),
            "identity": prepare(config).identity,
        }
        return CheckpointManager(folder=tmp_path / name / "checkpoints").save(1, {"model.w": torch.ones(3)}, content)

    def resume(checkpoint: Path, *overrides: str) -> None:
        config = mixed(*overrides)
        check_same_run(checkpoint, config, prepare(config).identity)

    of_parts, of_steps, of_shares = saved("parts", parts), saved("steps", steps), saved("shares", *shares(0.8, 0.2))
    resume(of_parts, parts)
    resume(of_steps, steps, "run.max_steps=60")  # a longer run: its rows are the same
    resume(of_shares, *shares(0.8, 0.2), "run.max_steps=60")
    with pytest.raises(CheckpointError, match=r"order or packing.*run.max_steps was 6, now it is 60"):
        resume(of_parts, parts, "run.max_steps=60")
    with pytest.raises(CheckpointError, match=r"order or packing.*data.train.0.share was 0.8, now it is 0.7"):
        resume(of_shares, *shares(0.7, 0.3))
    with pytest.raises(CheckpointError, match=r"order or packing.*share"):
        resume(of_shares)
