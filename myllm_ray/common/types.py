"""Small types that several packages of `myllm_ray` share.

The module does not import torch, because the tasks and actors that use it on Ray would each spend seconds on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor, nn

Micro: TypeAlias = "dict[str, Tensor]"
"""A micro-batch: tensors by name, whose first dimension is the row.

`input_ids`, `labels` and `position_ids` are (rows, tokens), int64. `BaseTrainer.prepare_micro` appends tensors whose
first dimension is not the row.
"""

MetricPairs: TypeAlias = "dict[str, tuple[Tensor | float, Tensor | float]]"
"""Metrics as (sum, weight). Both are added over micro-batches and ranks and divided once, at the end."""

REQUESTS = ("save", "evaluate", "stop", "preempt", "abort")
"""The actions that a callback can request from the engine (`RunState.request`)."""

MEASURED = ("time", "tokens_per_second", "tflops_per_second", "mfu", "data_wait", "data_wait_share")
"""Metrics that depend on a clock or the machine, in addition to those whose names begin with `MEASURED_BEFORE`."""
MEASURED_BEFORE = ("time/", "memory/")


def is_measured(metric: str) -> bool:
    """Returns whether a metric depends on a clock or the machine, so that it differs between two equal runs."""
    return metric in MEASURED or metric.startswith(MEASURED_BEFORE)


IGNORE = -100
"""The label of a token that is not a target of the loss."""


class Position(NamedTuple):
    """A position in the data, the same on all ranks: the epoch and the number of its rows that were consumed.

    It does not depend on how a batch is split.
    """

    epoch: int = 0
    row: int = 0


@dataclass
class Batch:
    """One rank's share of a global batch. `next` is the position after the batch."""

    micros: list[Micro]
    position: Position
    next: Position
    fingerprint: int
    """Sum over this rank's rows of a hash of (index in the global batch, token ids). Sums of ranks add modulo 2**64."""


class BatchStream(Protocol):
    """A stream of global batches whose order depends only on the config and the data."""

    sources: list[str]

    def steps_in_epoch(self, epoch: int) -> int:
        """Returns the number of global batches in an epoch. The last one is padded with empty rows."""

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """Yields this rank's share of `steps` global batches, starting at `start` and continuing into later epochs."""


@dataclass
class StepOutput:
    """The result of a trainer for one micro-batch.

    `loss_sum` is a sum, not a mean. The engine divides it once, by the weight of the global batch.
    """

    loss_sum: Tensor
    metrics: MetricPairs = field(default_factory=dict)


class RouterLosses(NamedTuple):
    """Loss and load of the routers of a mixture-of-experts model for one micro-batch (ops/load_balancing.py)."""

    loss_sum: Tensor
    """Scalar with gradient: the weighted sum of the sequences' load-balancing losses, averaged over layers."""
    loads: Tensor
    """(layers, experts): number of tokens of each expert."""


class TokenLosses(NamedTuple):
    """Losses at the T target positions of a micro-batch, in row-major order."""

    nll_sum: Tensor
    """Scalar with gradient: sum of the negative log-likelihoods, in nats."""
    nll: Tensor
    """(T,) fp32, detached."""
    correct: Tensor
    """(T,) bool: whether the target was the most likely token."""
    router: RouterLosses | None = None
    """Set if the model received `sequences` and has routers."""


class TokenScores(NamedTuple):
    """Scores that a policy assigns to T tokens of a micro-batch."""

    log_probs: Tensor
    """(T,) with gradient, in nats."""
    entropies: Tensor
    """(T,) entropy of the distribution of each token, in nats, with gradient; zeros if it was not requested."""
    values: Tensor | None = None
    """(T,) the critic's estimate of the return from the state before each token, with gradient."""
    router: RouterLosses | None = None
    """Set if the model received `sequences` and has routers."""


@dataclass(frozen=True)
class Isolation:
    """Whether a model keeps documents that share a row independent of each other; computed by `models/isolation.py`."""

    isolated: bool | None
    """None: it could not be determined, which is treated as False."""
    reason: str
    """An explanation for log lines."""
    leak: float = 0.0
    """Largest difference, in nats, of a token's log-probability from its value in a row without other documents."""
    causal: bool = True
    """Whether a token depends only on the tokens before it; false for models that attend to later tokens."""
    boundaries: bool = False
    """Whether the model gives the same results with attention within documents (models/attention.py)."""
    boundaries_reason: str = "the attention of the model can't be replaced"
    """An explanation if `boundaries` is false."""

    def __str__(self) -> str:
        return self.reason


