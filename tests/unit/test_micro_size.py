"""`batch.micro_size: auto`: sizes are tried until memory runs out, which does not end the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, MakeConfig, comparable, read_jsonl

from myllm_ray import train
from myllm_ray.config import ConfigError, TrainingError, load_config
from myllm_ray.orchestration import micro_size
from myllm_ray.orchestration.micro_size import out_of_memory, with_micro_size


def tried(fits: int) -> tuple[list[int], Any]:
    """Returns the list of tried sizes and a stub of the memory test in which sizes up to `fits` succeed."""
    seen: list[int] = []

    def call(function: Any, raw: Any, size: int, limit: Any) -> str:
        seen.append(size)
        return "" if size <= fits else "no memory"

    return seen, call


@pytest.mark.parametrize(("fits", "found"), [(1, 1), (2, 2), (3, 2), (7, 4), (64, 16)])
def test_the_largest_size_that_fits_is_found_by_bisection(make_config: MakeConfig, fits: int, found: int) -> None:
    config = make_config("batch.micro_size=auto", "batch.global_size=32", "scaling.workers=2", "accelerator.name=ddp")
    seen, call = tried(fits)
    resolved = with_micro_size(config, call)
    assert (resolved.batch.micro_size, resolved.batch.find_micro_size) == (found, False)
    assert len(seen) <= 3  # of 1, 2, 4, 8, 16
    assert config.batch.find_micro_size


def test_nothing_fits(make_config: MakeConfig) -> None:
    with pytest.raises(TrainingError, match="not even one row fits: no memory"):
        with_micro_size(make_config("batch.micro_size=auto"), tried(0)[1])


@pytest.mark.slow
def test_running_out_of_memory_is_handled(make_config: MakeConfig) -> None:
    """Tries two sizes in a separate process, with a memory limit between their requirements."""
    model = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    raw = make_config("data.sequence_length=160", "data.packing=false", model={"config": model}).model_dump(mode="json")
    raw["batch"] |= {"global_size": 64}
    limit = int(2.5 * 2**30)
    assert out_of_memory(raw, 1, limit) == ""
    assert "memory" in out_of_memory(raw, 256, limit)
    raw["scheduler"]["name"] = "json:loads"  # raises TypeError: no schedule
    with pytest.raises(TrainingError, match="a try with 1 failed"):
        out_of_memory(raw, 1, None)
    raw["model"]["config"]["num_attention_heads"] = 7
    with pytest.raises(ConfigError, match=r"model\.config"):
        out_of_memory(raw, 1, None)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (4, ()),
        (
            1,
            (
                "trainer=dpo",
                "dpo={loss: kto, reference: precomputed}",
                "data.train={source: brackets, format: unpaired, limit: 40}",
            ),
        ),
    ],
    ids=["the longest rows have no target", "kto, precomputed"],
)
def test_a_size_is_tried_on_the_longest_row_with_a_target(
    make_config: MakeConfig, tmp_path: Path, size: int, overrides: tuple[str, ...]
) -> None:
    (tmp_path / "rows.json").write_text(
        json.dumps([{"instruction": "x" * (200 * (i % 2)), "output": "answer"} for i in range(32)])
    )
    raw = make_config(
        f"data.train.path={tmp_path}/rows.json",
        "data.validation=null",
        "data.packing=false",
        "data.sequence_length=96",
        *overrides,
    ).model_dump(mode="json")
    micro_size._try(raw, size, str(tmp_path / "try"))
    assert len(read_jsonl(tmp_path / "try" / "run" / "ledger.jsonl")) == 2


def test_a_run_records_the_found_size_and_resumes_with_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("batch.micro_size=auto", "run.max_steps=3", "checkpoint.resume=auto")
    monkeypatch.setattr(micro_size, "out_of_memory", lambda raw, size, limit: "no memory" if size > 4 else "")
    first = train(config)
    recorded = yaml.safe_load((Path(first.folder) / "config.yaml").read_text())
    assert recorded["batch"] == {"global_size": 8, "micro_size": 4, "find_micro_size": False}
    same = train(make_config("batch.micro_size=4", "run.max_steps=3", "run.name=number"))
    assert comparable(first.folder) == comparable(same.folder)
    monkeypatch.setattr(micro_size, "out_of_memory", lambda *_: pytest.fail("it is known"))
    assert train(make_config("batch.micro_size=auto", "run.max_steps=5", "checkpoint.resume=auto")).step == 5


@pytest.mark.slow
def test_wrong_uses_are_reported(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch\.micro_size"):
        make_config("batch.micro_size=automatic")
    with pytest.raises(ConfigError, match="can't be found for grpo"):
        with_micro_size(load_config(ROOT / "configs" / "tiny_grpo.yaml", ["batch.micro_size=auto"]))
    with pytest.raises(ConfigError, match=r"nowhere\.json") as error:
        train(make_config("batch.micro_size=auto", data={"train": {"path": "/nowhere.json", "format": "instruction"}}))
    assert "\n" not in str(error.value)
