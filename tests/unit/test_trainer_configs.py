"""The classes that validate a trainer's part of a config: of built-in, derived and custom trainers."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
import torch
from conftest import MakeConfig

from myllm_ray import DPOConfig, TrainerConfig
from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.config import ConfigError, resolve, validate
from myllm_ray.config.json_schema import json_schema
from myllm_ray.config.sections import Section
from myllm_ray.config.trainers import TrainerSection, config_class
from myllm_ray.engine.checkpointing.starting_weights import named_models
from myllm_ray.engine.settings import EngineSettings
from myllm_ray.model_checks import check_dependencies
from myllm_ray.trainers.dpo import DPOTrainer
from myllm_ray.trainers.grpo import GRPOTrainer
from myllm_ray.trainers.kto import KTOTrainer
from myllm_ray.trainers.sft import SFTTrainer

RAW: dict[str, Any] = {
    "model": {"config": {"model_type": "gpt2"}},
    "tokenizer": {"kind": "bytes"},
    "data": {"train": {"path": "rows.jsonl", "format": "preference"}},
    "run": {"max_steps": 1},
}
HERE = __name__


class PlainDPO(DPOTrainer):
    """Inherits settings and constructor."""


class KeywordSFT(SFTTrainer):
    """Overrides the constructor without declaring `Config`."""

    def __init__(self, *arguments: Any, scale: float = 1.0, **named: Any):
        super().__init__(*arguments, **named)
        self.scale = scale


class KeywordGRPO(GRPOTrainer):
    """The same, with sections that belong to the trainer."""

    def __init__(self, *arguments: Any, scale: float = 1.0, **named: Any):
        super().__init__(*arguments, **named)


class RequiredDPO(DPOTrainer):
    """A key without a default."""

    class Config(DPOTrainer.Config):
        need: int


class WrongConfig(SFTTrainer):
    """`Config` is a section, but not a trainer's."""

    class Config(Section):  # type: ignore[assignment]
        z: int = 1


def tiny() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def test_settings_of_a_derived_trainer_are_its_options() -> None:
    config = validate({**RAW, "trainer": f"{HERE}:PlainDPO", "options": {"beta": 0.3, "reference_model": "runs/other"}})
    assert config.trainer_section.beta == 0.3  # type: ignore[attr-defined]
    assert [key for _, _, key in named_models(config)] == ["options.reference_model"], "made absolute and verified"


@pytest.mark.parametrize(
    ("trainer", "options", "says"),
    [
        ("KeywordSFT", {"train_on_prompt": True}, "options train_on_prompt would be ignored in part"),
        ("KeywordGRPO", {"scale": 2.0}, "the section rollout would be ignored in part"),
    ],
)
def test_settings_that_only_the_constructor_would_see_are_refused(
    trainer: str, options: dict[str, Any], says: str
) -> None:
    """The data was tokenized, and rewards were made, without them."""
    config = validate({**RAW, "trainer": f"{HERE}:{trainer}", "options": options})
    kind = "prompts" if trainer == "KeywordGRPO" else "tokens"
    with pytest.raises(ConfigError, match=says):
        check_dependencies(config, kind)


def test_own_keywords_of_a_derived_trainer_are_accepted() -> None:
    config = validate({**RAW, "trainer": f"{HERE}:KeywordSFT", "options": {"scale": 2.0}})
    check_dependencies(config, "tokens")
    assert KeywordSFT(tiny(), **config.options).scale == 2.0


def test_a_config_class_is_for_its_trainer() -> None:
    """`TrainerConfig(trainer="sft", options=...)` trained without the options."""
    made = DPOConfig(**RAW)
    assert (made.trainer, type(pickle.loads(pickle.dumps(made)))) == ("dpo", type(made))
    with pytest.raises(ValueError, match="TrainerConfig is not for trainer sft: use SFTConfig"):
        TrainerConfig(**RAW, trainer="sft")
    with pytest.raises(ValueError, match="DPOConfig is not for trainer sft"):
        made.trainer = "sft"


@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ("os:getcwd", "trainer: os:getcwd is not a trainer"),
        ("os:path", "trainer: os:path is not a trainer"),
        (f"{HERE}:WrongConfig", "its Config must be a subclass of myllm_ray.TrainerSection"),
    ],
)
def test_what_is_no_trainer_is_refused_in_one_line(trainer: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        validate({**RAW, "trainer": trainer})


def test_what_is_no_accelerator_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"accelerator\.name: os:getcwd must be a subclass of"):
        validate({**RAW, "accelerator": {"name": "os:getcwd"}})