class Samples(NamedTuple):
    """A batch of N sampled answers."""

    tokens: Tensor
    """(N, L) token ids, including the token that ended an answer. Values after it are arbitrary."""
    lengths: Tensor
    """(N,) number of tokens of each answer."""
    ended: Tensor
    """(N,) bool: whether the answer ended with an end token or a stop text, not at the largest length."""


class Sampled(NamedTuple):
    """`Samples` with the log-probabilities of their tokens under the policy that sampled them."""

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    """(N, L), in nats, zero after the end of an answer."""


class RolloutJob(NamedTuple):
    """A micro-batch of prompts that other processes answer.

    `prompts`, `mask`, `group` and `seeds` are the arguments of `Sampler`.
    """

    prompts: Tensor
    mask: Tensor
    group: int
    seeds: list[int]


class RolloutPool(Protocol):
    """A pool of processes that sample answers with the weights that were loaded last."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Loads the weights of the model, by name, for all later jobs."""

    def submit(self, job: RolloutJob) -> Any:
        """Submits a job and returns a handle for `result`."""

    def result(self, asked: Any) -> Sampled:
        """Waits for the answers of the job with the handle `asked` and returns them."""


class Sampler(Protocol):
    """A callable that samples answers from a model."""

    max_new_tokens: int
    temperature: float
    end_tokens: tuple[int, ...]
    """Token ids that end an answer. The first one is also the padding after the end of an answer."""

    def __call__(self, model: nn.Module, prompts: Tensor, mask: Tensor, group: int, seeds: list[int]) -> Samples:
        """Samples `group` answers to each prompt.

        Args:
            model: The model to sample from.
            prompts: (B, P) token ids, padded on the right.
            mask: (B, P), zero at padding.
            group: Number of answers per prompt.
            seeds: One seed per answer.
        """

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of an answer without special tokens and stop texts."""


class Reward(Protocol):
    """A callable that assigns rewards to answers."""

    name: str
    weight: float
    failures: int
    """Number of answers so far that received the fallback reward."""

    def __call__(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """Returns one finite reward per completion.

        Args:
            prompts: The prompts of the data: texts, or lists of messages {role, content}.
            completions: Texts without special tokens and stop texts.
            columns: Lists with one value per completion: `prompt_texts` (the input of the model, with special tokens),
                `prompt_ids`, `completion_ids`, and the other fields of the data.
        """


class Exit(NamedTuple):
    """The reason why a run ended before its last step."""

    kind: Literal["preempted", "rewind", "aborted", "amended"]
    """How the run ended.

    preempted: it saved a checkpoint and can be resumed. rewind: it resumes from the checkpoint before a bad step, or
    from the one before a damaged checkpoint.
    aborted: it ended without saving a checkpoint and is not resumed. amended: it saved a checkpoint and resumes from it
    with the next amendment of its config (config/amendments.py).
    """
    reason: str
    """An explanation for log lines."""


@dataclass
class RunState:
    """The state of a run that callbacks receive.

    It contains only data that can be pickled, because Ray workers send it to the driver.
    """

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    position: Position = field(default_factory=Position)
    folder: str | None = None
    is_main: bool = True
    requests: dict[str, str] = field(default_factory=dict)
    """Open requests and their reasons, from callbacks (see `request`) and from outside the process (`preempt`)."""
    exit: Exit | None = None
    """The reason of an early end; None while the run trains and after its last step."""
    telemetry: dict[str, float] | None = None
    """Measurements of rank 0's process since the last log (`engine/reporting/monitor.py`). They depend on the machine,
    so they are not metrics. None if nothing measures them."""

    def request(self, what: str, reason: str = "") -> None:
        """Requests an action of the engine. The request of one rank applies to all ranks.

        Args:
            what: `evaluate`: in this step if the request is made in on_step_end. All other actions follow the last
                step of the batch. `save`: save a checkpoint. `stop`: end the run as if this were its last step.
                `preempt`: save, even if the config disables checkpoints, and end; on Ray the supervisor resumes the run
                at once, unless a stop was requested. `abort`: end without saving.
            reason: An explanation for logs.

        Raises:
            ValueError: `what` is not in `REQUESTS`.
        """
        if what not in REQUESTS:
            raise ValueError(f"a callback can request {', '.join(REQUESTS[:-1])} or {REQUESTS[-1]}, not {what!r}")
        self.requests[what] = reason


def shifted_targets(labels: Tensor) -> Tensor:
    """Returns the target of each position: the label of the next position, and `IGNORE` at the last one.

    Args:
        labels: (B, S).

    Returns:
        (B, S) targets.
    """
    import torch

    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def as_mapping(config: Any) -> Mapping[str, Any]:
    """Returns a config, given as a pydantic model, a mapping or None, as nested mappings."""
    return config.model_dump() if hasattr(config, "model_dump") else (config or {})
