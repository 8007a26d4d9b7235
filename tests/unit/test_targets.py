"""Runs without training targets are refused, and runs that cut off targets are reported, before they start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeConfig, comparable
from spawned import run_all
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray import OptimizerManager, SFTTrainer, SingleGPUAccelerator, TrainerEngine
from myllm_ray.common.types import IGNORE, RunState
from myllm_ray.config.errors import DataError, TrainingError
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.inspect import describe
from myllm_ray.data.prepare import prepare
from myllm_ray.data.targets import count_targets
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.stream import InMemoryStream


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.packing=false",),
        ("data.overflow=split",),
        ("data.overflow=split", "data.packing=false"),
        ("trainer=pretrain",),
        ("data.train.weight=2.5",),
        ("sft.train_on_prompt=true",),
        ("data.sequence_length=16",),
    ],
    ids=lambda o: ",".join(o) or "default",
)
def test_targets_are_counted_as_the_collator_makes_them(make_config: MakeConfig, overrides: tuple[str, ...]) -> None:
    prepared = prepare(make_config("data.sequence_length=64", *overrides))
    for spec in (prepared.train, prepared.validation):
        assert spec is not None
        rows = spec.plan.rows_in_epoch(0)
        micro = to_tensors(spec.build(0, 0, rows))
        found = count_targets(spec.plan)
        assert found.rows.tolist() == (micro["labels"][:, 1:] != IGNORE).sum(1).tolist()
        assert [a.tolist() if isinstance(a, np.ndarray) else a for a in count_targets(spec.plan)] == [
            found.rows.tolist(),
            *found[1:],
        ], "from the cache"
    report = describe(prepared, byte_tokenizer())
    kept = int((to_tensors(prepared.train.build(0, 0, prepared.train.plan.rows_in_epoch(0)))["source_ids"] >= 0).sum())
    assert report.trained_share == count_targets(prepared.train.plan).kept / kept


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text(json.dumps([{"instruction": q, "output": a} for q, a in rows]))
    return path


LONG, SHORT = ("x" * 300, "answer"), ("x", "answer")


@pytest.mark.parametrize(
    ("rows", "held_out", "overrides", "message"),
    [
        (
            [LONG] * 16,
            None,
            (),
            r"data.train: there is nothing to train on: the tokens to train on in documents 0, 1, 2, 3, 4 and 11 more "
            r"of train are after data.sequence_length=128, where documents are cut off; "
            r"increase it, or set data.overflow=split",
        ),
        (
            [SHORT] * 4 + [LONG] * 4 + [SHORT] * 4,
            None,
            (),
            r"data.train: the batch of step 2 \(rows 4 to 7\) has nothing to train on: "
            r".* documents 4, 5, 6, 7 of train",
        ),
        ([SHORT] * 9, [LONG], (), "data.validation: there is nothing to train on: .* document 0 of held_out are"),
        (
            [SHORT] * 9,
            [LONG] * 4 + [SHORT],
            ("evaluation.max_batches=1",),
            "data.validation: there is nothing to train on: .* documents 0, 1, 2, 3 of held_out",
        ),
        (
            [SHORT] * 4 + [("x" * 1200, "a")],
            None,
            ("data.overflow=split",),
            r"rows 4 to 7\) has nothing to train on: these pieces of document 4 of train, split to",
        ),
    ],
)
def test_nothing_to_train_on_is_refused_before_anything_is_written(
    make_config: MakeConfig, tmp_path: Path, rows: Any, held_out: Any, overrides: tuple[str, ...], message: str
) -> None:
    common = [
        f"data.train.path={write(tmp_path / 'train.json', rows)}",
        "data.sequence_length=128",
        "data.packing=false",
        "data.shuffle=none",
        "batch.global_size=4",
        "data.validation=null",
    ]
    if held_out:
        common[-1] = f"data.validation={{path: {write(tmp_path / 'held_out.json', held_out)}, format: instruction}}"
    with pytest.raises(DataError, match=message):
        run_all(1, [make_config(*common, *overrides)])
    assert not (tmp_path / "runs").exists()


def test_what_the_run_does_not_read_may_be_empty(make_config: MakeConfig, tmp_path: Path) -> None:
    """Batches after run.max_steps may be empty, and batches of a validation set that has targets in other batches."""
    train = write(tmp_path / "train.json", [SHORT] * 4 + [LONG] * 4)
    held_out = write(tmp_path / "held_out.json", [LONG] * 4 + [SHORT])
    (folder,) = run_all(
        1,
        [
            make_config(
                f"data.train.path={train}",
                f"data.validation={{path: {held_out}, format: instruction}}",
                "run.max_steps=1",
                "data.sequence_length=128",
                "data.packing=false",
                "data.shuffle=none",
                "batch.global_size=4",
            )
        ],
    )
    assert comparable(folder)[-1]["validation_loss"] > 0


def test_the_share_that_is_cut_off_is_reported_at_the_start(make_config: MakeConfig, warned: list[str]) -> None:
    from myllm_ray.preparation import warn_of_data

    prepared = prepare(make_config("data.sequence_length=64", "data.validation=null"))
    found = count_targets(prepared.train.plan)
    warn_of_data(prepared)
    assert 0 < found.kept < found.whole
    assert warned == [
        f"data.sequence_length=64 cuts off {found.cut} documents, and {1 - found.kept / found.whole:.1%} of the "
        f"tokens to train on; {found.lost} documents have no such token left "
        "(data.overflow sets how long documents are handled)"
    ]
    assert describe(prepared, byte_tokenizer()).warnings[0] == warned[0]
    warned.clear()
    warn_of_data(prepare(make_config("data.sequence_length=1024")))
    warn_of_data(prepare(make_config("data.sequence_length=64", "data.overflow=split")))
    assert not warned


def by_hand(rows: list[dict[str, Any]], validation: list[dict[str, Any]] | None = None) -> TrainerEngine:
    shape = AutoConfig.for_model(
        "gpt2", n_embd=16, n_layer=1, n_head=2, vocab_size=20, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = AutoModelForCausalLM.from_config(shape)
    config = {"max_steps": 2, "batch_size": 2, "optimizer": {"name": "sgd", "lr": 0.1}}
    engine = TrainerEngine(
        SFTTrainer(model, rows),
        SingleGPUAccelerator(config),
        OptimizerManager(model, config),
        config=config,
        validation=InMemoryStream(validation, 2) if validation else None,
    )
    engine.setup()
    return engine


def test_a_batch_without_a_target_ends_the_run_and_an_empty_evaluation_has_no_loss(warned: list[str]) -> None:
    """Covers what is detected only while training: another trainer, a custom stream, a later epoch."""
    masked = {"input_ids": [1, 2, 3], "labels": [IGNORE] * 3}
    with pytest.raises(TrainingError, match=r"step 1 \(epoch 0, rows from 0\) has nothing to train on"):
        by_hand([masked] * 4).train()
    engine = by_hand([{"input_ids": [1, 2, 3]}] * 4, [masked] * 3)
    engine.train()
    assert engine.evaluate() == {}
    assert engine.metrics["loss"] > 0
    assert not any(name.startswith("validation") for name in engine.metrics)
    assert any("contains no target token" in line for line in warned)


def test_callbacks_of_an_evaluation_make_no_graph() -> None:
    """Under DDP a forward pass with a graph and without a backward pass breaks the next one."""
    seen: list[bool] = []

    class Looks(Callback):
        def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
            seen.append(torch.is_grad_enabled())

    rows = [{"input_ids": [1, 2, 3]}] * 4
    engine = by_hand(rows, rows)
    engine.callbacks.callbacks.append(Looks())
    engine.evaluate()
    assert seen == [False]


def test_a_later_epoch_names_the_documents(make_config: MakeConfig, tmp_path: Path) -> None:
    """Every batch of the first epoch has a target, and one batch of the second epoch has no target."""
    train = write(tmp_path / "train.json", [SHORT] * 4 + [LONG] * 4)
    common = (
        f"data.train.path={train}",
        "data.validation=null",
        "data.sequence_length=128",
        "data.packing=false",
        "batch.global_size=2",
        "batch.micro_size=2",
        "run.max_steps=24",
    )

    def empty(seed: int) -> list[bool]:
        plan = prepare(make_config(*common, f"run.seed={seed}")).train.plan
        return [(count_targets(plan, epoch).rows.reshape(-1, 2).sum(1) == 0).any() for epoch in range(6)]

    seed = next(s for s in range(50) if (found := empty(s))[1] and not found[0])
    with pytest.raises(
        TrainingError,
        match=r"\(epoch 1, rows from \d\) has nothing to train on: "
        r"no token of documents [4-7], [4-7] of train is trained on",
    ):
        run_all(1, [make_config(*common, f"run.seed={seed}")])


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_answers_that_are_all_left_out_are_a_step_with_a_zero_gradient(
    make_config: MakeConfig, warned: list[str], loss: str
) -> None:
    """With grpo.mask_truncated and a model that never ends an answer, dapo warns once and logs no loss instead of 0."""
    config = make_config(
        "trainer=grpo",
        f"grpo={{reward: 'helpers:variety', group_size: 2, mask_truncated: true, loss: {loss}}}",
        "data.validation=null",
        "data.train={source: brackets, format: prompt, limit: 8}",
        "rollout={max_new_tokens: 1, top_k: 1}",
        "data.sequence_length=32",
        "run.max_steps=2",
        "optimizer={name: sgd, lr: 0.1}",
        "batch.global_size=4",
    )
    (folder,) = run_all(1, [config])
    rows = comparable(folder)
    assert [(row["ended"], row["tokens"], row["grad_norm"], row["length"]) for row in rows] == [
        (0.0, 0.0, 0.0, 1.0)
    ] * 2
    assert [row.get("loss") for row in rows] == ([None, None] if loss == "dapo" else [0.0, 0.0])
    said = [m for m in warned if "none of its answers has ended" in m]
    assert len(said) == (loss == "dapo")


def test_a_rank_that_waits_for_the_weight_of_a_batch_is_in_phase_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the phase was rollout, also in runs without rollouts."""
    engine, phases, seen = by_hand([{"input_ids": [1, 2, 3]}] * 4), [], []
    weigh = engine.trainer.batch_weight
    monkeypatch.setattr(engine.heartbeat, "enter", lambda phase, step: phases.append((phase, step)))
    monkeypatch.setattr(engine.trainer, "batch_weight", lambda micro: (seen.append(phases[-1]), weigh(micro))[1])
    engine.train()
    assert seen == [("forward", 1), ("forward", 2)]
