"""The engine on vLLM, with a stand-in for vLLM's asynchronous engine that has its interface (0.32)."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import MakeConfig
from tiny_models import write_model

from myllm_ray.config import ConfigError
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED
from myllm_ray.serving.engine import Token
from myllm_ray.serving.sampling import Sampling
from myllm_ray.serving.server import opened_app, service_of
from myllm_ray.serving.vllm_engine import VLLMEngine
from myllm_ray.worker import run_local

WRITTEN = [104, 105, 259]
"""The tokens that the stand-in writes: `hi` and the end of a turn."""


@dataclasses.dataclass
class SamplingParams:
    """The arguments of vLLM that the package uses; another one is a TypeError."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop_token_ids: list[int]
    logprobs: int | None
    detokenize: bool
    output_kind: str


class FakeLLM:
    """Writes `WRITTEN`, two tokens at a time."""

    made: ClassVar[list[FakeLLM]] = []

    def __init__(self, arguments: dict[str, Any]):
        self.arguments, self.ended, self.closed = arguments, list[str](), False
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.files = sorted(path.name for path in Path(arguments["model"]).iterdir())
        FakeLLM.made.append(self)

    @classmethod
    def from_engine_args(cls, arguments: dict[str, Any]) -> FakeLLM:
        return cls(arguments)

    async def generate(self, prompt: Any, parameters: SamplingParams, request: str) -> AsyncIterator[Any]:
        self.asked.append((prompt["prompt_token_ids"], parameters))
        try:
            for first in (0, 2):
                ids = WRITTEN[first : first + 2]
                values = None
                if parameters.logprobs is not None:
                    values = [{i: SimpleNamespace(logprob=-0.5), 7: SimpleNamespace(logprob=-0.1)} for i in ids]
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids, logprobs=values)])
                await asyncio.sleep(0)
        finally:
            self.ended.append(request)

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    contents = {
        "vllm": {"AsyncEngineArgs": dict, "SamplingParams": SamplingParams},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(DELTA="delta")},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": FakeLLM},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
    FakeLLM.made = []
    return FakeLLM


def test_settings_and_tokens(vllm: type[FakeLLM], tmp_path: Path) -> None:
    engine = VLLMEngine(tmp_path, (256, 259), "bfloat16")
    llm = vllm.made[0]

    async def collect(sampling: Sampling, top: int | None = None) -> list[Token]:
        return [token async for token in engine.generate([1, 2], sampling, 9, top)]

    given = Sampling(temperature=0.7, top_p=0.8, top_k=5, min_p=0.1, max_new_tokens=30)
    assert asyncio.run(collect(given)) == [Token(i) for i in WRITTEN]
    ids, parameters = llm.asked[0]
    assert ids == [1, 2]
    assert parameters == SamplingParams(30, 0.7, 0.8, 5, 0.1, 9, [256, 259], None, False, "delta")
    tokens = asyncio.run(collect(Sampling(temperature=0, top_p=0.8, top_k=5, min_p=0.1), 2))
    greedy = llm.asked[1][1]
    assert (greedy.temperature, greedy.top_p, greedy.top_k, greedy.min_p, greedy.logprobs) == (0, 1.0, 0, 0.0, 2)
    assert tokens[0] == Token(104, -0.5, ((7, -0.1), (104, -0.5)))
    assert engine.load() == {"active": 0, "waiting": 0}


def test_closing_an_answer_ends_its_request(vllm: type[FakeLLM], tmp_path: Path) -> None:
    engine = VLLMEngine(tmp_path, (259,), "float32")

    async def first() -> None:
        tokens = engine.generate([1], Sampling(), 0)
        assert await anext(tokens) == Token(104)
        assert engine.load()["active"] == 1
        assert vllm.made[0].ended == []
        await tokens.aclose()

    asyncio.run(first())
    assert len(vllm.made[0].ended) == 1
    assert engine.load()["active"] == 0


def test_a_folder_is_served_from_where_it_is_and_a_run_is_exported(
    vllm: type[FakeLLM], tmp_path: Path, make_config: MakeConfig
) -> None:
    folder = write_model(tmp_path / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)
    with pytest.raises(ConfigError, match="--device applies to --engine local"):
        service_of(str(folder), None, "auto", "cpu", None)
    with opened_app(service_of(str(folder), None, "auto", None, None)) as app:
        assert app.served.name == "talker"
        assert vllm.made[0].arguments["model"] == str(folder)
        assert vllm.made[0].arguments["dtype"] == "float32"
        assert not vllm.made[0].closed
    assert vllm.made[0].closed
    run_local(make_config("run.max_steps=1"))
    with opened_app(service_of(str(tmp_path / "runs" / "run"), None, "vllm", None, None)) as app:
        assert app.served.name == "run"
        exported = Path(vllm.made[1].arguments["model"])
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(vllm.made[1].files)
    assert not exported.exists()
