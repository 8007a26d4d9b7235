"""Shared by all tests: small data, small configs, one Ray cluster per session."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import environment  # noqa: F401  (cleans os.environ, before anything reads it)

# isort: split
import machine
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from myllm_ray.config import TrainerConfig, validate
from myllm_ray.config.load import apply_override

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "tie_word_embeddings": True}

torch.set_num_threads(1)


def instruction_rows(count: int = 48, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose answers are of very unequal length."""
    rng = random.Random(seed)
    words = ["red", "green", "blue", "seven", "apple", "river", "stone", "cloud"]
    rows = []
    for i in range(count):
        question = " ".join(rng.choices(words, k=rng.randint(1, 5)))
        answer = " ".join(rng.choices(words, k=rng.choice([1, 1, 2, 12])))
        rows.append({"instruction": f"say {question} {i}", "input": "", "output": answer})
    return rows


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def comparable(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


def ledger(folder: str | Path) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / "ledger.jsonl")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(instruction_rows()))
    return path


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Messages of the package's log."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("myllm_ray").addHandler(handler)
    yield messages
    logging.getLogger("myllm_ray").removeHandler(handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(params=["poor", "rich"])
def any_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs twice: on a CPU without bf16 and fp16 arithmetic, and on one with both."""
    return _cpu(monkeypatch, request.param)


@pytest.fixture
def fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.multiprocessing.spawn` takes its processes from the tests' fork server."""
    from spawned import start_processes  # imports all that workers do

    monkeypatch.setattr(torch.multiprocessing, "spawn", lambda function, arguments, nprocs: start_processes(function, arguments, nprocs))


@pytest.fixture
def cpu_with_fp16(monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU that reports fp16 arithmetic, here and in the processes that the test starts; torch emulates it."""
    return _cpu(monkeypatch, "rich")


def _cpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    for name in machine.OPERATORS:  # put back after the test
        monkeypatch.setattr(torch.ops.mkldnn, name, getattr(torch.ops.mkldnn, name))
    monkeypatch.setenv(machine.VARIABLE, kind)
    machine.apply_cpu()
    return kind


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/golden.json instead of comparing with it")


class TwoProcesses(LoadScopeScheduling):
    """How `make test` shares the tests: a file is a unit, and all that uses Ray is one, so that one Ray serves it."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "on_ray" if "on_ray/" in path else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoProcesses:
    return TwoProcesses(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses Ray begins first: it takes longest."""
    items.sort(key=lambda item: "on_ray" not in item.path.parts)


MakeConfig = Callable[..., TrainerConfig]


@pytest.fixture
def make_config(tmp_path: Path, data_file: Path, cache: Path) -> MakeConfig:
    """`make_config("optimizer.lr=1", name="x")`: a tiny SFT config with overrides."""

    def make(*overrides: str, **top: Any) -> TrainerConfig:
        raw: dict[str, Any] = {
            "trainer": "sft", "model": {"config": dict(LLAMA)}, "tokenizer": {"kind": "bytes"},
            "data": {"train": {"path": str(data_file), "format": "instruction"}, "validation": {"split": 0.1},
                     "sequence_length": 160, "cache": str(cache)},
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
            "scheduler": {"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
            "run": {"name": "run", "storage": str(tmp_path / "runs"), "max_steps": 6},
            "callbacks": ["jsonl"], **top}
        for override in overrides:
            apply_override(raw, override)
        return validate(raw)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray for the whole session, with more logical CPUs than cores: 4 workers and the data tasks beside them."""
    import ray

    from myllm_ray.orchestration import session

    path = os.pathsep.join([str(ROOT / "examples" / "custom_trainer"), str(ROOT / "tests")])
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
             runtime_env={"env_vars": {"PYTHONPATH": path}, **session.interpreter()})
    yield
    ray.shutdown()
