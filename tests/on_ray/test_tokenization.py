"""Tokenization on Ray: short work is done in the driver, the rest in tasks. Both give the same store."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MakeConfig

from myllm_ray.config import DataError
from myllm_ray.data.prepare import prepare
from myllm_ray.orchestration import ray_data
from myllm_ray.orchestration.failures import RemoteError


@pytest.mark.usefixtures("ray_cluster")
def test_tokenization_in_tasks(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_of(name: str) -> str:
        return prepare(make_config(f"data.cache={tmp_path / name}"), ray_data.map_units).train.plan.store.content_hash

    in_driver = hash_of("driver")
    monkeypatch.setattr(ray_data, "_LOCAL_SECONDS", -1.0)
    assert hash_of("tasks") == in_driver
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"instruction": "a", "output": "b"}\n{broken\n')
    with pytest.raises(DataError, match=rf"{bad}:2: not valid JSON"):
        prepare(make_config(f"data.train.path={bad}"), ray_data.map_units)
    with pytest.raises(RemoteError, match=r"^KeyError: 'nothing' \(.*helpers.py:\d+ in broken\), in the row at"):
        prepare(make_config("data.train.format=helpers:broken"), ray_data.map_units)


def test_the_driver_passes_the_rest_to_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 9.0, 11.0])
    monkeypatch.setattr(ray_data.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(ray_data, "_map_on_cluster", lambda work, units: (f"task {work(unit)}" for unit in units))
    units = [1, 2, 3, 4]
    assert list(ray_data.map_units(str, units)) == ["1", "2", "task 3", "task 4"]  # type: ignore[arg-type]
