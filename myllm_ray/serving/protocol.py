"""The requests, answers and errors of OpenAI's HTTP interface, as far as the server supports them.

Source: https://platform.openai.com/docs/api-reference (chat, completions, models). `top_k` and `min_p` are
additions that vLLM has too. A parameter that would change the answer and is not supported is refused, unless it has its
default.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from myllm_ray.serving.sampling import Sampling
from myllm_ray.serving.served_model import ServedModel

MOST_CHOICES = 16
MOST_TOP = 20
DEFAULT_TOKENS = 1024
"""Tokens of an answer to a request without a limit, if the model's context is longer."""
_NO_EFFECT = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prediction")
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
"""Parameters of OpenAI that are not supported, with the values that change nothing."""


class RequestError(Exception):
    """An error that is returned to the client.

    Args:
        message: What is wrong and what to do.
        status: The HTTP status.
        param: The name of the parameter that is wrong, if it is one.
        code: A word that programs can compare, such as `model_not_found`.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, status, param, code)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the JSON of an error; see `RequestError` for the arguments."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """The parameter `stream_options`."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class SharedParameters(BaseModel):
    """The parameters that both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=False)
    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: all tokens")
    min_p: float | None = Field(None, ge=0, lt=1)
    max_tokens: PositiveInt | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of an answer that the request states."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """The number of tokens whose log-probabilities are requested; None: no log-probabilities."""
        return None

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class ChatRequest(SharedParameters):
    """The body of a request to `/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP)

    @property
    def most_tokens(self) -> int | None:
        """The largest number of tokens of an answer that the request states."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """The number of tokens whose log-probabilities are requested; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SharedParameters):
    """The body of a request to `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]


R = TypeVar("R", bound=SharedParameters)


def parsed(kind: type[R], body: bytes) -> R:
    """Returns the request of a body.

    Raises:
        RequestError: The body is not JSON, or a parameter is unknown, not supported, or has a wrong value.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not valid JSON") from None
    if not isinstance(given, dict):
        raise RequestError("the body is not a JSON object")
    given = {k: v for k, v in given.items() if v is not None and k not in _NO_EFFECT}
    for name in [k for k in given if k in _NEUTRAL and k not in kind.model_fields]:
        if given.pop(name) not in _NEUTRAL[name]:
            raise RequestError(f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or None
        if first["type"] == "extra_forbidden":
            raise RequestError(f"unknown parameter {name}", param=name, code="unknown_parameter") from None
        raise RequestError(f"{name}: {first['msg']}", param=name, code="invalid_value") from None


def sampling_of(request: SharedParameters, served: ServedModel, prompt: list[int]) -> Sampling:
    """Returns the sampling settings of a request.

    Raises:
        RequestError: The prompt, or the prompt with the answer, is longer than the model's context.
        ConfigError: A setting has a wrong value.
    """
    room, most = served.room(prompt), request.most_tokens
    if room is not None and (room <= 0 or (most or 0) > room):
        raise RequestError(
            f"the context of {served.name} is {served.limit} tokens; the prompt has {len(prompt)}"
            + (f" and the answer up to {most}" if most else "")
            + ": shorten one of them",
            param="messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "min_p": request.min_p,
        "top_k": request.top_k if (request.top_k or 0) > 0 else None,
        "max_new_tokens": most or min(DEFAULT_TOKENS, DEFAULT_TOKENS if room is None else room),
        "stop": request.stops,
    }
    settings = served.sampling(given, "request")
    # A client that gives top_k: 0 or -1 wants all tokens, also if the model's generation config has a top_k.
    return settings.model_copy(update={"top_k": None}) if request.top_k in (0, -1) else settings


class Reply:
    """Builds the JSON of an answer, whole or in pieces.

    Args:
        request: The request.
        prompt_tokens: The number of tokens of its prompts.
    """

    def __init__(self, request: SharedParameters, prompt_tokens: int):
        self.chat = isinstance(request, ChatRequest)
        self.request, self.prompt_tokens, self.completion_tokens = request, prompt_tokens, 0
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, texts: list[str], reasons: list[str], log_probs: list[list[Any]]) -> dict[str, Any]:
        """Returns a whole reply.

        Args:
            texts: The text of each choice.
            reasons: Why each choice ended, `stop` or `length`.
            log_probs: The log-probabilities of each choice's tokens, in OpenAI's layout.
        """
        choices: list[dict[str, Any]] = [
            {
                "index": i,
                **({"message": {"role": "assistant", "content": t}} if self.chat else {"text": t}),
                "logprobs": {"content": log_probs[i], "refusal": None} if self.request.top is not None else None,
                "finish_reason": reasons[i],
            }
            for i, t in enumerate(texts)
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage()}

    def piece(
        self, index: int, text: str, log_probs: list[Any] | None = None, reason: str | None = None, first: bool = False
    ) -> dict[str, Any]:
        """Returns a piece of a streamed reply.

        Args:
            index: The index of the choice.
            text: The new text.
            log_probs: The log-probabilities of its tokens.
            reason: Why the choice ended; None: it continues.
            first: Whether this is the first piece of the choice.
        """
        delta = {**({"role": "assistant"} if first else {}), **({"content": text} if text or first else {})}
        choice = {
            "index": index,
            **({"delta": delta} if self.chat else {"text": text}),
            "logprobs": {"content": log_probs, "refusal": None} if log_probs else None,
            "finish_reason": reason,
        }
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self._with_usage else {}
        return {**self.head, "object": kind, "choices": [choice], **usage}

    def last_piece(self) -> dict[str, Any] | None:
        """Returns the piece with the token counts, if the request asks for it."""
        if not self._with_usage:
            return None
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Returns the token counts. End tokens are counted."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    @property
    def _with_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage
