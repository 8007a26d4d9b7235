"""Arbitrary inputs: success or a one-line error, never a traceback, a hang or a half-written run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import LLAMA, MakeConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myllm_ray import train
from myllm_ray.config import DataError, UserError, load_config, validate
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.sources import list_units, read_unit
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest
from myllm_ray.engine.checkpointing.verification import manifest_checksum
from myllm_ray.engine.run_folder import check_same_run

FUZZ = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
GOOD: dict[str, Any] = {
    "trainer": "sft",
    "model": {"config": dict(LLAMA)},
    "tokenizer": {"kind": "bytes"},
    "data": {"train": {"path": "rows.json", "format": "instruction"}, "sequence_length": 64},
    "batch": {"global_size": 4, "micro_size": 2},
    "run": {"max_steps": 2},
    "scaling": {"workers": 2, "max_failures": 1},
    "accelerator": {"name": "ddp", "offload": {"optimizer": "none"}},
    "stability": {"on_spike": "skip"},
}
PATHS = [
    ("trainer",),
    *((section,) for section in GOOD),
    *((section, key) for section, inner in GOOD.items() if isinstance(inner, dict) for key in inner),
]


def one_line(error: UserError) -> None:
    assert str(error).strip()
    assert "\n" not in str(error).strip(), str(error)


@FUZZ
@given(path=st.sampled_from(PATHS), value=JSON)
def test_configs(path: tuple[str, ...], value: Any) -> None:
    raw = json.loads(json.dumps(GOOD))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    try:
        validate(raw)
    except UserError as error:
        one_line(error)


@FUZZ
@given(
    content=st.binary(max_size=200)
    | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    | JSON.map(lambda v: json.dumps(v).encode())
)
def test_config_files(tmp_path: Path, content: bytes) -> None:
    for name in ("c.yaml", "c.json"):
        (tmp_path / name).write_bytes(content)
        try:
            load_config(tmp_path / name)
        except UserError as error:
            one_line(error)


@FUZZ
@given(override=st.text(max_size=30))
def test_overrides(tmp_path: Path, override: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(GOOD))
    try:
        load_config(tmp_path / "c.json", [override])
    except UserError as error:
        one_line(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    manager = CheckpointManager(folder=tmp_path_factory.mktemp("run") / "checkpoints")
    return manager.save(
        3, {"model.w": torch.ones(3)}, {"position": {"epoch": 0, "row": 4}, "config": {}, "identity": {}}
    )


@FUZZ
@given(
    key=st.sampled_from(["format", "step", "position", "files", "tensors", "config", "identity", "metrics", None]),
    value=JSON,
    signed=st.booleans(),
)
def test_manifests(checkpoint: Path, make_config: MakeConfig, key: str | None, value: Any, signed: bool) -> None:
    path = checkpoint / "manifest.json"
    before = path.read_text()
    try:
        manifest = {**json.loads(before), key: value} if key else value
        if signed and isinstance(manifest, dict):
            manifest["checksum"] = manifest_checksum(json.loads(json.dumps(manifest)))
        path.write_text(json.dumps(manifest))
        damage = find_damage(checkpoint)
        assert damage is None or "\n" not in damage
        CheckpointManager(folder=checkpoint.parent, keep_best="loss").best()
        assert (CheckpointManager(folder=checkpoint.parent).latest() is None) == (damage is not None)
        if damage is None:
            read_manifest(checkpoint)
            check_same_run(checkpoint, make_config(), {"tokens": 1, "batch.global_size": 8, "rows": 1})
    except UserError as error:
        one_line(error)
    finally:
        path.write_text(before)


ROWS = (
    JSON
    | st.fixed_dictionaries({"instruction": JSON, "output": JSON})
    | st.fixed_dictionaries(
        {"messages": st.lists(JSON | st.fixed_dictionaries({"role": JSON, "content": JSON}), max_size=3)}
    )
)


@FUZZ
@given(
    lines=st.lists(ROWS.map(lambda r: json.dumps(r).encode()) | st.binary(max_size=40), max_size=4),
    suffix=st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".txt"]),
)
def test_data_files(tmp_path: Path, lines: list[bytes], suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\n".join(lines))
    source = SourceSection(path=str(path))
    try:
        for unit in list_units(source, "data.train"):
            list(read_unit(unit, source))
    except DataError as error:
        one_line(error)


@settings(FUZZ, max_examples=25)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=4),
    form=st.sampled_from(["instruction", "chat", "text", "prompt_completion"]),
)
def test_rows_to_a_run(tmp_path: Path, make_config: MakeConfig, rows: list[Any], form: str) -> None:
    """A file of arbitrary rows gives a trained step, or a one-line error and no run folder."""
    data = tmp_path / "odd.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        f"data.train.path={data}",
        f"data.train.format={form}",
        "data.validation=null",
        "run.max_steps=1",
        "run.overwrite=true",
        f"data.cache={tmp_path / 'cache'}",
    )
    folder = Path(config.run.storage) / config.run.name
    existed = folder.exists()
    try:
        assert train(config).step == 1
    except UserError as error:
        one_line(error)
        assert folder.exists() == existed, "nothing half-written"
