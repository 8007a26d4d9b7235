"""Reward, DPO, PPO and GRPO: equal runs on every backend, for every number of workers, and after a stop.

Their checkpoints move between backends.
"""

from __future__ import annotations

import json
from pathlib import Path

import helpers
import pytest
from conftest import MakeConfig, comparable, ledger, read_jsonl
from spawned import BACKENDS, run_all

from myllm_ray.config import TrainerConfig
from myllm_ray.data.inspect import rows_of_step
from myllm_ray.preparation import absolute, prepare_data

TRAINERS: dict[str, list[str]] = {
    "reward": ["trainer=reward", "data.train={source: brackets, format: preference}"],
    "dpo": ["trainer=dpo", "dpo.beta=0.5", "data.train={source: brackets, format: preference}"],
    "kto": ["trainer=dpo", "dpo.loss=kto", "dpo.beta=0.5", "data.train={source: brackets, format: unpaired}"],
    "precomputed": [
        "trainer=dpo",
        "dpo={beta: 0.5, reference: precomputed}",
        "data.train={source: brackets, format: preference, limit: 12}",
    ],
    "grpo": [
        "trainer=grpo",
        "grpo={reward: 'helpers:variety', group_size: 4, kl_weight: 0.05}",
        "data.train={source: brackets, format: prompt, limit: 30}",
    ],
    "ppo": [
        "trainer=ppo",
        "ppo={reward: 'helpers:variety', epochs: 1, minibatches: 2, kl_target: 0.5}",
        "data.train={source: brackets, format: prompt, limit: 30}",
    ],
}
COMMON = [
    "data.validation=null",
    "data.sequence_length=32",
    "run.max_steps=6",
    "optimizer.lr=1e-3",
    "checkpoint.at_end=false",
    "logging.samples_every_steps=2",
]


def config_of(make_config: MakeConfig, kind: str, *overrides: str) -> TrainerConfig:
    # Answers have different lengths, so ranks call the model different numbers of times.
    rollout = (
        ["rollout.max_new_tokens=8", f"rollout.stop={json.dumps(list('aeinorst([{'))}"]
        if kind in ("grpo", "ppo")
        else []
    )
    return make_config(*COMMON, *rollout, *TRAINERS[kind], *overrides)


def assert_same(folder: Path, expected: Path, tolerance: float = 2e-4) -> None:
    assert ledger(folder) == ledger(expected), folder.name
    found, wanted = comparable(folder), comparable(expected)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            if name not in ("calibration_error",):  # it is binned, so a rounding difference can move a pair
                assert row[name] == pytest.approx(value, rel=tolerance, abs=2e-5), (folder.name, row["step"], name)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks={"kto": [pytest.mark.promise], "precomputed": [pytest.mark.slow]}.get(kind, []))
        for kind in TRAINERS
    ],
)
def test_every_trainer_on_every_backend(make_config: MakeConfig, kind: str) -> None:
    (single,) = run_all(1, [config_of(make_config, kind, "run.name=single")])
    backends = {name: BACKENDS[name] for name in ("ddp", "fsdp")}
    if kind in ("grpo", "ppo"):  # also shard and release parameters as small as these
        backends["deepspeed-3"] = [
            *BACKENDS["deepspeed-3"],
            'accelerator.options={"zero_optimization": {"stage3_param_persistence_threshold": 0}}',
        ]
    for folder in run_all(
        2, [config_of(make_config, kind, f"run.name={name}", *overrides) for name, overrides in backends.items()]
    ):
        assert_same(folder, single)
        if kind in ("grpo", "ppo"):
            assert read_jsonl(folder / "samples.jsonl") == read_jsonl(single / "samples.jsonl")