def test_a_format_that_is_a_class_without_settings_is_refused_in_one_line() -> None:
    raw = {**RAW, "data": {"train": {"path": "rows.jsonl", "format": "os:PathLike"}}}
    with pytest.raises(ConfigError, match=r"data\.train\.format: os:PathLike is a class without Config"):
        validate(raw)


def test_errors_of_components_name_the_file() -> None:
    raw = {**RAW, "accelerator": {"name": "fsdp", "options": {"replica": 2}}}
    with pytest.raises(
        ConfigError, match=r"^my\.yaml: accelerator\.options: unknown key replica: did you mean replicas"
    ):
        validate(raw, where="my.yaml")


def test_kto_has_one_class() -> None:
    made = DPOTrainer(tiny(), loss="kto", reference=tiny())
    assert type(made) is KTOTrainer
    assert KTOTrainer(tiny(), reference=tiny(), desirable_weight=2.0).config.loss == "kto"
    with pytest.raises(ConfigError, match="loss=kto: PlainDPO must be a subclass of KTOTrainer"):
        PlainDPO(tiny(), loss="kto", reference=tiny())
    assert RequiredDPO(tiny(), need=1, loss="ipo", reference=tiny()).config.need == 1  # type: ignore[attr-defined]


def test_every_section_of_the_schema_has_its_own_keys() -> None:
    """All sections are classes named `Config`: one hid the others."""
    schema = json_schema([f"{HERE}:RequiredDPO"])

    def keys(section: str) -> set[str]:
        name = schema["properties"][section]["$ref"].rpartition("/")[2]
        return set(schema["$defs"][name]["properties"])

    assert keys("sft") == {"train_on_prompt"}
    assert "centering" in keys("reward")
    assert {"beta", "loss"} <= keys("dpo")
    assert {"clip", "group_size"} <= keys("grpo")
    assert "need" in json.dumps(schema)
    text = json.dumps(schema)
    missing = {part.partition('"')[0] for part in text.split('"#/$defs/')[1:]} - schema["$defs"].keys()
    assert not missing, "every reference has a definition"


def test_a_broken_plugin_does_not_hide_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        name, value = "gone", "gone_pkg:Trainer"

    monkeypatch.setattr(resolve, "entry_points", lambda group: [Gone()])
    with pytest.raises(ConfigError, match=r"unknown key run\.zzz"):
        validate({**RAW, "trainer": "dpo", "run": {"max_steps": 1, "zzz": 1}})


def test_a_reloaded_class_is_validated_by_its_own_config(monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"{HERE}:PlainDPO"
    before = config_class(path)

    class Reloaded(SFTTrainer):
        class Config(TrainerSection):
            new_key: int = 1

    monkeypatch.setattr(f"{HERE}.PlainDPO", Reloaded)
    assert config_class(path) is not before
    assert validate({**RAW, "trainer": path, "options": {"new_key": 2}}).trainer_section.new_key == 2  # type: ignore[attr-defined]


def test_a_failed_setup_fails_again() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    accelerator = SingleGPUAccelerator({"accelerator": {"device": "cuda"}})
    for _ in range(2):
        with pytest.raises(ConfigError, match="torch sees no CUDA device"):
            accelerator.setup()


def test_an_accelerator_constructed_manually_needs_no_name(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="not supported by SingleGPUAccelerator"):
        SingleGPUAccelerator({"accelerator": {"offload": {"parameters": "cpu"}}})
    with pytest.raises(ConfigError, match=r"stage belongs to deepspeed, accelerator\.name is single"):
        make_config("accelerator.stage=3")


def test_options_beside_a_built_in_trainer_are_refused() -> None:
    """They were ignored."""
    with pytest.raises(ConfigError, match=r"options: trainer dpo .*section dpo"):
        validate({**RAW, "trainer": "dpo", "options": {"beta": 0.3}})


def test_an_unknown_key_of_a_short_dict_is_refused() -> None:
    """It was ignored, so the run had the default."""
    with pytest.raises(ConfigError, match="unknown key num_epoch: did you mean num_epochs"):
        EngineSettings.from_config({"num_epoch": 3})
    assert EngineSettings.from_config({"num_epochs": 3}).gradient_clip == 1.0
