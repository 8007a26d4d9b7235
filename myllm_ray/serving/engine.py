"""Samples the answers of a server: a thread decodes all answers in progress together, one token of each at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from myllm_ray.models.decoding import BatchDecoder, choose_one
from myllm_ray.models.generate import HFSampler
from myllm_ray.serving.sampling import Sampling
from myllm_ray.serving.served_model import LoadedModel

log = logging.getLogger(__name__)
MOST_TOGETHER = 16
"""Answers that are decoded together; others wait in the order of their arrival."""
MOST_WAITING = 256
"""Answers that wait; a server refuses further ones."""


class Busy(Exception):
    """Raised if too many answers wait already."""


class Token(NamedTuple):
    """A sampled token. `log_prob` and the `top` (id, log-probability) pairs are None unless they were requested.

    Log-probabilities are in nats, of the model's own distribution: temperature and top_p do not change them.
    """

    id: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] | None = None


class Engine(Protocol):
    """What a server needs to sample answers."""

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, top: int | None = None
    ) -> AsyncGenerator[Token, None]:
        """Yields the tokens of an answer, including the one that ends it. Closing the generator ends the answer.

        Args:
            prompt: Token ids.
            sampling: The settings. Stop texts are ignored: the caller finds them in the text.
            seed: The seed of the answer's random numbers.
            top: The number of most likely tokens to return log-probabilities of; None: no log-probabilities.

        Raises:
            Busy: Too many answers wait.
        """
        ...

    def load(self) -> dict[str, int]:
        """Returns the number of answers in progress and the number of those that wait."""
        ...

    def close(self) -> None:
        """Ends all answers and the engine."""
        ...


@dataclass(eq=False)
class _Answer:
    """An answer in progress. `emit` receives its tokens, then None; or an exception."""

    prompt: list[int]
    sampler: HFSampler
    random: np.random.Generator
    top: int | None
    emit: Callable[[Token | BaseException | None], None]
    cancelled: bool = False
    count: int = 0
    last: int = -1
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class LocalEngine:
    """Samples with the package's own sampler, in a thread of this process.

    Every answer has its own random numbers and settings. An answer that is alone has the same tokens as
    `models.generate.sample` for the same seed; together with others its logits are equal up to rounding.

    Args:
        served: The model. Only this engine may use it.
        most_together: The number of answers that are decoded together.
    """

    def __init__(self, served: LoadedModel, most_together: int = MOST_TOGETHER):
        self.served, self.most_together = served, most_together
        self._waiting: deque[_Answer] = deque()
        self._active: list[_Answer] = []
        self._changed = threading.Condition()
        self._closed = False
        self._decoder = BatchDecoder(served.model)
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, seed: int, top: int | None = None
    ) -> AsyncGenerator[Token, None]:
        """Yields the tokens of an answer; see `Engine`."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Token | BaseException | None]()

        def emit(item: Token | BaseException | None) -> None:
            with suppress(RuntimeError):  # the event loop is closed: the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        sampler = sampling.sampler(self.served.tokenizer, self.served.end_tokens)
        answer = _Answer(list(prompt), sampler, np.random.Generator(np.random.PCG64(seed)), top, emit)
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if len(self._waiting) >= MOST_WAITING:
                raise Busy(f"{MOST_WAITING} answers wait already: try again later")
            self._waiting.append(answer)
            self._changed.notify()
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            answer.cancelled = True
            with self._changed:
                if answer in self._waiting:
                    self._waiting.remove(answer)

    def load(self) -> dict[str, int]:
        """Returns the number of answers in progress and the number of those that wait."""
        return {"active": len(self._active), "waiting": len(self._waiting)}

    def close(self) -> None:
        """Ends all answers and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._active or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
            try:
                self._admit()
                if self._active:
                    self._step()
            except Exception as error:
                # Out of memory, for example. The answers in progress end; the next ones start with an empty cache.
                log.exception("sampling failed")
                for answer in self._active:
                    answer.emit(error)
                self._active, self._decoder = [], BatchDecoder(self.served.model)
        for answer in [*self._active, *self._waiting]:
            answer.emit(RuntimeError("the engine is closed"))

    def _admit(self) -> None:
        """Starts the answer that has waited longest, if there is room for it.

        It starts one only, so that the answers in progress get a token between two prompts.
        """
        if len(self._active) == self.most_together:
            return
        with self._changed:
            if not self._waiting:
                return
            answer = self._waiting.popleft()
        self._active.append(answer)  # an exception in the next line ends all of them
        answer.logits = self._decoder.add(answer.prompt)

    def _step(self) -> None:
        """Draws one token of each answer, and computes the logits after them."""
        kept = [row for row, answer in enumerate(self._active) if self._draw(answer)]
        if len(kept) < len(self._active):
            self._decoder.keep(kept)
            self._active = [self._active[row] for row in kept]
        if self._active:
            logits = self._decoder.step([answer.last for answer in self._active])
            for row, answer in enumerate(self._active):
                answer.logits = logits[row : row + 1]

    def _draw(self, answer: _Answer) -> bool:
        """Draws one token of an answer and returns whether the answer continues."""
        if answer.cancelled:
            return False
        answer.last = choose_one(answer.sampler, answer.logits, answer.random)
        answer.count += 1
        answer.emit(_with_log_probs(answer.last, answer.logits[0], answer.top))
        if answer.last in answer.sampler.end_tokens or answer.count == answer.sampler.max_new_tokens:
            answer.emit(None)
            return False
        return True


def _with_log_probs(token: int, logits: Tensor, top: int | None) -> Token:
    if top is None:
        return Token(token)
    log_probs = torch.log_softmax(logits.float(), -1)
    values, ids = log_probs.topk(min(top, len(log_probs)))
    return Token(token, float(log_probs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
