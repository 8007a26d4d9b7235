"""Next-token cross entropy and its metrics, shared by pretraining and supervised fine-tuning.

    L = - Σ_t m_t · log p(x_t | x_<t)  /  Σ_t m_t

The sums are over all positions t of the *global* batch. m_t is 0 where the label is IGNORE, else 1. This module
computes the numerator, one micro-batch at a time. The engine divides once, by the denominator summed over micro-batches
and ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.micros import is_derived, with_derived
from myllm_ray.common.modules import logits_of
from myllm_ray.common.types import IGNORE, MetricPairs, Micro, StepOutput, TokenLosses, shifted_targets
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits
from myllm_ray.ops.documents import Documents
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.routing import real_tokens, routing_inputs, rows_as_sequences, with_router_loss


def with_targets(micro: Micro, sources: int = 0) -> Micro:
    """Returns a micro-batch with the places of its targets, from which `token_losses` and `token_metrics` read.

    The added tensors are `predictors` (T,), the index in the flattened (B · S) micro-batch of the token that predicts
    each target; `targets` (T,), token ids; `packed_rows` (P,), the indices of the rows with more than one document,
    where padding counts as a document; and for each data source `targets_of_source/<number>`, the indices of its
    targets in (T,).

    Args:
        micro: The micro-batch. Returned unchanged if it contains the places of its current tensors.
        sources: Number of data sources, 0 to leave out their targets.
    """
    read = tuple(name for name in ("labels", "position_ids", "source_ids") if name in micro)
    if is_derived(micro, read):
        return micro
    shifted = shifted_targets(micro["labels"]).flatten()
    predictors = (shifted != IGNORE).nonzero().squeeze(1)
    added = {"predictors": predictors, "targets": shifted[predictors]}
    if sources and "source_ids" in micro:
        of_targets = micro["source_ids"].flatten()[predictors]
        for number in range(sources):
            added[f"targets_of_source/{number}"] = (of_targets == number).nonzero().squeeze(1)
    if "position_ids" in micro:
        added["packed_rows"] = (micro["position_ids"].diff(dim=1) != 1).any(1).nonzero().squeeze(1)
    return with_derived(micro, read, added)


def token_losses(
    model: nn.Module, micro: Micro, routing: dict[str, Tensor] | None = None, documents: Documents | None = None
) -> TokenLosses:
    """Returns the losses at the target positions of a micro-batch.

    The model either computes the losses itself (`computes_token_losses`) or returns logits (B, S, V), as a tensor or as
    the attribute `.logits` of its output. A model that returns logits is called with those of `input_ids`,
    `position_ids` and `use_cache=False` that its `forward` accepts.

    Args:
        model: The model, possibly inside a wrapper with the attribute `module`.
        micro: The micro-batch, with `input_ids` and `labels` (B, S), and optionally `position_ids` (B, S). Without the
            tensors of `with_targets`, they are computed here, which synchronizes with the device.
        routing: Arguments from `routing_inputs` (trainers/routing.py). A model that returns logits ignores them.
        documents: The documents of the rows, for a model that takes them. A model that returns logits ignores them.

    Returns:
        The losses, in nats, in row-major order of the target positions.
    """
    micro = with_targets(micro)
    inputs: Micro = {k: micro[k] for k in ("input_ids", "position_ids") if k in micro}
    # A model that computes the losses itself can avoid the full (B, S, V) logits.
    if getattr(getattr(model, "module", model), "computes_token_losses", False):
        more = {} if documents is None else {"documents": documents}
        places = _places(model, micro)
        result: TokenLosses = model(labels=micro["labels"], **inputs, **places, **(routing or {}), **more)
        return result
    return cross_entropy_from_logits(logits_of(model, inputs), micro["targets"], micro["predictors"])


def _places(model: nn.Module, micro: Micro) -> dict[str, Any]:
    """Returns the arguments for the places of the targets. Empty for a model that finds them from the labels."""
    if not getattr(getattr(model, "module", model), "takes_places", False):
        return {}
    # The number of packed rows is a shape, which the host knows; None: the model has to look at the position ids.
    packed = len(micro["packed_rows"]) > 0 if "packed_rows" in micro else None
    return {"predictors": micro["predictors"], "targets": micro["targets"], "packed": packed}


def token_metrics(losses: TokenLosses, micro: Micro, names: list[str], bytes_per_token: Tensor | None) -> MetricPairs:
    """Returns the metrics of a micro-batch as (sum, weight) pairs.

    Args:
        losses: Losses at the T target positions.
        micro: The micro-batch, with the tensors of `with_targets`.
        names: Names of the sources. If there are at least two, each has a metric `loss/<name>`.
        bytes_per_token: (V,) number of UTF-8 bytes of each token, or None for no bits per byte.
    """
    targets = micro["targets"]
    count = torch.tensor(len(targets))
    metrics: MetricPairs = {"token_accuracy": (losses.correct.sum(), count), "tokens": (count, 1.0)}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = (losses.nll.sum() / math.log(2), bytes_per_token.to(targets.device)[targets].sum())
    if "targets_of_source/0" in micro and len(names) > 1:
        # All sources are reported for every micro-batch, with weight 0 if unused: ranks must report the same names.
        for number, name in enumerate(names):
            here = micro[f"targets_of_source/{number}"]
            metrics[f"loss/{name}"] = (losses.nll[here].sum(), len(here))
    return metrics


class CausalLMTrainer(BaseTrainer):
    """Trains with next-token cross entropy on the labelled tokens."""

    trains_routers = True

    def prepare_micro(self, micro: Micro) -> Micro:
        """Returns the micro-batch with the places of its targets, and the lengths of its documents where they are used.

        See `with_targets` and `with_documents`.
        """
        return self.with_documents(with_targets(micro, len(self.sources) if len(self.sources) > 1 else 0))

    def batch_weight(self, micro: Micro) -> Tensor:
        """Returns the number of target tokens of the micro-batch."""
        # The first label of a row has no predictor, so it is not a target.
        return (micro["labels"][:, 1:] != IGNORE).sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Returns the sum of -log p over the target tokens of the micro-batch, in nats."""
        micro = self.prepare_micro(micro)
        # Rows are the sequences of the routers' loss, each weighted by its number of target tokens.
        weights = (shifted_targets(micro["labels"]) != IGNORE).sum(1)
        routing = routing_inputs(self.model, rows_as_sequences(real_tokens(micro)), weights)
        losses = token_losses(self.model, micro, routing, self.documents_of(micro))
        metrics = token_metrics(losses, micro, self.sources, self.bytes_per_token)
        # With routers, the logged training loss includes their loss. Perplexity is computed from this metric instead.
        if losses.router is not None:
            metrics["lm_loss"] = (losses.nll_sum.detach(), weights.sum())
        return with_router_loss(self.model, StepOutput(losses.nll_sum, metrics), losses.router, weights)

    def target_losses(self, micro: Micro) -> Tensor | None:
        """Returns (T,) -log p of each target token of the micro-batch, in nats."""
        micro = self.prepare_micro(micro)
        return token_losses(self.model, micro, documents=self.documents_of(micro)).nll

    def derived_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Returns the perplexity, exp(mean negative log-likelihood), in addition to the metrics of the base class."""
        nll = metrics.get("lm_loss", metrics.get("loss"))
        # math.exp raises an OverflowError above about 709.
        return {
            **({} if nll is None else {"perplexity": math.exp(min(nll, 700.0))}),
            **super().derived_metrics(metrics),
        }
