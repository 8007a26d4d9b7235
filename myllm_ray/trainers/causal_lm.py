"""What pretraining and supervised fine-tuning share: next-token cross entropy, and its metrics.

    L = - Σ_t m_t · log p(x_t | x_<t)  /  Σ_t m_t

over all positions t of the *global* batch; m_t is 0 where the label is IGNORE. The numerator is made here, micro-batch by
micro-batch; the engine divides, once, by the denominator summed over micro-batches and ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from myllm_ray.common.modules import logits_of
from myllm_ray.common.types import IGNORE, MetricPairs, Micro, StepOutput, TokenLosses, shifted_targets
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.routing import real_tokens, routing_inputs, rows_as_sequences, with_router_loss


def token_losses(model: nn.Module, micro: Micro, routing: dict[str, Tensor] | None = None) -> TokenLosses:
    """Losses at the target positions, from a model that computes them itself or from any model that gives logits.

    A plain model is called with those of `input_ids`, `position_ids` and `use_cache=False` that its `forward` takes, and
    returns logits (B, S, V), bare or as `.logits`.

    Args:
        routing: see `trainers/routing.py`.
    """
    inputs: Micro = {k: micro[k] for k in ("input_ids", "position_ids") if k in micro}
    if getattr(getattr(model, "module", model), "computes_token_losses", False):
        result: TokenLosses = model(labels=micro["labels"], **inputs, **(routing or {}))
        return result
    return cross_entropy_from_logits(logits_of(model, inputs), shifted_targets(micro["labels"]))


def token_metrics(losses: TokenLosses, targets: Tensor, sources: Tensor | None, names: list[str],
                  bytes_per_token: Tensor | None) -> MetricPairs:
    """Metrics as (sum, weight) pairs.

    Args:
        losses: at the T target positions.
        targets: (T,) token ids.
        sources: (T,) number of the source each target comes from.
        names: names of the sources; with two or more, each gets `loss/<name>`.
        bytes_per_token: (V,) UTF-8 bytes of each token.
    """
    count = torch.tensor(len(targets))
    metrics: MetricPairs = {"token_accuracy": (losses.correct.sum(), count), "tokens": (count, 1.0)}
    if bytes_per_token is not None:
        metrics["bits_per_byte"] = (losses.nll.sum() / math.log(2), bytes_per_token.to(targets.device)[targets].sum())
    if sources is not None and len(names) > 1:
        for number, name in enumerate(names):
            here = sources == number
            metrics[f"loss/{name}"] = (losses.nll[here].sum(), here.sum())
    return metrics


class CausalLMTrainer(BaseTrainer):
    """Next-token cross entropy on the tokens that carry a label."""

    trains_routers = True

    def batch_weight(self, micro: Micro) -> Tensor:
        """Target tokens."""
        return (micro["labels"][:, 1:] != IGNORE).sum()

    def train_step(self, micro: Micro) -> StepOutput:
        """Sum of -log p over the target tokens of the micro-batch."""
        targets = shifted_targets(micro["labels"])
        kept = targets != IGNORE
        weights = kept.sum(1)
        losses = token_losses(self.model, micro, routing_inputs(self.model, rows_as_sequences(real_tokens(micro)), weights))
        sources = micro["source_ids"][kept] if "source_ids" in micro else None
        metrics = token_metrics(losses, targets[kept], sources, self.sources, self.bytes_per_token)
        if losses.router is not None:
            metrics["lm_loss"] = (losses.nll_sum.detach(), weights.sum())
        return with_router_loss(self.model, StepOutput(losses.nll_sum, metrics), losses.router, weights)

    def derive(self, metrics: dict[str, float]) -> dict[str, float]:
        """Perplexity = exp(mean negative log-likelihood)."""
        nll = metrics.get("lm_loss", metrics.get("loss"))
        return {**({} if nll is None else {"perplexity": math.exp(min(nll, 700.0))}), **super().derive(metrics)}