def test_a_table_of_the_reference_is_computed_beside_offloading(make_config: MakeConfig) -> None:
    """Regression test: the table was computed by a backend that refused the offloading of the run's backend."""
    offloaded = config_of(
        make_config,
        "precomputed",
        "run.name=offloaded",
        "run.max_steps=2",
        "accelerator={name: fsdp, offload: {parameters: cpu}}",
    )
    (folder,) = run_all(1, [offloaded])  # runs first: the table is stored with the data
    (single,) = run_all(1, [config_of(make_config, "precomputed", "run.name=single", "run.max_steps=2")])
    assert_same(folder, single)


@pytest.mark.parametrize("kind", ["dpo", "grpo", "ppo"])
def test_a_resumed_run_is_the_undisturbed_one(make_config: MakeConfig, kind: str) -> None:
    """Metrics, samples and the state of PPO's controller are equal bit for bit after a stop within an epoch."""
    (whole,) = run_all(1, [config_of(make_config, kind, "run.name=whole")])
    half = ["scheduler.decay_steps=6", "checkpoint.at_end=true", "checkpoint.resume=auto", "run.name=parts"]
    run_all(1, [config_of(make_config, kind, *half, "run.max_steps=4")])
    (parts,) = run_all(1, [config_of(make_config, kind, *half, "run.max_steps=6")])
    assert comparable(parts) == comparable(whole)
    assert ledger(parts) == ledger(whole)
    if kind != "dpo":
        assert read_jsonl(parts / "samples.jsonl") == read_jsonl(whole / "samples.jsonl")


def test_data_shows_the_batch_of_a_step_of_a_trainer_that_makes_several(make_config: MakeConfig) -> None:
    """`myllm-ray data --step N` showed the global batch with this number."""
    config = absolute(config_of(make_config, "ppo"))
    (folder,) = run_all(1, [config])
    spec = prepare_data(config).train
    assert config.steps_per_batch == 2
    for row in ledger(folder):
        position, _, fingerprint = rows_of_step(spec, row["step"], config.steps_per_batch)
        assert (position.epoch, position.row) == (row["epoch"], row["row"])
        assert f"{fingerprint:016x}" == row["tokens_hash"]


def test_reward_functions_get_the_messages_and_the_text_that_the_model_read(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Covers chats and texts; held-out prompts from a separate file come with the columns of that file."""
    for name, form in (("train", "chat"), ("held_out", "text")):
        prompts = [f"Say {name} {i}:" for i in range(8)]
        rows = [
            {"prompt": [{"role": "user", "content": p}] if form == "chat" else p, "answer": p[4:-1]} for p in prompts
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = config_of(
        make_config,
        "grpo",
        "grpo={reward: 'helpers:recorded', group_size: 2}",
        "run.max_steps=1",
        "data.sequence_length=96",
        f"data.train={{path: {tmp_path}/train.json, format: prompt}}",
        "evaluation.at_end=true",
        f"data.validation={{path: {tmp_path}/held_out.json, format: prompt}}",
        "rollout.stop=[':']",
    )
    helpers.SEEN.clear()
    (folder,) = run_all(1, [config])
    trained = [call for call in helpers.SEEN if "train" in call["answer"][0]]
    held_out = [call for call in helpers.SEEN if "held_out" in call["answer"][0]]
    assert len(trained) + len(held_out) == len(helpers.SEEN) == 8, "one call for each micro-batch of prompts"
    for call in trained:
        for prompt, text, answer in zip(call["prompts"], call["prompt_texts"], call["answer"], strict=True):
            assert prompt == [{"role": "user", "content": f"Say {answer}:"}]
            assert text == f"<|im_start|>user\nSay {answer}:<|im_end|>\n<|im_start|>assistant\n"
    for call in held_out:
        assert call["prompts"] == call["prompt_texts"] == [f"Say {answer}:" for answer in call["answer"]]
    row = comparable(folder)[-1]
    for name, calls in (("reward", trained), ("validation_reward", held_out)):
        lengths = [len(ids) for call in calls for ids in call["completion_ids"]]
        assert row[name] == pytest.approx(sum(lengths) / len(lengths))
    assert read_jsonl(folder / "samples.jsonl")[0]["prompt"] == trained[0]["prompt_texts"][0]
