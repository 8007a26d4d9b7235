"""Small types that the floors of the house hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

Micro = dict[str, Tensor]
"""A micro-batch: tensors by name, first dimension rows. `input_ids`, `labels`, `position_ids`: (rows, tokens), int64."""

MetricPairs = dict[str, tuple[Tensor | float, Tensor | float]]
"""Metrics as (sum, weight): what can be added up over micro-batches and ranks before it is divided once."""

IGNORE = -100
"""The label of a token that is not trained on."""


class Position(NamedTuple):
    """A place in the data, one for the whole job: rows of `epoch` already consumed. Independent of how a batch is cut."""

    epoch: int = 0
    row: int = 0


@dataclass
class Batch:
    """One rank's share of a global batch."""

    micros: list[Micro]
    position: Position
    next: Position
    fingerprint: int
    """Sum over this rank's rows of a hash of (place in the global batch, token ids); ranks add up modulo 2**64."""


class BatchStream(Protocol):
    """Global batches in an order that depends on the config and the data alone."""

    sources: list[str]

    def steps_in_epoch(self, epoch: int) -> int:
        """Global batches in one epoch (the last one is filled up with empty rows)."""

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """This rank's share of `steps` global batches from `start` on, from one epoch into the next."""


def steps_of_run(max_steps: int | None, epochs: int | None, steps_per_batch: int, steps_in_epoch: Callable[[int], int]) -> int:
    """Optimizer steps of a run: `max_steps`, or those of `epochs` passes over the data (default: one).

    Args:
        steps_per_batch: optimizer steps for each global batch (PPO: epochs × minibatches).
        steps_in_epoch: global batches in an epoch.
    """
    return max_steps or steps_per_batch * sum(steps_in_epoch(epoch) for epoch in range(epochs or 1))


@dataclass
class StepOutput:
    """What a trainer makes of one micro-batch.

    `loss_sum` is a sum, never a mean: the engine divides once, by the weight of the whole global batch.
    """

    loss_sum: Tensor
    metrics: MetricPairs = field(default_factory=dict)


class RouterLosses(NamedTuple):
    """What the routers of a mixture-of-experts model say of a micro-batch (ops/load_balancing.py)."""

    loss_sum: Tensor
    """Scalar with gradient: the sequences' balancing losses, each times its weight, added up; the mean over layers."""
    loads: Tensor
    """(layers, experts) tokens that each expert got."""


class TokenLosses(NamedTuple):
    """Losses at the T target positions of a micro-batch, in row-major order."""

    nll_sum: Tensor
    """Scalar with gradient: sum of the negative log-likelihoods, in nats."""
    nll: Tensor
    """(T,) fp32, detached."""
    correct: Tensor
    """(T,) bool: the target was the most likely token."""
    router: RouterLosses | None = None
    """Where the model was given `sequences` and has routers."""


class TokenScores(NamedTuple):
    """What a policy thinks of the T scored tokens of a micro-batch."""

    log_probs: Tensor
    """(T,) with gradient, in nats."""
    entropies: Tensor
    """(T,) entropy of the distribution each was drawn from, with gradient; zeros where it was not asked for."""
    values: Tensor | None = None
    """(T,) what a critic expects from before each token on, with gradient."""
    router: RouterLosses | None = None
    """Where the model was given `sequences` and has routers."""


@dataclass(frozen=True)
class Isolation:
    """Whether documents that share a row are independent of each other in a model, as `models/isolation.py` found."""

    isolated: bool | None
    """None: it could not be found out, and has to be treated as no."""
    reason: str
    """In words, for a log line."""
    leak: float = 0.0
    """By how many nats the log-probability of a token differs from that in a row without other documents, at most."""
    causal: bool = True
    """Whether a token is predicted from what precedes it alone: false for models that look ahead, whatever shares the row."""

    def __str__(self) -> str:
        return self.reason


class Samples(NamedTuple):
    """N sampled answers."""

    tokens: Tensor
    """(N, L) token ids, the token that ended an answer included; anything behind it."""
    lengths: Tensor
    """(N,) tokens in each answer."""
    ended: Tensor
    """(N,) bool: it ended by itself, rather than at the longest length."""


class Sampled(NamedTuple):
    """`Samples`, with what the policy that drew them thought of them."""

    tokens: Tensor
    lengths: Tensor
    ended: Tensor
    log_probs: Tensor
    """(N, L), zero behind the end of an answer."""


class RolloutJob(NamedTuple):
    """A micro-batch of prompts to be answered somewhere else."""

    prompts: Tensor
    mask: Tensor
    group: int
    seeds: list[int]


class RolloutPool(Protocol):
    """Samples answers elsewhere, with the weights that it was last given."""

    def load(self, weights: dict[str, Tensor]) -> None:
        """Weights of the model by name, for all jobs from now on."""

    def submit(self, job: RolloutJob) -> Any:
        """Ask for answers; the result is for `result`."""

    def result(self, asked: Any) -> Sampled:
        """Wait for answers."""


class Sampler(Protocol):
    """Samples answers from a model."""

    max_new_tokens: int
    temperature: float
    end_tokens: tuple[int, ...]
    """Any of these ends an answer; the first fills up behind its end."""

    def __call__(self, model: nn.Module, prompts: Tensor, mask: Tensor, group: int, seeds: list[int]) -> Samples:
        """`group` answers to each of the prompts (B, P), padded on the right as `mask` says; a seed for each answer."""

    def decode(self, tokens: list[int]) -> str:
        """Text of an answer, special tokens and stop texts left out."""


class Reward(Protocol):
    """Gives rewards to answers."""

    name: str
    weight: float
    failures: int
    """Answers that got the fallback, so far."""

    def __call__(self, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> list[float]:
        """One finite number for each completion.

        Args:
            prompts: as the data has them: texts, or lists of messages {role, content}.
            completions: texts, special tokens and stop texts left out.
            columns: one value for each completion: `prompt_texts` (what the model read, with special tokens), `prompt_ids`,
                `completion_ids`, and the other fields of the data.
        """


@dataclass
class RunState:
    """What callbacks see of a run. Plain data, so it also travels from a Ray worker to the driver."""

    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    position: Position = field(default_factory=Position)
    folder: str | None = None
    is_main: bool = True
    requests: dict[str, str] = field(default_factory=dict)
    """Open requests, of callbacks (see `request`) and from outside (`leave`), each with its reason."""
    left: str | None = None
    """Why the run was left before its end, to go on from its newest checkpoint; None where it has ended."""
    rewound: bool = False
    """It was left because of a bad step: to go on at once, from the checkpoint before it."""
    abandoned: bool = False
    """It was left because nobody wants it any more: no checkpoint was saved."""

    def request(self, what: str, reason: str = "") -> None:
        """Ask the engine to `save`, `evaluate` or `stop` after this step; to `leave` the run: to save, whatever the config says, and go on
        another time; or to `abandon` it: to end without saving.

        All ranks follow when one asks.
        """
        if what not in ("save", "evaluate", "stop", "leave", "abandon"):
            raise ValueError(f"a callback can request save, evaluate, stop, leave or abandon, not {what!r}")
        self.requests[what] = reason


def shifted_targets(labels: Tensor) -> Tensor:
    """The target of each position: the label of the next one, `IGNORE` at the end. Labels (B, S) -> targets (B, S)."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)


def as_mapping(config: Any) -> Mapping[str, Any]:
    """A config as nested mappings, whether it came as a pydantic model or as a plain dict."""
    return config.model_dump() if hasattr(config, "model_dump") else (config or {})
