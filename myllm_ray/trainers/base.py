"""What an algorithm is to the engine: micro-batches to loss sums. No device, no optimizer, no logging, no division."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from myllm_ray.common.types import Batch, Micro, StepOutput
from myllm_ray.trainers.routing import expert_metrics


class BaseTrainer(ABC):
    """An algorithm. Subclasses say what the loss of a micro-batch is, and what it is averaged over.

    Args:
        model: what is trained; one module, also where an algorithm trains several networks.
        dataset: for use by hand: a sequence of rows (`{"input_ids": [...], "labels": [...]}`, labels optional).
        bytes_per_token: UTF-8 bytes of each token id, for bits per byte.
        sources: names of the data's sources, for the loss per source.
    """

    reads: ClassVar[tuple[str, ...]] = ("tokens",)
    """Kinds of documents it can train on (data/records.py)."""
    trains: ClassVar[str] = "causal_lm"
    """Kind of model it trains: causal_lm, reward_model, or actor_critic."""
    uses: ClassVar[tuple[str, ...]] = ()
    """What else it is given by name, as keyword arguments: knobs, reference, reward_model, sampler, rewards."""
    empty_batch_reason: str | None = None
    """Why a global batch may have the weight 0, which is an error otherwise; its gradient is zero."""
    trains_routers: ClassVar[bool] = False
    """Whether the loss has the term that balances the experts of a mixture-of-experts model (`trainers/routing.py`)."""
    layout: ClassVar[str] = "documents"
    """What it puts in a row (models/isolation.py): documents, or rollouts, several; padded: one, with padding behind it."""
    steps_per_batch = 1
    """Optimizer steps that `expand` makes of a global batch."""

    def __init__(self, model: nn.Module, dataset: Any = None, *, bytes_per_token: Iterable[int] | None = None,
                 sources: Iterable[str] = ()):
        self.model = model
        self.dataset = dataset
        self.sources = list(sources)
        self.bytes_per_token = None if bytes_per_token is None else torch.tensor(list(bytes_per_token))
        self.samples: list[dict[str, Any]] = []
        """Some answers of the last batch, for the table of samples; see `logging.samples_every_steps`."""
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Around forward passes of its own, in `expand`: the configured precision. Set by the engine, like `generation`."""
        self.generation: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Around sampling: parameters whole."""

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        """Models that are used but not trained (a reference, a reward model); the engine gives them back prepared."""
        return {}

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches as they are trained on, one after the other: a trainer that looks ahead overrides this."""
        return batches

    def expand(self, batch: Batch) -> Iterator[list[Micro]]:
        """Optimizer steps of a batch, each a list of micro-batches. Default: one step on the batch as it is.

        A generator that goes on after the engine has stepped: PPO rolls out, then yields epochs × minibatches.
        """
        yield batch.micros

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def check(self, batch: Batch) -> None:
        """Look at the first batch of a run, before the first step, for what would spoil it.

        Raises:
            TrainingError: it would.
        """

    def row_places(self, micro: Micro) -> Tensor | None:
        """(rows,) the place in the global batch of each row that `train_step` passes to the model, for dropout; None: not known.

        A trainer that builds other rows from a micro-batch overrides this.
        """
        return micro["places"][:, 0] if "places" in micro else None

    @abstractmethod
    def batch_weight(self, micro: Micro) -> Tensor:
        """How much this micro-batch adds to what the loss is averaged over (target tokens, pairs, sequences)."""

    @abstractmethod
    def train_step(self, micro: Micro) -> StepOutput:
        """Forward pass and loss *sum* of a micro-batch."""

    def evaluation_micros(self, batch: Batch) -> Iterable[Micro]:
        """The micro-batches of a batch of held-out data, as `evaluation_step` takes them; called without gradients."""
        return batch.micros

    def evaluation_weight(self, micro: Micro) -> Tensor:
        """What the loss on held-out data is averaged over."""
        return self.batch_weight(micro)

    def evaluation_step(self, micro: Micro) -> StepOutput:
        """The same for held-out data; called without gradients and in evaluation mode."""
        return self.train_step(micro)

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics that follow from the averaged ones, logged in addition; those whose names begin with `_` only serve here.

        Here: the load of the experts, for models that have any (`trainers/routing.py`).
        """
        return expert_metrics(self.model, metrics)

    def state_dict(self) -> dict[str, Any]:
        """JSON-like state of the algorithm itself (a controller's coefficient), saved in every checkpoint."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...
