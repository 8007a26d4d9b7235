"""The average of the weights against a loop in Python, its evaluation, its checkpoints, and its limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, comparable
from torch import nn

from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.engine.ema import WeightAverage
from myllm_ray.preparation import check_names
from myllm_ray.trained_model import open_trained
from myllm_ray.worker import run_local


def is_average(name: str) -> bool:
    return name.startswith("ema.")


EMA = "ema={decay: 0.7}"


def test_the_average_equals_a_loop() -> None:
    for every, start in ((1, 0), (2, 0), (1, 3), (3, 2)):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.bias.requires_grad_(False)
        accelerator = SingleGPUAccelerator({"accelerator": {"device": "cpu"}})
        accelerator.module = accelerator.model = model
        average = WeightAverage({"ema": {"decay": 0.7, "every_steps": every, "start_step": start}})
        average.prepare(accelerator)
        expected = model.weight.detach().clone()
        for step in range(1, 9):
            skipped = step == 4
            if not skipped:
                model.weight.data += torch.randn(2, 3)
            average.update(step, skipped)
            if not skipped and step <= start:
                expected = model.weight.detach().clone()
            elif not skipped and step % every == 0:
                expected = 0.7 * expected + 0.3 * model.weight.detach()
        assert list(average.tensors()) == ["ema.weight"]
        torch.testing.assert_close(average.tensors()["ema.weight"], expected, rtol=0, atol=1e-6)
        weight = model.weight.detach().clone()
        with average.in_use(accelerator):
            torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-6)
        assert torch.equal(model.weight, weight)


def test_without_the_section_nothing_happens(make_config: MakeConfig) -> None:
    average = WeightAverage(make_config())
    assert not average
    average.update(1, False)
    assert average.tensors() == {}


def test_a_run_averages_evaluates_saves_and_resumes(make_config: MakeConfig, tmp_path: Path) -> None:
    every = ("evaluation={every_steps: 3, at_start: true}", "checkpoint={every_steps: 1, keep_last: null}")
    plain = Path(run_local(make_config(*every, "run.name=plain"))["folder"])
    whole = Path(run_local(make_config(*every, EMA, "run.name=whole"))["folder"])
    rows = comparable(whole)
    assert [{k: v for k, v in row.items() if "_ema_" not in k} for row in rows] == comparable(plain)
    assert rows[0]["validation_ema_loss"] == rows[0]["validation_loss"], "at the start they are the same weights"
    assert rows[-1]["validation_ema_loss"] != rows[-1]["validation_loss"]

    def checkpoint(folder: Path, step: int) -> Path:
        return folder / "checkpoints" / f"step-{step:08d}"

    saved = [read_tensors(checkpoint(whole, step)) for step in range(1, 7)]
    for name in (n for n in saved[0] if n.startswith("model.")):
        averages = [s[f"ema.{name.removeprefix('model.')}"] for s in saved]
        for before, after, weights in zip(averages, averages[1:], saved[1:], strict=False):
            torch.testing.assert_close(after, 0.7 * before + 0.3 * weights[name], rtol=0, atol=1e-6)

    exported = dict(open_trained(whole, ema=True).model.named_parameters())
    assert {f"ema.{n}" for n in exported} == {n for n in saved[0] if n.startswith("ema.")}
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved[-1][f"ema.{name}"])
    with pytest.raises(CheckpointError, match="contains no averaged weights"):
        open_trained(plain, ema=True)

    resume = f"checkpoint={{resume: {checkpoint(whole, 2)}}}"
    again = Path(run_local(make_config(every[0], EMA, resume, "run.name=again"))["folder"])
    assert comparable(again) == [row for row in rows if row["step"] > 2]
    for name, tensor in read_tensors(checkpoint(again, 6)).items():
        assert torch.equal(tensor, saved[-1][name]), name
    # Without the section the average of the checkpoint is left out.
    without = Path(run_local(make_config(every[0], resume, "run.name=without"))["folder"])
    assert comparable(without) == [row for row in comparable(plain) if row["step"] > 2]
    assert not any(name.startswith("ema.") for name in read_tensors(checkpoint(without, 6)))


def test_an_average_starts_in_a_resumed_run_at_start_step(make_config: MakeConfig) -> None:
    plain = Path(run_local(make_config("run.name=plain", "checkpoint={every_steps: 2, keep_last: null}"))["folder"])
    resume = f"checkpoint={{resume: {plain / 'checkpoints' / 'step-00000004'}}}"
    with pytest.raises(CheckpointError, match=r"no averaged weights: .* set ema.start_step=4"):
        run_local(make_config(resume, EMA, "run.name=refused"))
    late = "ema={decay: 0.7, start_step: 4}"
    resumed = Path(run_local(make_config(resume, late, "run.name=resumed"))["folder"])
    whole = Path(run_local(make_config(late, "run.name=whole"))["folder"])
    expected = read_tensors(whole / "checkpoints" / "step-00000006", is_average)
    for name, tensor in read_tensors(resumed / "checkpoints" / "step-00000006", is_average).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_has_no_average(make_config: MakeConfig, stage: int) -> None:
    config = make_config(EMA, "accelerator.name=deepspeed", f"accelerator.stage={stage}")
    with pytest.raises(ConfigError, match=r"ema: ZeRO stages 1 to 3 .* use fsdp, ddp, or accelerator.stage=0"):
        check_names(config)
    check_names(make_config(EMA, "accelerator.name=deepspeed", "accelerator.stage=0"))


@pytest.mark.parametrize("wrong", ["{decay: 1}", "{decay: 0}", "{every_steps: 0}", "{start_step: -1}", "{dekay: 0.9}"])
def test_bad_input(make_config: MakeConfig, wrong: str) -> None:
    with pytest.raises(ConfigError, match="ema"):
        make_config(f"ema={wrong}")
