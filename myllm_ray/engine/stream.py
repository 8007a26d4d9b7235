"""A stream of a data set in memory, for manually constructed engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from myllm_ray.common import distributed
from myllm_ray.common.seeds import derive_seed, generator
from myllm_ray.common.types import IGNORE, Batch, Micro, Position
from myllm_ray.config.errors import DataError

_FILL = {"labels": IGNORE, "segment_ids": -1}
_NUMBERS = ("margins", "desirable", "documents", "places")
"""Fields with values per row, not per token; they are not padded."""


class InMemoryStream:
    """Rows of a sequence, shuffled by seed and epoch and padded to the longest row of their micro-batch.

    Each item is a mapping of one-dimensional sequences. `labels` default to `input_ids`. Items that are already padded
    must be padded on the right and contain an `attention_mask`.

    Args:
        dataset: the items.
        batch_size: rows of a global batch, over all ranks.
        micro_size: rows of a micro-batch; default: the rows of a rank.
        seed: determines the order of the rows.

    Raises:
        DataError: the data set is empty, or `batch_size` is not a multiple of ranks × `micro_size`.
    """

    def __init__(self, dataset: Sequence[Any], batch_size: int, micro_size: int | None = None, seed: int = 0):
        if not len(dataset):
            raise DataError("the data set is empty: there is nothing to train on")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.micro_size = micro_size or max(1, batch_size // self.world_size)
        if batch_size % (self.micro_size * self.world_size):
            raise DataError(
                f"batch_size={batch_size} is not divisible by {self.world_size} workers × micro-batches of "
                f"{self.micro_size}"
            )
        self.sources: list[str] = []

    def steps_in_epoch(self, epoch: int) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """Yields this rank's share of `steps` global batches; the last one of an epoch is filled up with empty rows."""
        position = start
        for _ in range(steps):
            if position.row >= len(self.dataset):
                position = Position(position.epoch + 1, 0)
            # A function of (seed, epoch) only, so that a resumed run and every rank get the same order.
            order = generator("order", self.seed, position.epoch).permutation(len(self.dataset))
            micros, fingerprint = [], 0
            for j in range(self.rank, self.batch_size // self.micro_size, self.world_size):
                first = position.row + j * self.micro_size
                micro = self._micro([self._item(int(i)) for i in order[first : first + self.micro_size]])
                rows = len(micro["input_ids"])
                micros.append(
                    {"places": torch.arange(j * self.micro_size, j * self.micro_size + rows)[:, None], **micro}
                )
                # A sum over rows does not depend on how the batch is divided into ranks and micro-batches.
                for place, i in enumerate(order[first : first + self.micro_size]):
                    fingerprint += derive_seed("row", first + place, *self._item(int(i))["input_ids"].tolist())
            # `next` of the last batch is the start of the next epoch, so that the engine detects the end of the epoch.
            done = position.row + self.batch_size >= len(self.dataset)
            after = (
                Position(position.epoch + 1, 0) if done else Position(position.epoch, position.row + self.batch_size)
            )
            yield Batch(micros, position, after, fingerprint % 2**63)
            position = after

    def _item(self, index: int) -> Micro:
        item = {name: torch.as_tensor(value) for name, value in self.dataset[index].items()}
        if "input_ids" not in item:
            raise DataError(f"row {index} of the data set has no input_ids; it has {', '.join(item) or 'nothing'}")
        item = {"labels": item["input_ids"], **item}
        mask = item.pop(
            "attention_mask", None
        )  # with padding on the right, causal attention needs no mask, but the loss does
        if mask is not None:
            item["labels"] = torch.where(mask.bool(), item["labels"], IGNORE)
        return item

    def _micro(self, items: list[Micro]) -> Micro:
        # A rank without rows also runs the forward and backward pass, because every rank must enter their collectives.
        if not items:
            items = [
                {name: value[: value.shape[0] if name in _NUMBERS else 0] for name, value in self._item(0).items()}
            ]
        width = max(2, max(len(item["input_ids"]) for item in items))
        micro: Micro = {}
        for name in items[0]:
            if name in _NUMBERS:
                micro[name] = torch.stack([i[name] for i in items])
                continue
            fill = _FILL.get(name, 0)
            micro[name] = torch.stack(
                [torch.nn.functional.pad(i[name], (0, width - len(i[name])), value=fill) for i in items]
            )
        micro.setdefault("position_ids", torch.arange(width).expand(len(items), width))
        return micro
