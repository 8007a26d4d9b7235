"""The interface between an algorithm and the engine: a trainer computes loss sums of micro-batches.

A trainer does not depend on devices, optimizers or logging. It does not divide by the batch size: the engine divides.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from myllm_ray.common.types import Batch, Micro, StepOutput
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import Section
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.config.validation import typed
from myllm_ray.ops.documents import Documents, KernelChoice, chosen_kernel, document_lengths
from myllm_ray.ops.workload import Workload, answer_work, document_work
from myllm_ray.trainers.routing import expert_metrics


class BaseTrainer(ABC):
    """Base class of all trainers.

    A subclass defines the loss of a micro-batch and the weight that the loss is averaged over. It declares its settings
    as `class Config(TrainerSection)` and reads them from `self.config`.

    Args:
        model: The module to train. It is a single module even if the algorithm trains several networks.
        dataset: A sequence of rows (`{"input_ids": [...], "labels": [...]}`, labels optional), for runs without a
            stream.
        config: The trainer's section of a run's config; default: built from `options`.
        bytes_per_token: Number of UTF-8 bytes of each token id, for the metric bits per byte.
        sources: Names of the data sources, for the loss per source.
        options: The keys of `Config` as keyword arguments, instead of `config`.

    Raises:
        ConfigError: An option is unknown or has a wrong value, or both `config` and options are given.
    """

    Config: ClassVar[type[TrainerSection]] = TrainerSection
    """The class that validates the trainer's section of a run's config."""
    sections: ClassVar[Mapping[str, type[Section]]] = {}
    """Additional sections of a run's config that this trainer needs, by key."""
    reads: ClassVar[tuple[str, ...]] = ("tokens",)
    """Kinds of examples that the trainer reads (data/examples.py)."""
    trains: ClassVar[str] = "causal_lm"
    """Kind of model that the trainer trains: causal_lm, reward_model, or actor_critic."""
    dependencies: ClassVar[tuple[str, ...]] = ()
    """Names of additional keyword arguments of the constructor. Each is a method of `dependencies.Dependencies`."""
    empty_batch_reason: str | None = None
    """The reason why a global batch may have weight 0. Its gradient is zero. None: such a batch is an error."""
    trains_routers: ClassVar[bool] = False
    """Whether the loss includes the load-balancing loss of mixture-of-experts routers (trainers/routing.py)."""
    layout: ClassVar[str] = "documents"
    """Content of a row (models/isolation.py): "documents" or "rollouts", several per row; "padded": one example."""
    document_kernel: KernelChoice | None = None
    """Attention within the documents of a row, for models that take `documents`; None: attention with a mask."""
    steps_per_batch = 1
    """Number of optimizer steps that `optimizer_steps` yields per global batch."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Any = None,
        *,
        config: Any = None,
        bytes_per_token: Iterable[int] | None = None,
        sources: Iterable[str] = (),
        **options: Any,
    ):
        if config is not None and options:
            raise ConfigError(f"{type(self).__name__} takes config or single keys, not both (got {', '.join(options)})")
        self.config: Any = typed(self.Config, options, type(self).__name__) if config is None else config
        self.model = model
        self.dataset = dataset
        self.sources = list(sources)
        self.bytes_per_token = None if bytes_per_token is None else torch.tensor(list(bytes_per_token))
        self.samples: list[dict[str, Any]] = []
        """Some answers of the last batch, for the table of samples (`logging.samples_every_steps`)."""
        # The defaults of both contexts let a trainer run without an engine.
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Context manager for forward passes in `optimizer_steps`: the configured precision. Set by the engine."""
        self.generation: Callable[[], AbstractContextManager[Any]] = nullcontext
        """Context manager for sampling, inside which sharded parameters are gathered. Set by the engine."""

    @classmethod
    def for_config(cls, config: TrainerSection) -> type[BaseTrainer]:
        """Returns the class that trains with these settings.

        A trainer whose variants are separate classes overrides this method.
        """
        return cls

    @classmethod
    def kind_of_model(cls, config: TrainerSection) -> str:
        """Returns the kind of model to build: `trains`, or a variant that the settings select."""
        return cls.trains

    @property
    def frozen_models(self) -> dict[str, nn.Module]:
        """Models that are used but not trained, by attribute name.

        The engine moves or shards them and sets the attributes to the prepared models.
        """
        return {}

    def prefetch_rollouts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yields the batches in the order of training.

        A trainer that samples answers in advance overrides this method.
        """
        return batches

    def optimizer_steps(self, batch: Batch) -> Iterator[list[Micro]]:
        """Yields the optimizer steps of a batch, each as a list of micro-batches.

        The default is one step on the whole batch. The generator resumes after the engine has made the step, so later
        steps see the updated weights. PPO, for example, samples answers and then yields the steps of its epochs.
        """
        yield batch.micros

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def check(self, batch: Batch) -> None:
        """Checks the trainer's assumptions on the first batch of a run, before the first step.

        Raises:
            TrainingError: An assumption does not hold.
        """

    def row_places(self, micro: Micro) -> Tensor | None:
        """Returns (rows,) the index in the global batch of each row that `train_step` passes to the model.

        The index seeds dropout. None if it is unknown. A trainer that builds different rows from a micro-batch
        overrides this method.
        """
        return micro["places"][:, 0] if "places" in micro else None

    def prepare_micro(self, micro: Micro) -> Micro:
        """Returns a micro-batch with the tensors that a step would otherwise have to read back from the device.

        The engine calls this for every micro-batch while its tensors are on the CPU, before they are moved to the
        device. It may be called in another thread, and again with its own result, which is then returned unchanged.
        Boolean masks and `nonzero` synchronize with a device; indices that are computed here do not. The argument is
        not modified. `train_step` must also accept micro-batches without the added tensors.

        Returns:
            The micro-batch, with added keys. Their tensors may have another first dimension than the rows.
        """
        return micro

    def with_documents(self, micro: Micro) -> Micro:
        """Returns a micro-batch with `document_lengths` (ops/documents.py), if `document_kernel` uses them."""
        if self.document_kernel is None or "document_lengths" in micro or "position_ids" not in micro:
            return micro
        return {**micro, "document_lengths": document_lengths(micro["position_ids"])}

    def documents_of(self, micro: Micro) -> Documents | None:
        """Returns the documents of the rows of a micro-batch, or None for attention with a mask."""
        lengths = micro.get("document_lengths")
        kernel = None if lengths is None else chosen_kernel(self.document_kernel, lengths)
        return None if lengths is None or kernel is None else Documents(lengths, kernel)

    def workload(self, micro: Micro) -> Workload:
        """Returns what `train_step` computes with the trained model, for the number of operations of a step.

        The engine calls it before the micro-batch is moved to the device. A trainer whose rows are not packed documents
        overrides it.
        """
        return answer_work(micro) if "prompt_lengths" in micro else document_work(micro)

    @abstractmethod
    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the weight of a micro-batch in the average of the loss, a scalar.

        It is the number of target tokens, pairs or sequences of the micro-batch.
        """

    @abstractmethod
    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the loss *sum* of a micro-batch, with its autograd graph, and metrics as (sum, weight)."""

    def target_losses(self, micro: Micro) -> Tensor | None:
        """Returns (T,) the loss of each target token of a micro-batch, in row-major order; None by default.

        Their sum is the loss sum of `train_step`. `myllm-ray replay` uses them for the loss of each document.
        """
        return None

    def evaluation_micros(self, batch: Batch) -> Iterable[Micro]:
        """Returns the micro-batches of a held-out batch for `evaluation_step`. It is called without gradients."""
        return batch.micros

    def evaluation_weight(self, micro: Micro) -> Tensor:
        """Returns the weight of a micro-batch in the average of the held-out loss; see `batch_weight`."""
        return self.batch_weight(micro)

    def evaluation_step(self, micro: Micro) -> StepOutput:
        """Returns the same as `train_step`, for held-out data.

        It is called without gradients and in evaluation mode.
        """
        return self.train_step(micro)

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns metrics for the log that are computed from the averaged metrics.

        Averaged metrics whose names begin with `_` are not logged; they are inputs of this method. The base class
        computes the load of the experts of a mixture of experts (trainers/routing.py).
        """
        return expert_metrics(self.model, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Returns the algorithm's own state as JSON-compatible values, for example a controller's coefficient.

        It is saved in every checkpoint.
        """
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...
