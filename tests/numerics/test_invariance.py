"""A step does not depend on the micro-batch size; a run does not depend on callbacks, restarts or dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable, ledger

from myllm_ray.accelerators.base import StepResult
from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.common.types import IGNORE, Batch, Position, RunState
from myllm_ray.config import TrainingError, UserError
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.models.load import build_model
from myllm_ray.trainers.sft import SFTTrainer
from myllm_ray.worker import run_local


class Recording(SingleGPUAccelerator):
    """Records the gradients that reach the optimizer."""

    def optimizer_step(self, gradient_clip: float | None) -> StepResult:
        self.seen = [p.grad.clone() for p in self.module.parameters() if p.grad is not None]
        return super().optimizer_step(gradient_clip)


def unequal_batch(stream: LocalStream) -> Batch:
    """Returns the batch of the first epoch whose rows differ most in the number of trained tokens."""

    def ratio(batch: Batch) -> float:
        counts = torch.cat([(m["labels"] != IGNORE).sum(1) for m in batch.micros])
        return float(counts.max() / counts.min()) if counts.min() else 0.0

    best = max(stream.batches(Position(), stream.steps_in_epoch(0)), key=ratio)
    assert ratio(best) > 5, "the test needs very unequal micro-batches"
    return best


def gradients(make_config: MakeConfig, micro_size: int) -> tuple[float, list[torch.Tensor]]:
    config = make_config(f"batch.micro_size={micro_size}", "data.packing=false", "optimizer.name=sgd")
    prepared = prepare(config)
    model = build_model(config.model, byte_tokenizer(), 160, 0)
    accelerator = Recording(config)
    stream = LocalStream(prepared.train, 0, 1)
    engine = TrainerEngine(
        SFTTrainer(model), accelerator, OptimizerManager(model, config), config=config, stream=stream
    )
    engine.setup()
    batch = unequal_batch(stream)
    _, sums = engine.training_step(batch.micros)
    return sums.reduce(accelerator)["loss"], accelerator.seen


def test_gradients_do_not_depend_on_the_micro_batch_size(make_config: MakeConfig) -> None:
    """Splits global_size 8 into 8×1, 4×2, 2×4 and 1×8 micro-batches."""
    expected_loss, expected = gradients(make_config, 8)
    assert max(float(g.abs().max()) for g in expected) > 1e-3
    for micro_size in (1, 2, 4):
        loss, found = gradients(make_config, micro_size)
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_mean_over_the_global_batch(make_config: MakeConfig) -> None:
    """Compares with plain autograd on the whole batch, row by row, with one division at the end."""
    config = make_config("data.packing=false")
    prepared = prepare(config)
    model = build_model(config.model, byte_tokenizer(), 160, 0)
    batch = unequal_batch(LocalStream(prepared.train, 0, 1))
    total, count = torch.zeros(()), 0
    for micro in batch.micros:
        for row in range(len(micro["input_ids"])):
            logits = model.model(input_ids=micro["input_ids"][row : row + 1], use_cache=False).logits[0, :-1]
            targets = micro["labels"][row, 1:]
            total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
            count += int((targets != -100).sum())
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    loss, found = gradients(make_config, 2)
    assert loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def run(make_config: MakeConfig, name: str, *overrides: str) -> Path:
    return Path(run_local(make_config(f"run.name={name}", *overrides))["folder"])


@pytest.mark.parametrize("accelerator", ["single", "ddp", "fsdp"])
def test_stopped_in_the_second_epoch_and_resumed_is_bitwise_the_same(make_config: MakeConfig, accelerator: str) -> None:
    """Stops at step 13 of 30 within an epoch; the metrics file equals that of an uninterrupted run."""
    common = (
        f"accelerator.name={accelerator}",
        "run.max_steps=30",
        "batch.global_size=4",
        "evaluation.every_steps=10",
        "data.packing=false",
        "checkpoint.resume=auto",
    )
    whole = run(make_config, "whole", *common)

    class Stop(Callback):
        def on_step_end(self, state: RunState) -> None:
            if state.step == 13:
                state.request("stop", "test")

    from myllm_ray import worker

    built = worker.build_callbacks
    try:
        worker.build_callbacks = lambda config: [*built(config), Stop()]
        cut = run(make_config, "cut", *common)
    finally:
        worker.build_callbacks = built
    half = ledger(cut)
    assert half[-1]["step"] == 13
    assert half[-1]["epoch"] == 1
    assert 0 < half[-1]["row"] < 40
    run(make_config, "cut", *common)
    assert comparable(cut) == comparable(whole)
    assert ledger(cut) == ledger(whole)
    assert [r["step"] for r in comparable(cut)] == list(range(1, 31))


def test_steps_trained_again_replace_their_lines(make_config: MakeConfig) -> None:
    """Kills a run after step 7 and resumes it from the checkpoint of step 4: the metrics have one line per step."""
    common = ("run.max_steps=9", "checkpoint.every_steps=4", "checkpoint.resume=auto")
    whole = run(make_config, "whole", *common)

    class Killed(Exception):
        pass

    class Kill(Callback):
        def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
            if state.step == 7:
                raise Killed

    from myllm_ray import worker

    built = worker.build_callbacks
    config = make_config("run.name=cut", *common)
    try:
        worker.build_callbacks = lambda config: [*built(config), Kill()]
        with pytest.raises(Killed):
            run_local(config)
    finally:
        worker.build_callbacks = built
    folder = Path(config.run.storage) / "cut"
    assert [r["step"] for r in ledger(folder)] == list(range(1, 8))
    run_local(config)
    assert comparable(folder) == comparable(whole)


@pytest.mark.parametrize("at", [2, 3, 4])
def test_epoch_boundaries_are_neither_skipped_nor_repeated(make_config: MakeConfig, at: int) -> None:
    """Stops on the second-to-last and last step of an epoch and on the first step of the next one."""
    common = ("run.max_steps=9", "checkpoint.every_steps=1", "checkpoint.keep_last=null", "checkpoint.resume=auto")
    whole = run(make_config, "whole", *common)
    assert [r["step"] for r in ledger(whole) if r["row"] == 0][:2] == [1, 5] or [r["epoch"] for r in ledger(whole)][
        -1
    ] > 0
    cut = run(make_config, "cut", *common)
    for checkpoint in sorted((cut / "checkpoints").iterdir()):
        if int(checkpoint.name[5:]) > at:
            for file in checkpoint.iterdir():
                file.unlink()
            checkpoint.rmdir()
    run(make_config, "cut", *common)
    assert ledger(cut) == ledger(whole)
    assert comparable(cut) == comparable(whole)


def test_a_finished_run_is_left_alone(make_config: MakeConfig) -> None:
    folder = run(make_config, "run", "checkpoint.resume=auto")
    before = comparable(folder)
    assert run_local(make_config("checkpoint.resume=auto"))["step"] == 6
    assert comparable(folder) == before


def test_callbacks_do_not_change_a_run(make_config: MakeConfig) -> None:
    with_display = run(make_config, "a", "callbacks=[console, jsonl, report]", "logging.every_steps=2")
    without = run(make_config, "b")
    logged = {r["step"]: r for r in comparable(without)}
    assert all(logged[r["step"]] == r for r in comparable(with_display))
    assert ledger(with_display) == ledger(without)


def test_dropout_does_not_depend_on_restarts(make_config: MakeConfig) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.3}
    common: dict[str, Any] = {"model": {"config": gpt2}}
    folders = []
    for name, steps in (("whole", (6,)), ("cut", (3, 6))):
        for number in steps:
            config = make_config(
                f"run.name={name}",
                f"run.max_steps={number}",
                "checkpoint.resume=auto",
                "scheduler.decay_steps=6",
                "evaluation.at_end=false",
                **common,
            )
            folders.append(Path(run_local(config)["folder"]))
    assert comparable(folders[-1]) == comparable(folders[0])


def test_non_finite_loss_stops_with_step_and_place(make_config: MakeConfig) -> None:
    config = make_config(
        "optimizer.lr=1e30", "checkpoint.every_steps=1", "gradient_clip=null", "scheduler.warmup_steps=0"
    )
    with pytest.raises(TrainingError, match=r"step \d: the gradient is not finite .*epoch 0, row \d+") as caught:
        run_local(config)
    assert isinstance(caught.value, UserError)
    step = int(str(caught.value).split()[1][:-1])
    kept = sorted(p.name for p in (Path(config.run.storage) / "run" / "checkpoints").iterdir())
    assert kept[-1] == f"step-{step - 1:08d}", "the last good checkpoint is kept"


def test_early_stopping_and_the_best_checkpoint(make_config: MakeConfig) -> None:
    config = make_config(
        "run.max_steps=40",
        "evaluation.every_steps=2",
        "checkpoint.every_steps=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=validation_loss",
        "optimizer.lr=0.05",
        "run.seed=1",
        callbacks=["jsonl", {"early_stopping": {"patience": 2}}],
    )
    summary = run_local(config)
    rows = [r for r in comparable(summary["folder"]) if "validation_loss" in r]
    assert summary["step"] < 40
    assert len(rows) == summary["step"] // 2
    best = min(rows, key=lambda r: r["validation_loss"])["step"]
    kept = {int(p.name[5:]) for p in (Path(summary["folder"]) / "checkpoints").iterdir()}
    assert kept == {best, summary["step"]}
