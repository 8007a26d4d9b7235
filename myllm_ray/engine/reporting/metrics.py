"""Metrics as sums and weights, which are added over micro-batches and ranks and divided once at the end."""

from __future__ import annotations

import zlib
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from myllm_ray.common import distributed
from myllm_ray.common.host_copy import HostCopy
from myllm_ray.common.types import StepOutput
from myllm_ray.config.errors import TrainingError


class Reducer(Protocol):
    """Sums values over all ranks; tensors are flattened."""

    def all_reduce(self, values: list[Tensor | float]) -> Tensor: ...

    def start_all_reduce(self, values: list[Tensor | float]) -> HostCopy: ...


class MetricSum:
    """Sums of the outputs of a step's micro-batches.

    Args:
        weight: what the loss is divided by, already summed over ranks.
    """

    def __init__(self, weight: float):
        self.weight = weight
        self._loss: Tensor | float = 0.0
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, output: StepOutput) -> None:
        """Adds the output of a micro-batch."""
        # float64, because rounding errors of many terms add up in fp32. The sums stay on the device: no sync here.
        self._loss = self._loss + output.loss_sum.detach().double()
        for name, (total, weight) in output.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(total).detach().double()
            self._weights[name] = self._weights.get(name, 0.0) + torch.as_tensor(weight).detach().double()

    @property
    def checksum(self) -> int:
        """A checksum of the metrics' names. It is less than 2**32, so sums over ranks are also exact in float64."""
        return zlib.crc32("\n".join(sorted(self._sums)).encode())

    def check_names(self, checksums: int) -> None:
        """Compares the names of the metrics with those of the other ranks.

        Args:
            checksums: the sum of `checksum` over ranks.

        Raises:
            TrainingError: the names differ between ranks. `reduce` would add up different metrics, or wait forever.
        """
        if checksums != self.checksum * distributed.world_size():
            raise TrainingError(
                f"the trainer's metrics differ between ranks (rank {distributed.rank()}: "
                f"{', '.join(sorted(self._sums))}): return all metrics for every micro-batch, with weight 0 if unused"
            )

    def loss(self, accelerator: Reducer) -> float:
        """Returns the loss of the global batch, over all ranks. Contains a collective."""
        return float(accelerator.all_reduce([self._loss])[0]) / max(self.weight, 1e-9)

    def reduce(self, accelerator: Reducer) -> dict[str, float]:
        """Returns `loss` and all metrics, over all ranks. Contains a collective. See `ReducedMetrics.read`."""
        return self.start(accelerator).read()

    def start(self, accelerator: Reducer) -> ReducedMetrics:
        """Starts the collective of `reduce` and returns its result, which the host can read later."""
        # Sorted: the all-reduce adds values by position, so every rank must send them in the same order. A single
        # all-reduce takes all of them, as [loss, sums, weights].
        names = sorted(self._sums)
        sizes = [s.numel() if isinstance(s := self._sums[name], Tensor) else 1 for name in names]
        several = {n for n in names if isinstance(s := self._sums[n], Tensor) and s.dim() > 0}
        reduced = accelerator.start_all_reduce(
            [self._loss, *(self._sums[n] for n in names), *(self._weights[n] for n in names)]
        )
        return ReducedMetrics(reduced, self.weight, names, sizes, several)


class ReducedMetrics(NamedTuple):
    """Sums and weights over all ranks."""

    copy: HostCopy
    """The loss, the sums of each name, and one weight of each name."""
    weight: float
    names: list[str]
    sizes: list[int]
    """Number of sums of each name."""
    several: set[str]
    """Names whose sum is a tensor with dimensions."""

    def read(self) -> dict[str, float]:
        """Waits for the device and returns `loss` and all metrics.

        Metrics with the weight 0 are left out, also `loss`. `tokens` is a sum without division. If a sum is a tensor
        with dimensions, its entries are returned as `<name>/0`, `<name>/1`, ...
        """
        reduced = self.copy.read().tolist()
        values = {"loss": reduced[0] / self.weight} if self.weight else {}
        first = 1
        for name, size, weight in zip(self.names, self.sizes, reduced[1 + sum(self.sizes) :], strict=True):
            totals, first = reduced[first : first + size], first + size
            for number, total in enumerate(totals):
                if name == "tokens":
                    values[name] = total
                elif weight:
                    values[f"{name}/{number}" if name in self.several else name] = total / weight
        return values
