"""The server as the `openai` client sees it."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import OpenAI
from served import Running, load, running, until
from tiny_models import REFUSES_SYSTEM, write_model

from myllm_ray.data.messages import Messages
from myllm_ray.data.tokenizer import DEFAULT_CHAT_TEMPLATE, TRAINED

HI: list[Any] = [{"role": "user", "content": "hi"}]
KEY = "a key"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def server(talker: Path) -> Iterator[Running]:
    with running(talker) as found:
        yield found


def test_models(server: Running) -> None:
    assert [model.id for model in server.client.models.list()] == ["talker"]
    assert server.client.models.retrieve("talker").owned_by == "myllm_ray"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        server.client.models.retrieve("other")


def test_an_answer_is_that_of_sample(server: Running) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 4}
    found = server.client.chat.completions.create(model="talker", messages=HI, max_tokens=20, **settings)
    prompt = server.served.chat_prompt(Messages(HI))
    assert found.choices[0].message.content == server.text_of(prompt, max_new_tokens=20, **settings)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(prompt), 20)
    assert found.usage.total_tokens == len(prompt) + 20
    again = server.client.chat.completions.create(model="talker", messages=HI, max_completion_tokens=20, **settings)
    assert again.choices[0].message.content == found.choices[0].message.content
    texts = {
        server.client.chat.completions.create(model="talker", messages=HI, max_tokens=20).choices[0].message.content
        for _ in range(3)
    }
    assert len(texts) > 1, "without a seed, answers differ"


def test_a_stream_has_the_same_text(server: Running) -> None:
    given: dict[str, Any] = {"model": "talker", "messages": HI, "max_tokens": 40, "seed": 7, "n": 3}
    whole = server.client.chat.completions.create(**given)
    chunks = list(server.client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", "", ""], [None, None, None]
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert chunk.usage is None
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3, "each choice has its own random numbers"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3


def test_the_pieces_of_a_stream_arrive_while_it_is_sampled(server: Running, slow_model: None) -> None:
    started = time.monotonic()
    stream = server.client.completions.create(model="talker", prompt="a", max_tokens=30, seed=1, stream=True)
    times = [time.monotonic() - started for _ in stream]
    assert times[-1] > 30 * 0.02
    assert times[1] < times[-1] / 2


def test_completions_of_texts_and_of_token_ids(server: Running) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 1.0, "seed": 2}
    create = server.client.completions.create
    found = create(model="talker", prompt=["ab", "cd"], max_tokens=9, **settings)
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.choices[0].text == server.text_of([97, 98], max_new_tokens=9, **settings)
    assert found.usage is not None
    assert found.usage.prompt_tokens == 4
    assert create(model="talker", prompt=[97, 98], max_tokens=9, **settings).choices[0].text == found.choices[0].text
    both = create(model="talker", prompt=[[97, 98], [99, 100]], max_tokens=9, **settings)
    assert [choice.text for choice in both.choices] == [choice.text for choice in found.choices]
    greedy = create(model="talker", prompt="ab", max_tokens=9, temperature=0)
    assert greedy.choices[0].text == server.text_of([97, 98], max_new_tokens=9, temperature=0.0)


def test_stop_texts(server: Running) -> None:
    given: dict[str, Any] = {"model": "talker", "prompt": "ab", "max_tokens": 60, "seed": 3}
    whole = server.client.completions.create(**given).choices[0].text
    stop = next(c for c in whole[5:] if c.isascii() and c.isprintable())
    found = server.client.completions.create(**given, stop=[stop, "never written"])
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    pieces = [c.choices[0].text for c in server.client.completions.create(**given, stop=stop, stream=True)]
    assert "".join(pieces) == found.choices[0].text


def test_log_probabilities(server: Running) -> None:
    given: dict[str, Any] = {"model": "talker", "messages": HI, "max_tokens": 8, "seed": 3, "temperature": 0.5}
    found = server.client.chat.completions.create(**given, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert len(found.content) == 8
    prompt = server.served.chat_prompt(Messages(HI))
    with torch.no_grad():
        logits = server.served.model.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    log_probs = torch.log_softmax(logits, -1)
    top = log_probs.topk(3)
    first = found.content[0]
    assert [entry.logprob for entry in first.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
    assert any(first.logprob == pytest.approx(float(value), abs=1e-4) for value in log_probs)
    streamed = []
    for chunk in server.client.chat.completions.create(**given, logprobs=True, top_logprobs=3, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [entry.logprob for entry in streamed] == pytest.approx([e.logprob for e in found.content], abs=1e-5)


def test_requests_together_have_the_answers_that_they_have_alone(talker: Path) -> None:
    """More requests than the server decodes together, with different lengths and settings."""
    with running(talker, together=3) as server:

        def ask(number: int) -> str:
            found = server.client.completions.create(
                model="talker",
                prompt="x" * (1 + 7 * number % 40),
                max_tokens=5 + 3 * number,
                seed=number,
                temperature=0.5 + 0.1 * number,
            )
            return found.choices[0].text

        alone = [ask(number) for number in range(8)]
        found: dict[int, str] = {}
        threads = [threading.Thread(target=lambda n=n: found.update({n: ask(n)})) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[number] for number in range(8)] == alone


@pytest.fixture
def slow_model(server: Running) -> Iterator[None]:
    handle = server.served.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    yield
    handle.remove()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_ends_its_answers(server: Running, slow_model: None, stream: bool) -> None:
    """Without the disconnect, the 400 tokens of each answer take 8 seconds."""
    body = {"model": "talker", "prompt": "a", "max_tokens": 400, "temperature": 1, "n": 2, "stream": stream}
    connection = socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0])))
    text = json.dumps(body)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    connection.sendall((head + text).encode())
    assert until(lambda: load(server)["active"] == 2)
    time.sleep(0.3)
    connection.close()
    started = time.monotonic()
    assert until(lambda: load(server) == {"status": "ok", "active": 0, "waiting": 0})
    assert time.monotonic() - started < 3


@pytest.mark.parametrize(
    ("change", "status", "param", "message"),
    [
        ({"model": "gpt-9"}, 404, "model", "there is no model 'gpt-9': this server has 'talker'"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature", "valid number"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than 0"),
        ({"max_tokens": 5000}, 400, "messages", r"the context of talker is 512 tokens; the prompt has \d+ and the ans"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "512 tokens; the prompt has 6"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, 400, None, r"messages\[0\] has no text content"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 400, None, "has no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "only text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None, "unpaired surrogate"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "tools is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"temprature": 1}, 400, "temprature", "unknown parameter temprature"),
        ({"top_logprobs": 21}, 400, "top_logprobs", "less than or equal to 20"),
    ],
)
def test_bad_requests(server: Running, change: dict[str, Any], status: int, param: str | None, message: str) -> None:
    body = {"model": "talker", "messages": HI, "max_tokens": 2, **change}
    for stream in (False, True):
        answer = httpx.post(f"{server.url}/chat/completions", content=json.dumps({**body, "stream": stream}))
        error = answer.json()["error"]
        assert answer.status_code == status
        assert re.search(message, error["message"]), error
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"


def test_parameters_that_change_nothing_are_accepted(server: Running) -> None:
    found = server.client.chat.completions.create(
        model="talker",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "hi"},
        ],
        max_tokens=2,
        presence_penalty=0,
        tools=[],
        user="me",
        response_format={"type": "text"},
        extra_body={"top_k": -1, "min_p": 0.1},
    )
    wanted = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
    )
    assert found.usage is not None
    assert found.usage.prompt_tokens > len(server.served.tokenizer(wanted)["input_ids"])


def test_other_bad_requests(server: Running) -> None:
    for body, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("{}", "model: Field required")):
        answer = httpx.post(f"{server.url}/chat/completions", content=body)
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (400, True)
    for prompt in ([5000], [-1], [[]], [[1], [5000]]):
        with pytest.raises(openai.BadRequestError, match="token ids are between 0 and 259"):
            server.client.completions.create(model="talker", prompt=prompt)
    assert httpx.get(f"{server.url}/nothing").json()["error"]["message"] == "GET /v1/nothing: Not Found"
    assert httpx.get(f"{server.url}/chat/completions").status_code == 405


def test_an_error_of_the_model_ends_the_request_and_not_the_server(server: Running) -> None:
    handle = server.served.model.register_forward_pre_hook(lambda *_: 1 / 0)
    given: dict[str, Any] = {"model": "talker", "messages": HI, "max_tokens": 3, "seed": 1}
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        server.client.chat.completions.create(**given)
    with pytest.raises(openai.APIError, match="ZeroDivisionError"):
        list(server.client.chat.completions.create(**given, stream=True))
    handle.remove()
    assert server.client.chat.completions.create(**given).usage


def test_an_api_key(talker: Path) -> None:
    with running(talker, KEY) as server:
        assert [model.id for model in server.client.models.list()] == ["talker"]
        for wrong in ("other", "ä"):
            answer = httpx.get(f"{server.url}/models", headers={"Authorization": f"Bearer {wrong}".encode()})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        with OpenAI(base_url=server.url, api_key="other") as other, pytest.raises(openai.AuthenticationError):
            other.chat.completions.create(model="talker", messages=HI)
        assert httpx.post(f"{server.url}/completions", content="{}").status_code == 401
        assert load(server)["status"] == "ok"


def test_a_model_without_a_template_completes_text_only(tmp_path: Path) -> None:
    with running(write_model(tmp_path / "base", None)) as server:
        with pytest.raises(openai.BadRequestError, match="base has no chat template and was not trained on chats"):
            server.client.chat.completions.create(model="base", messages=HI)
        assert server.client.completions.create(model="base", prompt="a", max_tokens=3).choices[0].text
    with running(write_model(tmp_path / "strict", REFUSES_SYSTEM)) as server:
        system: list[Any] = [{"role": "system", "content": "Be brief."}, *HI]
        with pytest.raises(openai.BadRequestError, match="no system turns"):
            server.client.chat.completions.create(model="strict", messages=system)


def test_the_settings_of_the_generation_config_are_defaults(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "talker", TRAINED + DEFAULT_CHAT_TEMPLATE)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "top_k": 1}))
    with running(folder) as server:
        create = server.client.completions.create
        greedy = create(model="talker", prompt="a", max_tokens=12, temperature=0).choices[0].text
        assert create(model="talker", prompt="a", max_tokens=12, seed=5).choices[0].text == greedy
        given: dict[str, Any] = {"seed": 5, "extra_body": {"top_k": 0}}
        assert create(model="talker", prompt="a", max_tokens=12, **given).choices[0].text != greedy
