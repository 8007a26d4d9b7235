"""Metrics as sums and weights, until the one moment at which they are divided."""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
from torch import Tensor

from myllm_ray.common import distributed
from myllm_ray.common.types import StepOutput
from myllm_ray.config.errors import TrainingError


class Reducer(Protocol):
    def all_reduce(self, values: list[Tensor | float]) -> Tensor: ...


class MetricSum:
    """Adds up the outputs of micro-batches.

    Args:
        weight: what the loss is divided by, already summed over ranks.
    """

    def __init__(self, weight: Tensor):
        self.weight = weight
        self._loss: Tensor | float = 0.0
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, Tensor | float] = {}

    def add(self, output: StepOutput) -> None:
        self._loss = self._loss + output.loss_sum.detach().double()
        for name, (total, weight) in output.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + torch.as_tensor(total).detach().double()
            self._weights[name] = self._weights.get(name, 0.0) + torch.as_tensor(weight).detach().double()

    @property
    def checksum(self) -> int:
        """Of the names of the metrics: less than 2**32, so that sums over ranks are exact in float64 too."""
        return zlib.crc32("\n".join(sorted(self._sums)).encode())

    def check_names(self, checksums: int) -> None:
        """Compare the names with those of the other ranks.

        Args:
            checksums: the sum of `checksum` over ranks.

        Raises:
            TrainingError: other ranks have other metrics; reducing them would add up different ones, or wait forever.
        """
        if checksums != self.checksum * distributed.world_size():
            raise TrainingError(f"the trainer's metrics differ between ranks (rank {distributed.rank()} has {', '.join(sorted(self._sums))}): "
                                "return every metric for every micro-batch, with weight 0 where there is nothing to measure")

    def loss(self, accelerator: Reducer) -> float:
        """Of the whole global batch, over all ranks."""
        return float(accelerator.all_reduce([self._loss])[0]) / max(float(self.weight), 1e-9)

    def reduce(self, accelerator: Reducer) -> dict[str, float]:
        """`loss` and all metrics, over all ranks. What has the weight 0 is left out, `loss` too; `tokens` is a plain sum.

        A sum may be a tensor of any shape: its entries are then `<name>/0`, `<name>/1`, ...
        """
        names = sorted(self._sums)
        sizes = [s.numel() if isinstance(s := self._sums[name], Tensor) else 1 for name in names]
        reduced = accelerator.all_reduce([self._loss, *(self._sums[n] for n in names), *(self._weights[n] for n in names)]).tolist()
        values = {"loss": reduced[0] / float(self.weight)} if self.weight else {}
        first = 1
        for name, size, weight in zip(names, sizes, reduced[1 + sum(sizes) :], strict=True):
            totals, first = reduced[first : first + size], first + size
            several = isinstance(sums := self._sums[name], Tensor) and sums.dim() > 0
            for number, total in enumerate(totals):
                if name == "tokens":
                    values[name] = total
                elif weight:
                    values[f"{name}/{number}" if several else name] = total / weight
        return values
