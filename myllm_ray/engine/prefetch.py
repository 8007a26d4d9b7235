"""A thread that prepares the next batches while the current one is trained on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.common.types import Batch
from myllm_ray.trainers.base import BaseTrainer

_CLOSE_SECONDS = 5.0
"""Time for which `close` waits for the thread, which may be in a read that does not return."""


class PrefetchedBatches:
    """An iterator over the batches of a stream, whose next ones a thread reads, prepares and copies to the device.

    The order and the number of the batches are those of the stream. An error of the stream is raised where its batch
    would be returned. A batch knows its own position, so a checkpoint does not depend on how far the thread is ahead.

    Args:
        batches: the batches of the stream. Only the thread reads them.
        trainer: its `prepare_micro` is called for each micro-batch.
        accelerator: the backend, which copies micro-batches.
        depth: number of batches that are prepared before they are needed; 0: they are prepared when they are needed,
            without a thread.
    """

    def __init__(self, batches: Iterator[Batch], trainer: BaseTrainer, accelerator: Accelerator, depth: int):
        self.waited = 0.0
        """Seconds in which the caller waited for batches."""
        self._batches, self._trainer, self._accelerator, self._depth = batches, trainer, accelerator, depth
        self._ready: deque[tuple[Batch | None, Any, BaseException | None]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if depth else None
        if self._thread is not None:
            self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch, staged, error = self._read() if self._thread is None else self._take()
        self.waited += time.perf_counter() - started
        if error is not None:
            raise error
        if batch is None:
            raise StopIteration
        self._accelerator.use_copies(staged)
        return batch

    def close(self) -> None:
        """Stops the thread. Batches that it has prepared are dropped; their position was not reached."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _read(self) -> tuple[Batch | None, Any, BaseException | None]:
        """Returns the next batch of the stream and its copies, or the error; None at the end of the stream."""
        try:
            batch = next(self._batches, None)
            if batch is None:
                return None, None, None
            micros = [self._trainer.prepare_micro(micro) for micro in batch.micros]
            micros, staged = self._accelerator.copy_ahead(micros)
            return replace(batch, micros=micros), staged, None
        except BaseException as error:
            return None, None, error

    def _take(self) -> tuple[Batch | None, Any, BaseException | None]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            # The end and an error stay, so that every later call finds them.
            item = self._ready[0] if self._ready[0][0] is None else self._ready.popleft()
            self._changed.notify_all()
        return item

    def _work(self) -> None:
        batch: Batch | None
        while True:
            # Waits before it reads: the thread is never more than `depth` batches ahead.
            with self._changed:
                self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                if self._closed:
                    break
            item = batch, _, _ = self._read()
            with self._changed:
                self._ready.append(item)
                self._changed.notify_all()
            if batch is None:
                break
        # A generator is closed by the thread that runs it.
        if (close := getattr(self._batches, "close", None)) is not None:
            close()
