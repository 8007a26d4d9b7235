"""Patches CPU feature detection, so that no test depends on the features of this machine.

`TEST_CPU` selects the CPU: `poor` has neither bf16 nor fp16 arithmetic, `rich` has both, unset leaves what the hardware
reports. torch emulates what the hardware lacks, so tests of fp16 run on a `rich` CPU everywhere. `TEST_CORES` is the
number of cores that Python reports. Processes that a test starts inherit the variables and apply them when they import
this module.
"""

from __future__ import annotations

import os
from typing import Any

import torch

VARIABLE = "TEST_CPU"
CORES = "TEST_CORES"
OPERATORS = ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported")


class Answer:
    """A detection operator of torch with a fixed answer; torch's registry still finds its overloads."""

    def __init__(self, operator: Any, answer: bool):
        self._operator, self._answer = operator, answer

    def __call__(self) -> bool:
        return self._answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


def apply_cpu() -> None:
    """Patches torch's detection according to `TEST_CPU`."""
    cpu = os.environ.get(VARIABLE)
    for name in OPERATORS if cpu else ():
        setattr(
            torch.ops.mkldnn, name, Answer(getattr(torch.ops.mkldnn, name), {"poor": False, "rich": True}[cpu or ""])
        )


def apply_cores() -> None:
    """Patches the number of cores according to `TEST_CORES`."""
    if count := int(os.environ.get(CORES, 0)):
        os.cpu_count = lambda: count
        os.sched_getaffinity = lambda pid: set(range(count))  # type: ignore[attr-defined,unused-ignore]


apply_cpu()
apply_cores()
