"""Models with a scalar head: a reward model, and a policy with a critic beside it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import RouterLosses, TokenScores
from myllm_ray.models.causal_lm import CausalLM, router_losses
from myllm_ray.models.routers import Routers
from myllm_ray.ops.log_probs import linear_log_probs, log_probs_from_logits


def _flat(values: Tensor) -> Tensor:
    """(N, 1) -> (N,), in fp32 at least. A sum over the one entry: FSDP's hooks do not like a view as output."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).sum(-1)


class RewardModel(nn.Module):
    """Wraps a sequence classifier of transformers with one label, so that its export is one that any tool loads."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config
        self.routers = Routers([model.base_model])
        self.router_loss_weight = 0.0

    def forward(self, input_ids: Tensor, ends: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                sequences: Tensor | None = None, sequence_weights: Tensor | None = None) -> Tensor | tuple[Tensor, RouterLosses]:
        """Scores (N,), in fp32 at least, at the places `ends` (N,) of the flattened (B · S) input: the last tokens of answers.

        With `sequences` and `sequence_weights` (see `CausalLM.forward`), and a model with routers: the scores and the routers' loss.
        """
        with self.routers.recording() if sequences is not None else nullcontext():
            hidden = self.model.base_model(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask,
                                           use_cache=False).last_hidden_state
        scores = _flat(self.model.score(hidden.flatten(0, 1)[ends]))
        if sequences is None or not self.routers:
            return scores
        return scores, router_losses(self, sequences, sequence_weights)


class ActorCritic(CausalLM):
    """A policy and its critic as one module, so that every backend prepares one thing.

    Args:
        model: the policy.
        critic: the critic's own trunk; None: a head on the policy's last hidden states.
    """

    def __init__(self, model: Any, critic: Any = None):
        super().__init__(model)
        self.critic = critic
        if critic is not None:
            self.routers = Routers([model.base_model, critic])
        # No bias: the whole head starts at zero, and a bias would be one more parameter without weight decay to explain.
        self.value = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def score(self, inputs: dict[str, Any], predictors: Tensor, targets: Tensor, temperature: float, entropy: bool) -> TokenScores:
        """The policy's scores, and the value of the state in which each target was chosen."""
        if self.fused:
            hidden = self.hidden(inputs).flatten(0, 1)[predictors]
            scores = linear_log_probs(hidden, self.head, targets, temperature, entropy)
        else:
            output = self.model(**inputs, output_hidden_states=True)
            hidden = output.hidden_states[-1].flatten(0, 1)[predictors]
            scores = log_probs_from_logits(output.logits.flatten(0, 1)[predictors], targets, temperature, entropy)
        states = hidden if self.critic is None else self.critic(**inputs).last_hidden_state.flatten(0, 1)[predictors]
        return scores._replace(values=_flat(self.value(states.to(self.value.weight.dtype))))
