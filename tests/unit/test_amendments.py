"""The amendments of a config: what may change, the config of each step, the schedule, and what is refused."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeConfig
from pydantic import BaseModel

from myllm_ray.config import ConfigError
from myllm_ray.config.amendments import CHANGEABLE, REFUSED, effective, next_boundary, refusal, segments
from myllm_ray.config.scheduler_section import SchedulerSection
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import builtin_config_classes
from myllm_ray.config.validation import _section_in
from myllm_ray.engine.amendments import amended, check_segments, described, opened, recorded, with_recorded
from myllm_ray.engine.exits import exit_of
from myllm_ray.engine.scheduler import multiplier
from myllm_ray.preparation import absolute
from myllm_ray.worker import run_local


def keys_of(cls: type[BaseModel], above: str = "", down: int = 1) -> Iterator[str]:
    """Yields the dotted keys of a config class: of its sections, and of the values at the top."""
    for name, field in cls.model_fields.items():
        key = f"{above}{field.alias or name}"
        section = _section_in(field.annotation)
        if section is None or not down or key in ("callbacks", "tokenizer"):
            yield key
        else:
            yield from keys_of(section, f"{key}.", down - 1)


@pytest.mark.parametrize("trainer", sorted(builtin_config_classes()))
def test_every_key_can_change_or_is_refused_with_a_reason(trainer: str) -> None:
    cls = builtin_config_classes()[trainer]
    keys = set(keys_of(cls))
    assert len(keys) > 80
    assert keys >= CHANGEABLE, "a key of the table does not exist"
    for key in keys - CHANGEABLE:
        assert refusal(cls, key), f"{key} is in neither table of config/amendments.py"
    for key in CHANGEABLE:
        assert refusal(cls, key) is None
        assert key not in REFUSED
    known = keys | {key.partition(".")[0] for key in keys}
    assert set(REFUSED) <= known, "a refused key does not exist"


AT = "run.amendments=[{at: %d, set: {%s}}]"


def test_the_config_of_each_step(make_config: MakeConfig) -> None:
    config = make_config(
        "run.amendments=[{at: 2, set: {optimizer.lr: 1e-4, evaluation: {every_steps: 2}}}, "
        "{at: 4, set: {scheduler.name: linear, run.max_steps: 9}}]",
        "scheduler.decay_steps=5",
    )
    assert effective(config, 1) is config
    two, four = effective(config, 3), effective(config, 4)
    assert (two.optimizer.lr, two.evaluation.every_steps, two.scheduler) == (1e-4, 2, config.scheduler)
    assert (four.optimizer.lr, four.run.max_steps, four.scheduler.name) == (1e-4, 9, "linear")
    # A schedule that restarts has no warm-up and no end but its own; the shape's other settings stay.
    assert (four.scheduler.start_step, four.scheduler.warmup_steps, four.scheduler.decay_steps) == (4, None, None)
    assert four.scheduler.min_lr_ratio == config.scheduler.min_lr_ratio
    assert effective(four, 4) == four
    assert [step for step, _ in segments(config)] == [0, 2, 4]
    assert config.run.amendments[0].set == {"optimizer.lr": 0.0001, "evaluation.every_steps": 2}  # YAML: text 1e-4
    assert [next_boundary(config.run.amendments, step) for step in (0, 1, 2, 3, 4)] == [2, 2, 4, 4, None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("model.attention: eager", r"at step 3: model.attention can't change within a run: the weights"),
        ("run.seed: 3", r"run.seed can't change within a run: order of the data"),
        ("data.train.weight: 2", r"data.train.weight can't change within a run: a position in the data"),
        ("optimizer.name: sgd", r"optimizer.name can't change within a run: the optimizer's state"),
        ("sft.unknown: 1", r"sft.unknown can't change within a run: the settings of a trainer"),
        ("optimizer.lrr: 1", r"at step 3: unknown key optimizer.lrr: did you mean lr\?"),
        ("optimiser.lr: 1", r"at step 3: unknown key optimiser"),
        ("optimizer.lr: -1", r"at step 3: optimizer.lr: input should be greater than 0"),
        ("optimizer.lr: fast", r"at step 3: optimizer.lr: input should be a valid number"),
        ("scheduler: linear", r"at step 3: scheduler is a section of keys"),
        ("batch.global_size: 7", r"at step 3: batch.global_size=7 is not divisible"),
        ("batch.micro_size: auto", r"at step 3: batch.micro_size: auto applies before the first step"),
        ("run.max_steps: 2", r"at step 3: run.max_steps=2 is before this step"),
        ("run.epochs: 2", r"at step 3: run: give exactly one of max_steps and epochs"),
    ],
)
def test_what_is_refused_when_the_config_is_loaded(make_config: MakeConfig, values: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_config(AT % (3, values))
    assert "\n" not in str(error.value)


def test_what_is_refused_before_the_run_starts(make_config: MakeConfig) -> None:
    for values, message in (
        ("scheduler.name: linaer", r"at step 3: scheduler.name: unknown name 'linaer'; did you mean linear"),
        ("optimizer.betas: [0.9, 2]", r"at step 3: optimizer: AdamW does not accept its options"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_segments(make_config(AT % (3, values)))


def test_steps_ascend_and_are_multiples_of_the_steps_of_a_batch(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"run: amendments: the steps must ascend.*got 3, 2"):
        make_config("run.amendments=[{at: 3, set: {gradient_clip: 1}}, {at: 2, set: {gradient_clip: 1}}]")
    with pytest.raises(ConfigError, match=r"amendments.0.set"):
        make_config("run.amendments=[{at: 3, set: {}}]")
    prompts = ("data={train: {source: arithmetic, format: prompt}, sequence_length: 32}",)
    ppo: dict[str, Any] = {
        "trainer": "ppo",
        "ppo": {"epochs": 2, "reward": "helpers:variety"},
        "rollout": {"max_new_tokens": 8},
    }
    with pytest.raises(ConfigError, match=r"at step 3: each batch makes 2 optimizer steps.*a multiple of 2"):
        make_config(*prompts, AT % (3, "optimizer.lr: 1"), **ppo)


def test_a_batch_size_that_can_not_change(make_config: MakeConfig) -> None:
    size = AT % (3, "batch.global_size: 4")
    with pytest.raises(ConfigError, match=r"batch.global_size can change only in a run with run.max_steps"):
        make_config("run.max_steps=null", "run.epochs=2", size)
    dpo: dict[str, Any] = {"trainer": "dpo", "dpo": {"reference": "precomputed"}}
    pairs = "data.train={source: brackets, format: preference}"
    with pytest.raises(ConfigError, match=r"can't change with dpo.reference=precomputed"):
        make_config(pairs, size, **dpo)
    make_config(pairs, size, trainer="dpo")


def test_one_more_amendment(make_config: MakeConfig) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match=r"--at 2: the run has trained 3 steps already"):
        amended(config, 3, 2, {"optimizer.lr": 1})
    with pytest.raises(ConfigError, match=r"--at 7: the run ends at step 6 \(run.max_steps\)"):
        amended(config, 3, 7, {"optimizer.lr": 1})
    once = amended(config, 3, "now", {"optimizer": {"lr": "1e-4"}})
    assert [a.model_dump() for a in once.run.amendments] == [{"at": 3, "set": {"optimizer.lr": 1e-4}}]
    assert config.run.amendments == []
    twice = amended(once, 3, 3, {"gradient_clip": None})
    assert [a.set for a in twice.run.amendments] == [{"optimizer.lr": 1e-4, "gradient_clip": None}]
    later = amended(twice, 3, 6, {"run.max_steps": 9})
    assert [a.at for a in amended(later, 3, 8, {"optimizer.lr": 1}).run.amendments] == [3, 6, 8]
    # Step 4 is step 3 of a cosine from 1 to 0.1 with two warm-up steps, of 6 steps.
    assert described(once, 3) == (
        "optimizer.lr was 0.003, now it is 0.0001; the learning rate of step 4 is 8.68e-05 instead of 0.0026"
    )


def scheduled(config: TrainerConfig) -> list[float]:
    """Returns the learning rate of each step of the run, by the config that is in force."""
    rates, step = [], 0
    while step < (effective(config, step).run.max_steps or 0):
        now = effective(config, step)
        rates.append(now.optimizer.lr * multiplier(step, now.run.max_steps or 0, now.scheduler))
        step += 1
    return rates


def test_the_schedule_is_a_function_of_the_step_and_the_amendments(make_config: MakeConfig) -> None:
    base = ("run.max_steps=20", "optimizer.lr=1", "scheduler={name: cosine, warmup_steps: 4}")

    def cosine(step: int, total: int, warmup: int = 4) -> float:
        share = (step - warmup) / (total - warmup)
        return (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))

    plain = [cosine(step, 20) for step in range(20)]
    assert scheduled(make_config(*base)) == pytest.approx(plain)
    # Another peak: the shape continues.
    peak = scheduled(make_config(*base, AT % (10, "optimizer.lr: 0.5")))
    assert peak == pytest.approx([*plain[:10], *(0.5 * rate for rate in plain[10:])])
    # Another length, longer and shorter: the shape of a run of this length, from the amendment on.
    for total in (40, 12):
        rates = scheduled(make_config(*base, AT % (10, f"run.max_steps: {total}")))
        assert rates == pytest.approx([*plain[:10], *(cosine(step, total) for step in range(10, total))])
    # A warm restart: the schedule of a run that begins at the amendment.
    rates = scheduled(make_config(*base, AT % (10, "scheduler.warmup_steps: 2, run.max_steps: 30")))
    assert rates == pytest.approx([*plain[:10], *(cosine(step, 20, warmup=2) for step in range(20))])
    # Any other key of the schedule restarts it without a warm-up.
    rates = scheduled(make_config(*base, AT % (10, "scheduler.min_lr_ratio: 0")))
    assert rates[10:] == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])


def test_a_decay_branch_of_a_constant_rate(make_config: MakeConfig) -> None:
    """WSD as a branch: the constant rate of any length decays from the amendment to the last step."""
    config = make_config(
        "run.max_steps=100",
        "optimizer.lr=1",
        "scheduler={name: constant, warmup_steps: 4}",
        AT % (16, "scheduler.name: linear, run.max_steps: 20"),
    )
    assert scheduled(config) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 13, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("agreed", "step", "boundary", "kind"),
    [
        (set(), 3, None, None),
        (set(), 2, 3, None),
        (set(), 3, 3, "amended"),
        (set(), 4, 3, "amended"),
        (set(), 6, 6, "amended"),  # the last step
        ({"amend"}, 2, None, "amended"),
        ({"amend"}, 6, None, None),  # the run ends anyway: the command amends the finished run
        ({"preempt", "amend", "abort"}, 3, 3, "preempted"),
        ({"abort", "amend"}, 3, 3, "aborted"),
        ({"stop"}, 3, 3, None),  # early stopping at the step of an amendment ends the run
        ({"stop", "amend"}, 2, None, None),
        ({"save", "evaluate"}, 2, 3, None),
    ],
)
def test_how_a_batch_ends_a_segment(agreed: set[str], step: int, boundary: int | None, kind: str | None) -> None:
    found = exit_of(agreed, dict.fromkeys(agreed, "why"), step, 6, boundary)
    assert (found and found.kind) == kind


def test_a_schedule_that_begins_later() -> None:
    section = SchedulerSection(name="wsd", warmup_steps=2, decay_ratio=0.5, start_step=10)
    whole = SchedulerSection(name="wsd", warmup_steps=2, decay_ratio=0.5)
    assert [multiplier(10 + s, 18, section) for s in range(8)] == [multiplier(s, 8, whole) for s in range(8)]


def test_a_record_that_can_not_be_read(tmp_path: Path) -> None:
    """One line, not a run without its amendments."""
    for content in ("run: [", "a: 1\n", "run: 3\n"):
        (tmp_path / "config.yaml").write_text(content)
        for read in (recorded, opened):
            with pytest.raises(ConfigError, match=r"config.yaml (can't be read|is not the config of a run)") as error:
                read(tmp_path)
            assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        opened(tmp_path / "none")
    assert recorded(tmp_path / "none") == []


def test_amendments_of_a_folder_that_was_lost(make_config: MakeConfig, tmp_path: Path) -> None:
    """A run that resumes from the copies of its checkpoints has the amendments that they contain."""
    mirror = f"checkpoint.mirror={tmp_path / 'mirror'}"
    steps = ("checkpoint.every_steps=1", "run.max_steps=3", mirror)
    amended = "run.amendments=[{at: 5, set: {optimizer.lr: 1e-3}}]"
    folder = Path(run_local(make_config(*steps, amended))["folder"])
    shutil.rmtree(folder)
    found = with_recorded(absolute(make_config("checkpoint.every_steps=1", "checkpoint.resume=auto", mirror)))
    assert [(a.at, a.set) for a in found.run.amendments] == [(5, {"optimizer.lr": 1e-3})]
