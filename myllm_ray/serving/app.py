"""The HTTP application of a server: OpenAI's endpoints as an ASGI application, independent of what serves it."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from myllm_ray.config.errors import UserError
from myllm_ray.data.messages import Messages, read_messages
from myllm_ray.serving.engine import MOST_WAITING, Busy, Engine, Token
from myllm_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Reply,
    RequestError,
    SharedParameters,
    error_body,
    parsed,
    sampling_of,
)
from myllm_ray.serving.sampling import Sampling, answer_seed, random_seed
from myllm_ray.serving.served_model import ServedModel
from myllm_ray.serving.text_stream import TextStream

log = logging.getLogger(__name__)
_UNREAD = {"developer": "system"}
"""Roles of OpenAI that chat templates do not know, with the role that means the same."""


@dataclass
class _Choice:
    """One answer of a reply, while it is sampled."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    texts: list[str] = field(default_factory=list)
    log_probs: list[Any] = field(default_factory=list)
    reason: str = "length"


class Application:
    """The endpoints of one model.

    Args:
        engine: Samples the answers.
        served: The model.
        key_digest: SHA-256 of the API key that clients must send, or None.
    """

    def __init__(self, engine: Engine, served: ServedModel, key_digest: bytes | None = None):
        self.engine, self.served, self.key_digest = engine, served, key_digest
        self._closing = False

    def close(self) -> None:
        """Ends the engine. Requests in progress are answered with an error."""
        self._closing = True
        self.engine.close()

    def asgi(self) -> Starlette:
        """Returns the ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            ],
            exception_handlers={HTTPException: _http_error},
        )

    def _guarded(
        self, endpoint: Callable[[Request], Coroutine[Any, Any, Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Returns the endpoint with a check of the API key and with errors in OpenAI's layout."""

        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except RequestError as error:
                return JSONResponse(error.body, error.status)
            except UserError as error:
                return JSONResponse(error_body(str(error), 400), 400)
            except Busy as error:
                return JSONResponse(error_body(str(error), 429), 429)
            except Exception as error:
                message, status = self._failure(error)
                return JSONResponse(error_body(message, status), status)

        return guarded

    def _failure(self, error: Exception) -> tuple[str, int]:
        """Returns the message and the HTTP status of an exception, and logs it unless the server is about to end."""
        if self._closing:
            return "the server ends", 503
        log.error("a request failed", exc_info=error)
        return f"the server failed: {type(error).__name__}: {error}", 500

    def _check_key(self, request: Request) -> None:
        if self.key_digest is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self.key_digest):
            raise RequestError("the API key is missing or wrong", 401, code="invalid_api_key")

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", **self.engine.load()})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def _model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "id": self.served.name,
            "object": "model",
            "created": 0,
            "owned_by": "myllm_ray",
            "max_model_len": self.served.limit,
        }

    def _check_name(self, name: str) -> None:
        if name != self.served.name:
            raise RequestError(
                f"there is no model {name!r}: this server has {self.served.name!r}", 404, "model", "model_not_found"
            )

    async def _chat(self, request: Request) -> Response:
        given = parsed(ChatRequest, await request.body())
        self._check_name(given.model)
        return await self._reply(request, given, [self.served.chat_prompt(_messages(given.messages))])

    async def _complete(self, request: Request) -> Response:
        given = parsed(CompletionRequest, await request.body())
        self._check_name(given.model)
        prompts = given.prompt if isinstance(given.prompt, list) and given.prompt else [given.prompt]
        if isinstance(prompts[0], int):
            prompts = [prompts]
        return await self._reply(request, given, [self._ids(prompt) for prompt in prompts])

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.served.text_prompt(prompt)
        if not prompt or not all(0 <= token < self.served.vocabulary for token in prompt):
            raise RequestError(
                f"prompt: token ids are between 0 and {self.served.vocabulary - 1}",
                param="prompt",
                code="invalid_value",
            )
        return list(prompt)

    async def _reply(self, request: Request, given: SharedParameters, prompts: list[list[int]]) -> Response:
        """Samples `n` answers to each prompt. They end early if the client disconnects."""
        if self.engine.load()["waiting"] + len(prompts) * given.n > MOST_WAITING:
            raise Busy(f"more than {MOST_WAITING} answers wait: try again later")
        seed = random_seed() if given.seed is None else given.seed
        settings = [sampling_of(given, self.served, prompt) for prompt in prompts]
        choices = [
            _Choice(prompt, sampling, answer_seed(seed, p * given.n + i))
            for p, (prompt, sampling) in enumerate(zip(prompts, settings, strict=True))
            for i in range(given.n)
        ]
        reply = Reply(given, sum(map(len, prompts)))
        if given.stream:
            return _EventStream(self._events(given, choices, reply))
        # A task ends the sampling at once when the client disconnects.
        work = asyncio.ensure_future(self._whole(given, choices, reply))
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(await work) if work.done() else Response(status_code=499)
        finally:
            await _cancelled(work, gone)

    async def _whole(self, given: SharedParameters, choices: list[_Choice], reply: Reply) -> dict[str, Any]:
        async def collect(choice: _Choice) -> None:
            async for _ in self._pieces(choice, given.top, reply):
                pass

        await _together(collect(choice) for choice in choices)
        texts = ["".join(choice.texts) for choice in choices]
        return reply.whole(texts, [choice.reason for choice in choices], [choice.log_probs for choice in choices])

    async def _events(self, given: SharedParameters, choices: list[_Choice], reply: Reply) -> AsyncIterator[str]:
        """Yields the pieces of all choices, as they are sampled, as JSON."""
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def follow(index: int, choice: _Choice) -> None:
            queue.put_nowait(reply.piece(index, "", first=True))
            async for text, log_probs in self._pieces(choice, given.top, reply):
                queue.put_nowait(reply.piece(index, text, log_probs))
            queue.put_nowait(reply.piece(index, "", reason=choice.reason))

        async def follow_all() -> None:
            try:
                await _together(follow(index, choice) for index, choice in enumerate(choices))
                if (last := reply.last_piece()) is not None:
                    queue.put_nowait(last)
            except Exception as error:  # the status is sent already: the error is an event
                queue.put_nowait(error_body(*self._failure(error)))
            finally:
                queue.put_nowait(None)

        work = asyncio.ensure_future(follow_all())
        try:
            while (piece := await queue.get()) is not None:
                yield json.dumps(piece, ensure_ascii=False)
            yield "[DONE]"
        finally:
            await _cancelled(work)

    async def _pieces(
        self, choice: _Choice, top: int | None, reply: Reply
    ) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
        """Yields the new text of a choice with the log-probabilities of its tokens; fills the choice."""
        text, waiting = TextStream(self.served.tokenizer, choice.sampling.stop), list[dict[str, Any]]()
        async with aclosing(self.engine.generate(choice.prompt, choice.sampling, choice.seed, top)) as tokens:
            async for token in tokens:
                reply.completion_tokens += 1
                if token.id in self.served.end_tokens:
                    choice.reason = "stop"
                    break
                if top is not None:
                    waiting.append(self._log_prob(token))
                if new := text.add(token.id):
                    choice.texts.append(new)
                    choice.log_probs += waiting
                    yield new, waiting
                    waiting = []
                if text.stopped:
                    choice.reason = "stop"
                    break
        rest = text.end()
        if rest or waiting:
            choice.texts.append(rest)
            choice.log_probs += waiting
            yield rest, waiting

    def _log_prob(self, token: Token) -> dict[str, Any]:
        def entry(number: int, log_prob: float | None) -> dict[str, Any]:
            text = self.served.tokenizer.decode([number])
            return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}

        top = [entry(number, value) for number, value in token.top or ()]
        return {**entry(token.id, token.log_prob), "top_logprobs": top}


class _EventStream(Response):
    """Server-sent events. The source is closed when the client disconnects.

    Starlette's own streaming response leaves its source open then, until the source is collected as garbage.
    """

    def __init__(self, events: AsyncIterator[str]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._send_all(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
        finally:
            await _cancelled(work, gone)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self.events) as events:  # type: ignore[type-var]
            async for event in events:
                body = f"data: {event}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _messages(given: list[dict[str, Any]]) -> Messages:
    """Returns the messages of a request. Unlike in training data, an answer of the assistant may be empty.

    Raises:
        BadRow: A message has no role or no text.
    """
    named = [{**m, "role": _UNREAD.get(m["role"], m["role"])} if isinstance(m.get("role"), str) else m for m in given]
    empty = [
        i
        for i, m in enumerate(named)
        if m.get("role") == "assistant" and not m.get("tool_calls") and m.get("content") in ("", None)
    ]
    for i in empty:
        named[i] = {**named[i], "content": "empty"}
    messages = read_messages(named, "messages")
    for i in empty:
        messages[i]["content"] = ""
    return messages


async def _together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs coroutines together. The first exception cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _disconnected(receive: Receive) -> None:
    """Returns when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(message, error.status_code), error.status_code)
