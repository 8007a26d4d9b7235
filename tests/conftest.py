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

from myllm_ray.common.types import is_measured
from myllm_ray.config import TrainerConfig, validate
from myllm_ray.config.load import apply_override

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

torch.set_num_threads(1)


def instruction_rows(count: int = 48, seed: int = 0) -> list[dict[str, str]]:
    """Returns `count` rows whose answers have very unequal lengths."""
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
    """Returns the rows of metrics.jsonl without the values that depend on a clock."""
    rows = read_jsonl(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not is_measured(k)} for row in rows]


def ledger(folder: str | Path) -> list[dict[str, Any]]:
    return read_jsonl(Path(folder) / "ledger.jsonl")


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.json"
    path.write_text(json.dumps(instruction_rows()))
    return path


@pytest.fixture(autouse=True)
def restored_logging() -> Iterator[None]:
    """Restores the package's logger after each test: the command line, called in this process, adds a handler."""
    logger = logging.getLogger("myllm_ray")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Yields the list of messages that the package logs."""
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
    """`torch.multiprocessing.spawn` takes its processes from the fork server of the tests."""
    from spawned import start_processes  # imports everything that workers import

    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda function, arguments, nprocs: start_processes(function, arguments, nprocs)
    )


@pytest.fixture
def cpu_with_fp16(monkeypatch: pytest.MonkeyPatch) -> str:
    """Simulates a CPU with fp16 arithmetic, here and in the processes that the test starts; torch emulates it."""
    return _cpu(monkeypatch, "rich")


def _cpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> str:
    for name in machine.OPERATORS:  # restored after the test
        monkeypatch.setattr(torch.ops.mkldnn, name, getattr(torch.ops.mkldnn, name))
    monkeypatch.setenv(machine.VARIABLE, kind)
    machine.apply_cpu()
    return kind


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/golden.json instead of comparing with it"
    )


class TwoProcesses(LoadScopeScheduling):
    """Scheduler of `make test`: a unit is a file, or all Ray tests together, so that they share one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "on_ray" if "on_ray/" in path else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoProcesses:
    return TwoProcesses(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the tests that use Ray first, because they take longest."""
    items.sort(key=lambda item: "on_ray" not in item.path.parts)


MakeConfig = Callable[..., TrainerConfig]


@pytest.fixture
def make_config(tmp_path: Path, data_file: Path, cache: Path) -> MakeConfig:
    """Returns a function that builds a tiny SFT config with overrides: `make_config("optimizer.lr=1", name="x")`."""

    def make(*overrides: str, **top: Any) -> TrainerConfig:
        raw: dict[str, Any] = {
            "trainer": "sft",
            "model": {"config": dict(LLAMA)},
            "tokenizer": {"kind": "bytes"},
            "data": {
                "train": {"path": str(data_file), "format": "instruction"},
                "validation": {"split": 0.1},
                "sequence_length": 160,
                "cache": str(cache),
            },
            "batch": {"global_size": 8, "micro_size": 2},
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
            "scheduler": {"name": "cosine", "warmup_steps": 2, "min_lr_ratio": 0.1},
            "run": {"name": "run", "storage": str(tmp_path / "runs"), "max_steps": 6},
            "callbacks": ["jsonl"],
            **top,
        }
        for override in overrides:
            apply_override(raw, override)
        return validate(raw)

    return make


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One Ray cluster for the session, with more logical CPUs than cores: 4 workers plus the data tasks."""
    import ray

    from myllm_ray.orchestration import session

    path = os.pathsep.join([str(ROOT / "examples" / "custom_trainer"), str(ROOT / "tests")])
    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path}, **session.interpreter()},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def preference_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Training rows (the last batch of an epoch is partial), held-out rows, and a separate reference model."""
    from enumeration import TINY
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("preferences")

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [
            {
                "prompt": "say " + "abc"[i % 3] * (1 + i % 5),
                "chosen": "yes" * (1 + i % 3),
                "rejected": "n" * (1 + i % 4),
                "completion": "yes no"[: 2 + i % 5],
                "label": bool(i % 3),
            }
            for i in range(first, first + count)
        ]

    (folder / "train.json").write_text(json.dumps(rows(0, 7)))
    (folder / "held_out.json").write_text(json.dumps(rows(20, 5)))
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=260)).save_pretrained(folder / "other")
    return folder / "train.json", folder / "held_out.json", folder / "other"
