"""Callbacks, trainers, formats and rewards for tests, in a module that Ray workers find by import path."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from myllm_ray.accelerators.single import SingleGPUAccelerator as SingleDevice
from myllm_ray.common.distributed import rank
from myllm_ray.common.types import Batch, Micro, RunState, StepOutput
from myllm_ray.engine.callbacks import Callback
from myllm_ray.trainers.sft import SFTTrainer


class StopAt(Callback):
    """Stops a run after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, state: RunState) -> None:
        if state.step == self.step:
            state.request("stop", "test")


class KillOnce(Callback):
    """Kills this worker's process with SIGKILL after a step, once; a file records that it happened."""

    def __init__(self, step: int, marker: str):
        self.step, self.marker = step, Path(marker)

    def on_step_end(self, state: RunState) -> None:
        if state.step == self.step and state.is_main and not self.marker.exists():
            self.marker.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)


class KillAtCheckpoint(KillOnce):
    """Kills this worker's process once, directly after the checkpoint of a step is complete."""

    def on_step_end(self, state: RunState) -> None: ...

    def on_checkpoint(self, state: RunState, folder: str) -> None:
        super().on_step_end(state)


class Slow(Callback):
    """Makes each step longer, until the file `until` exists."""

    def __init__(self, seconds: float, until: str = ""):
        self.seconds, self.until = seconds, until

    def on_step_end(self, state: RunState) -> None:
        if not self.until or not Path(self.until).exists():
            time.sleep(self.seconds)


class SlowStart(Callback):
    """Makes the start longer: the model is built, and no step has run."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_start(self, state: RunState) -> None:
        time.sleep(self.seconds)


class Fails(Callback):
    """A user's callback with a bug."""

    def on_step_end(self, state: RunState) -> None:
        print(f"in step {state.step}")
        raise ValueError("mine")


class FillDisk(Callback):
    """After a step, writes a file that leaves `leave` bytes of its disk free."""

    main_only = True

    def __init__(self, step: int, path: str, leave: int):
        self.step, self.path, self.leave = step, Path(path), leave

    def on_step_end(self, state: RunState) -> None:
        if state.step == self.step:
            free = shutil.disk_usage(self.path.parent).free
            self.path.write_bytes(bytes(max(0, free - self.leave)))


class Sleeper(SFTTrainer):
    """Sleeps for two minutes on one rank in one step, once; a file records it. Batches count as steps."""

    def __init__(self, *arguments: Any, rank: int, step: int, phase: str, marker: str, **named: Any):
        super().__init__(*arguments, **named)
        self.of, self.phase, self.marker, self.step = (rank, step), phase, Path(marker), 0

    def _sleep(self, phase: str) -> None:
        if phase == self.phase and self.step == self.of[1] and rank() == self.of[0] and not self.marker.exists():
            self.marker.write_text("")
            time.sleep(120)

    def prefetch_rollouts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.step += 1
            self._sleep("data")
            yield batch

    def train_step(self, micro: Micro) -> StepOutput:
        self._sleep("forward")
        return super().train_step(micro)


class Keyed(Callback):
    """Has a secret as an argument."""

    def __init__(self, api_key: str):
        self.api_key = api_key


class Poisoned(SFTTrainer):
    """Multiplies the loss of micro-batches whose tokens have one of the hashes `marks`."""

    def __init__(self, *arguments: Any, marks: list[int], factor: str, **named: Any):
        super().__init__(*arguments, **named)
        self.marks, self.factor = set(marks), float(factor)  # "nan" arrives as text: JSON has no NaN

    def train_step(self, micro: Micro) -> StepOutput:
        output = super().train_step(micro)
        bad = hash(tuple(micro["input_ids"].flatten().tolist())) in self.marks
        return StepOutput(output.loss_sum * self.factor, output.metrics) if bad else output


def question_and_answer(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A custom data format."""
    return [(f"Q: {row['instruction']}\nA: ", False), (row["output"], True)]


def without_its_end(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A data format that does not train on the end of an answer."""
    return [(row["instruction"], True), (row["output"], False)]


def broken(row: dict[str, Any]) -> list[tuple[str, bool]]:
    """A data format with a bug."""
    return [(row["nothing"], True)]


def half(progress: float) -> float:
    """A custom learning-rate schedule."""
    return 1.0 if progress < 0.5 else 0.5


def variety(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """A reward that is positive for any text: its share of distinct characters plus its share of letters."""
    return [(len(set(c)) + sum(x.isalpha() for x in c)) / max(1, len(c)) for c in completions]


def judge(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Returns the lengths of completions; hangs on an exclamation mark and fails on a question mark."""
    if any("!" in c for c in completions):
        time.sleep(60)
    if any("?" in c for c in completions):
        raise ValueError("a question")
    return [float(len(c)) for c in completions]


class AskInLog(Callback):
    """Makes a request in a hook that runs on rank 0 only."""

    main_only = True

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        if state.step == self.step:
            state.request(self.what, "test")


SEEN: list[dict[str, Any]] = []
"""The arguments of all calls of `recorded` in this process."""


def recorded(
    prompts: list[Any],
    completions: list[str],
    prompt_texts: list[str],
    completion_ids: list[list[int]],
    answer: list[str],
) -> list[float]:
    """A reward function that records its arguments."""
    SEEN.append(
        {
            "prompts": prompts,
            "completions": completions,
            "prompt_texts": prompt_texts,
            "completion_ids": completion_ids,
            "answer": answer,
        }
    )
    return [float(len(ids)) for ids in completion_ids]


class AskDifferently(Callback):
    """Ranks make different requests after one step: rank 0 the first of `what`, the other ranks the last."""

    def __init__(self, step: int, what: list[str]):
        self.step, self.what = step, what

    def on_step_end(self, state: RunState) -> None:
        if state.step == self.step:
            state.request(self.what[0 if state.is_main else -1], f"test {rank()}")


class OneRankLeaves(Callback):
    """One rank requests preemption after a step; every rank writes the reason for the exit to a file."""

    def __init__(self, step: int, asks: int, folder: str):
        self.step, self.asks, self.folder = step, asks, folder

    def on_step_end(self, state: RunState) -> None:
        if state.step == self.step and rank() == self.asks:
            state.request("preempt", f"a reason of rank {rank()}")

    def on_train_end(self, state: RunState) -> None:
        (Path(self.folder) / f"left-{rank()}").write_text(str(state.exit and state.exit.reason))


class Putting(SFTTrainer):
    """Calls an operation that has no deterministic implementation on any device."""

    def train_step(self, micro: Micro) -> StepOutput:
        output = super().train_step(micro)
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
        return output


class RankMetrics(SFTTrainer):
    """Returns a metric on rank 1 only."""

    def train_step(self, micro: Micro) -> StepOutput:
        output = super().train_step(micro)
        return output if rank() == 0 else StepOutput(output.loss_sum, {**output.metrics, "extra": (1.0, 1.0)})


class AnyDevice(SingleDevice):
    """Accepts any device."""

    def check(self) -> None: ...
