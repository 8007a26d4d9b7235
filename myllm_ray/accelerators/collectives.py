"""Sums over the ranks of a run, on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from myllm_ray.common import distributed
from myllm_ray.common.host_copy import HostCopy


class Collectives:
    """The collectives of a backend that are not part of the exchange of gradients."""

    device: torch.device

    def all_reduce(self, values: Iterable[float | Tensor]) -> Tensor:
        """Returns the sums of values over all ranks. Waits for the device if a value is computed there.

        Args:
            values: Numbers or tensors, in the same order and with the same sizes on every rank. Tensors are flattened.

        Returns:
            (n,) float64 on the CPU, n being the total number of elements.
        """
        return self.start_all_reduce(values).read()

    def start_all_reduce(self, values: Iterable[float | Tensor]) -> HostCopy:
        """Starts `all_reduce` on the device and returns its result, which the host can read later."""
        # float64, because fp32 represents integers, such as counts of tokens, only up to 2**24. One collective for all
        # values, on the device of the training collectives. `full` writes a number without a copy from the host.
        items = [
            v.detach().to(self.device, torch.float64, non_blocking=True).flatten()
            if isinstance(v, Tensor)
            else torch.full((1,), v, dtype=torch.float64, device=self.device)
            for v in values
        ]
        return HostCopy(distributed.all_reduce_(torch.cat(items)))

    def all_reduce_on_host(self, values: Iterable[float | Tensor]) -> list[float]:
        """Returns the sums of values on the host over all ranks, without work for the device.

        Args:
            values: Numbers or scalar tensors. A tensor on the device is waited for.
        """
        numbers = [v.detach().to("cpu", torch.float64) if isinstance(v, Tensor) else v for v in values]
        tensor = torch.tensor([n.tolist() if isinstance(n, Tensor) else n for n in numbers], dtype=torch.float64)
        return distributed.all_reduce_on_host_(tensor).tolist()  # type: ignore[no-any-return]

    def all_reduce_ints(self, values: Iterable[int]) -> list[int]:
        """Returns the sums of integers over all ranks, modulo 2**64, as signed 64-bit integers."""
        return distributed.all_reduce_on_host_(torch.tensor(list(values), dtype=torch.int64)).tolist()  # type: ignore[no-any-return]

    def barrier(self) -> None:
        """Waits until every rank has reached this call."""
        distributed.barrier()
