"""The thread that prepares batches: order, bounds, errors and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import MakeConfig

from myllm_ray.accelerators.single import SingleGPUAccelerator
from myllm_ray.common.types import Batch, Micro, Position
from myllm_ray.config import ConfigError, DataError
from myllm_ray.engine.prefetch import PrefetchedBatches
from myllm_ray.engine.settings import EngineSettings
from myllm_ray.trainers.base import BaseTrainer

DEPTHS = pytest.mark.parametrize("depth", [0, 1, 2, 5])


class Marking:
    """A trainer that adds a tensor to each micro-batch."""

    def prepare_micro(self, micro: Micro) -> Micro:
        return {**micro, "prepared": micro["input_ids"] + 1}


class Source:
    """Batches of one number; counts what was read."""

    def __init__(self, count: int, fails_at: int | None = None):
        self.count, self.fails_at, self.read, self.closed = count, fails_at, 0, False

    def batches(self) -> Iterator[Batch]:
        try:
            for number in range(self.count):
                if number == self.fails_at:
                    raise DataError(f"no batch {number}")
                self.read += 1
                yield Batch(
                    [{"input_ids": torch.tensor([[number]])}], Position(0, number), Position(0, number + 1), number
                )
        finally:
            self.closed = True


def prefetched(source: Source, depth: int, trainer: BaseTrainer | None = None) -> PrefetchedBatches:
    made: BaseTrainer = trainer or Marking()  # type: ignore[assignment]
    return PrefetchedBatches(source.batches(), made, SingleGPUAccelerator(), depth)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


@DEPTHS
def test_batches_are_those_of_the_stream(depth: int) -> None:
    batches = prefetched(Source(20), depth)
    found = list(batches)
    assert [batch.position.row for batch in found] == [*range(20)]
    assert [batch.next.row for batch in found] == [*range(1, 21)]
    assert [batch.fingerprint for batch in found] == [*range(20)]
    assert [int(batch.micros[0]["prepared"]) for batch in found] == [*range(1, 21)]
    assert next(iter(batches), None) is None, "the end stays"
    batches.close()
    assert not threads()


@DEPTHS
def test_the_thread_is_at_most_the_depth_ahead(depth: int) -> None:
    source = Source(20)
    batches = prefetched(source, depth)
    for taken in range(6):
        expected = min(taken + depth, 20)
        until(lambda wanted=expected: source.read == wanted)  # type: ignore[misc]
        time.sleep(0.01)
        assert source.read == expected
        next(batches)
    batches.close()
    assert not threads()


@DEPTHS
def test_an_error_is_raised_in_place_of_its_batch(depth: int) -> None:
    batches = prefetched(Source(20, fails_at=3), depth)
    assert [next(batches).position.row for _ in range(3)] == [0, 1, 2]
    for _ in range(2 if depth else 1):
        with pytest.raises(DataError, match="no batch 3"):
            next(batches)
    batches.close()
    assert not threads()


def test_an_error_of_the_trainer_is_raised_too() -> None:
    class Failing(Marking):
        def prepare_micro(self, micro: Micro) -> Micro:
            raise ValueError("planted")

    batches = prefetched(Source(3), 2, Failing())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="planted"):
        next(batches)
    batches.close()


def test_close_ends_the_thread_and_the_generator() -> None:
    source = Source(1000)
    batches = prefetched(source, 2)
    next(batches)
    batches.close()
    assert not threads()
    assert source.closed
    assert source.read <= 4


def test_the_wait_is_measured() -> None:
    class Slow(Source):
        def batches(self) -> Iterator[Batch]:
            for batch in super().batches():
                time.sleep(0.02)
                yield batch

    at_once = prefetched(Slow(4), 0)
    list(at_once)
    assert at_once.waited >= 0.08
    ahead = prefetched(Slow(4), 2)
    for _ in ahead:
        time.sleep(0.05)  # a step
    assert 0.02 <= ahead.waited < 0.06, "only the first batch is waited for"


def test_the_depth_is_configurable(make_config: MakeConfig) -> None:
    """A manually constructed run has no thread by default."""
    for given, expected in ((None, 0), ({}, 0), ({"data": {"prefetch_batches": 3}}, 3)):
        assert EngineSettings.from_config(given).prefetch_batches == expected
    assert EngineSettings.from_config(make_config()).prefetch_batches == 2
    assert EngineSettings.from_config(make_config("data.prefetch_batches=0")).prefetch_batches == 0
    with pytest.raises(ConfigError, match=r"data\.prefetch_batches"):
        make_config("data.prefetch_batches=-1")
