"""The config: accepted values and error messages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, MakeConfig

from myllm_ray.config import ConfigError, SFTConfig, load_config, to_yaml, validate
from myllm_ray.config.json_schema import json_schema
from myllm_ray.config.resolve import import_path, load_object

BASE = """
trainer: sft
model: {config: {model_type: llama}}
tokenizer: {kind: bytes}
data: {train: {path: a.json, format: instruction}}
run: {max_steps: 3}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def test_defaults_and_type(base: Path) -> None:
    config = load_config(base)
    assert isinstance(config, SFTConfig)
    assert config.optimizer.name == "adamw"
    assert config.checkpoint.resume == "never"
    assert config.sft.train_on_prompt is False


def test_overrides_are_parsed_as_yaml(base: Path) -> None:
    config = load_config(
        base, ["optimizer.lr=1e-3", "batch.global_size=16", "data.packing=false", "gradient_clip=null"]
    )
    assert (config.optimizer.lr, config.batch.global_size, config.data.packing) == (1e-3, 16, False)
    assert config.gradient_clip is None


def test_overrides_reach_list_items(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(BASE.replace("{path: a.json, format: instruction}", "[{path: a.json}, {path: b.json}]"))
    assert load_config(path, ["data.train.1.weight=0.5"]).data.sources[1].weight == 0.5
    with pytest.raises(ConfigError, match="not the index of a list item"):
        load_config(path, ["data.train.2.weight=0.5"])


def test_json_is_the_same_as_yaml(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "c.json"
    other.write_text(
        json.dumps(
            {
                "trainer": "sft",
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": {"kind": "bytes"},
                "data": {"train": {"path": "a.json", "format": "instruction"}},
                "run": {"max_steps": 3},
            }
        )
    )
    assert load_config(other) == load_config(base)


def test_include_merges_key_by_key(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "over.yaml"
    path.write_text("include: base.yaml\nrun: {name: other}\noptimizer: {lr: 1.0}\n")
    config = load_config(path)
    assert (config.run.name, config.run.max_steps, config.optimizer.lr) == ("other", 3, 1.0)


def test_include_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml")
    (tmp_path / "b.yaml").write_text("include: a.yaml")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")


def test_environment_variables(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "env.yaml"
    path.write_text("include: base.yaml\nrun: {name: 'x-${RUN_TAG:-none}', seed: '${SEED:-7}'}\n")
    assert (load_config(path).run.name, load_config(path).run.seed) == ("x-none", 7)
    monkeypatch.setenv("RUN_TAG", "t1")
    monkeypatch.setenv("SEED", "9")
    assert (load_config(path).run.name, load_config(path).run.seed) == ("x-t1", 9)
    path.write_text("include: base.yaml\nrun: {name: '${NOT_SET_ANYWHERE}'}\n")
    with pytest.raises(ConfigError, match="NOT_SET_ANYWHERE is not set"):
        load_config(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimzer.lr=1", "unknown key optimzer: did you mean optimizer?"),
        ("optimizer.lrr=1", "unknown key optimizer.lrr: did you mean lr?"),
        ("sft.train_on_promt=true", "unknown key sft.train_on_promt: did you mean train_on_prompt?"),
        ("data.train.formt=x", "unknown key data.train.formt: did you mean format?"),
        ("optimizer.lr=fast", "optimizer.lr: input should be a valid number"),
        ("optimizer.lr=-1", "optimizer.lr: input should be greater than 0"),
        ("accelerator.precision=fp8", "accelerator.precision: input should be 'fp32', 'bf16' or 'fp16'"),
        ("batch.global_size=6", "batch.global_size=6 is not divisible by"),
        ("scaling.workers=2", "accelerator.name=single trains on one worker"),
        ("run.epochs=2", "give exactly one of max_steps and epochs"),
        ("run.name=a/b", "run.name: string should match pattern"),
        ("tokenizer.path=x", "give exactly one of"),
        ("nonsense", "not of the form key.sub=value"),
    ],
)
def test_mistakes_are_one_clear_line(base: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(base, ["batch.micro_size=4", override])
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    if override != "nonsense":
        assert str(base) in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [1", r"c\.yaml:\d+: not valid YAML"),
        ("- 1", "a config is a mapping"),
        ("", "a config is a mapping"),
        ("model: {name: x}\n", "data is missing|tokenizer is missing"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "c.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml")


def test_resolved_config_reads_back(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_short_names_and_import_paths() -> None:
    assert import_path("trainers", "sft", "trainer") == "myllm_ray.trainers.sft:SFTTrainer"
    assert import_path("trainers", "a.b:C", "trainer") == "a.b:C"
    with pytest.raises(ConfigError, match="did you mean sft"):
        import_path("trainers", "sftt", "trainer")
    with pytest.raises(ConfigError, match="no module 'no_such_module'"):
        load_object("no_such_module:X", "trainer")
    with pytest.raises(ConfigError, match="has no 'nothing'"):
        load_object("json:nothing", "trainer")


def test_installed_packages_add_short_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from myllm_ray.config import resolve

    plugin = EntryPoint("simpo", "their_lab.simpo:SimPOTrainer", "myllm_ray.trainers")
    monkeypatch.setattr(resolve, "entry_points", lambda group: [plugin] if group == plugin.group else [])
    assert import_path("trainers", "simpo", "trainer") == plugin.value
    assert import_path("trainers", "sft", "trainer").endswith("SFTTrainer")


def test_schema_in_the_repository_is_current() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema(), "run `make schema`"


def test_every_config_is_valid_and_names_the_schema() -> None:
    files = sorted((ROOT / "configs").glob("*.yaml"))
    assert len(files) >= 7
    for path in files:
        assert re.match(r"(# Begins from .*\n)?# yaml-language-server: \$schema=schema\.json\n", path.read_text()), path
        load_config(path)


def test_a_custom_trainer_uses_the_base_config() -> None:
    raw = {
        "trainer": "helpers:Sleeper",
        "model": {"name": "x"},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": {"path": "a"}},
        "run": {"max_steps": 1},
        "options": {"rank": 1},
    }
    assert validate(raw).options == {"rank": 1}
    with pytest.raises(ConfigError, match="unknown key sft"):
        validate({**raw, "sft": {}})
