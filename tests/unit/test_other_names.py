"""The error for a key or name of another tool, or for a misplaced key, names the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, MakeConfig

from myllm_ray.config import ConfigError, TrainerConfig, load_config, validate
from myllm_ray.config.other_names import KEYS, NAMES, keys_of
from myllm_ray.config.resolve import SHORT_NAMES, import_path, load_object
from myllm_ray.config.trainers import builtin_config_classes


def test_every_answer_is_a_key_or_a_name() -> None:
    keys = {key for cls in builtin_config_classes().values() for key in keys_of(cls)}
    assert {answer.split()[0].partition("=")[0] for answer in KEYS.values()} <= keys
    assert not set(KEYS) & keys, "a top-level key needs no other name"
    for kind, table in NAMES.items():
        assert {answer.split()[0] for answer in table.values()} <= set(SHORT_NAMES[kind])
        assert not set(table) & set(SHORT_NAMES[kind])


def resolve_names(config: TrainerConfig) -> None:
    import_path("formats", config.data.sources[0].format, "data.train.format")
    import_path("trainers", config.trainer, "trainer")
    import_path("accelerators", config.accelerator.name, "accelerator.name")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("max_steps=3", "unknown key max_steps: use run.max_steps"),
        ("learning_rate=1", "unknown key learning_rate: use optimizer.lr"),
        ("optimizer.learning_rate=1", "unknown key optimizer.learning_rate: use optimizer.lr"),
        ("lr=1", "unknown key lr: use optimizer.lr"),
        ("epochs=1", "unknown key epochs: use run.epochs"),
        ("batch_size=4", "unknown key batch_size: use batch.global_size"),
        ("per_device_train_batch_size=4", "use batch.micro_size"),
        ("gradient_accumulation_steps=4", "use batch.global_size .*split into micro-batches of batch.micro_size"),
        ("num_train_epochs=1", "use run.epochs"),
        ("warmup_ratio=0.1", "use scheduler.warmup_ratio"),
        ("bf16=true", "use accelerator.precision=bf16"),
        ("output_dir=x", "use run.storage"),
        ("max_seq_length=9", "use data.sequence_length"),
        ("sequence_length=9", "use data.sequence_length"),
        ("dataset=x", "use data.train.path"),
        ("data.path=x", "use data.train.path$"),
        ("model_name_or_path=x", "use model.name"),
        ("model.lora.r=4", "use model.lora.rank"),
        ("lora_r=4", "use model.lora.rank"),
        ("model.lora.use_dora=true", "use model.lora.dora"),
        ("model.lora.layers_to_transform=[1]", "use model.lora.layers"),
        ("optimizer.warmup_steps=3", "use scheduler.warmup_steps"),
        ("workers=2", "use scaling.workers"),
        ("stage=sft", "use trainer .*accelerator.stage"),
        ("every_steps=3", "use checkpoint.every_steps or evaluation.every_steps or logging.every_steps"),
        ("num_generations=4", "use grpo.group_size with trainer: grpo"),
        ("beta=0.1", "use dpo.beta with trainer: dpo"),
        ("dpo.beta=0.1", "unknown key dpo: use it with trainer: dpo"),
        ("learning_rat=1", "did you mean optimizer.lr"),
        ("sequence_lenght=9", "did you mean data.sequence_length"),
        ("data.train.format=alpaca", "did you mean instruction"),
        ("data.train.format=ShareGPT", "did you mean chat"),
        ("accelerator.name=zero3", "did you mean deepspeed .with accelerator.stage=3"),
        ("trainer=kto", "did you mean dpo"),
        ("model=gpt2", "model is a section of keys, not one value: write model.name=gpt2"),
        ("data.train=rows.json", "data.train is a section of keys, not one value: write data.train.path=rows.json"),
    ],
)
def test_the_right_key_is_named(make_config: MakeConfig, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        resolve_names(make_config(override))
    assert "\n" not in str(caught.value)


def test_several_wrong_keys_are_named_at_once() -> None:
    raw = {"model_name_or_path": "gpt2", "dataset": "a.json", "learning_rate": 1, "num_train_epochs": 1, "bf16": True}
    with pytest.raises(ConfigError) as caught:
        validate(raw)
    said = str(caught.value)
    assert all(f"use {key}" in said for key in ("model.name", "data.train.path", "optimizer.lr", "run.epochs"))
    assert "(and " in said


def test_an_import_path_has_no_slash() -> None:
    with pytest.raises(ConfigError, match=r"write module:name, here lib\.rewards:starts"):
        load_object("lib/rewards:starts", "reward")


def test_a_config_that_is_data(tmp_path: Path) -> None:
    row = {"instruction": "a", "output": "b"}
    (tmp_path / "list.json").write_text(json.dumps([row, row], indent=1))
    (tmp_path / "lines.json").write_text(json.dumps(row) + "\n" + json.dumps(row))
    (tmp_path / "lines.jsonl").write_text(json.dumps(row))
    (tmp_path / "rows.yaml").write_text("- {a: 1}\n- {a: 2}\n")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "rows.parquet")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(
            ConfigError, match=f"{path} is a data file, not a config.*data.train={{path: {path}, format"
        ):
            load_config(path)
    with pytest.raises(ConfigError, match="is a folder, not a config file"):
        load_config(tmp_path)


def test_configs_of_this_package_are_not_taken_for_data() -> None:
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        load_config(path)
