"""Models with a scalar head: a reward model, and a policy with a critic."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import RouterLosses, TokenScores
from myllm_ray.models.causal_lm import CausalLM, router_losses
from myllm_ray.models.packed_rows import known_packing
from myllm_ray.models.routers import Routers
from myllm_ray.ops.log_probs import log_probs_from_logits


def _flat(values: Tensor) -> Tensor:
    """Returns (N, 1) values as (N,), in fp32 or the input's higher precision."""
    # A sum over the single entry instead of a view: the hooks of FSDP do not support an output that is a view.
    return values.to(torch.promote_types(values.dtype, torch.float32)).sum(-1)


class RewardModel(nn.Module):
    """Wraps a sequence classifier of transformers with one label, so that its export is in a standard format.

    Args:
        model: A sequence classifier of transformers.
    """

    takes_places = True
    """Whether `forward` takes the argument `packed`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config
        self.routers = Routers([model.base_model])
        self.router_loss_weight = 0.0

    def forward(
        self,
        input_ids: Tensor,
        ends: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequences: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        packed: bool | None = None,
    ) -> Tensor | tuple[Tensor, RouterLosses]:
        """Returns the scores at the last tokens of answers.

        Args:
            input_ids: (B, S) token ids.
            ends: (N,) indices of the answers' last tokens in the flattened (B · S) input.
            position_ids: (B, S).
            attention_mask: As in `CausalLM.forward`.
            sequences: As in `CausalLM.forward`.
            sequence_weights: As in `CausalLM.forward`.
            packed: As in `CausalLM.forward`.

        Returns:
            (N,) scores in fp32 or higher precision; with `sequences` and a model with routers, a tuple of the scores
            and the loss of the routers.
        """
        with known_packing(packed), self.routers.recording() if sequences is not None else nullcontext():
            hidden = self.model.base_model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        scores = _flat(self.model.score(hidden.flatten(0, 1)[ends]))
        if sequences is None or not self.routers:
            return scores
        return scores, router_losses(self, sequences, sequence_weights)


class ActorCritic(CausalLM):
    """A policy and its critic in one module, so that a backend prepares a single module.

    Args:
        model: The policy.
        critic: The trunk of the critic. With None the value head uses the policy's last hidden states.
    """

    def __init__(self, model: Any, critic: Any = None):
        super().__init__(model)
        self.critic = critic
        if critic is not None:
            self.routers = Routers([model.base_model, critic])
        # No bias, which would be an additional parameter without weight decay. The head starts at zero.
        self.value = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def score(
        self, inputs: dict[str, Any], predictors: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> TokenScores:
        """Returns the policy's scores, with the critic's value of the state in which each target was chosen.

        See `CausalLM.score` for the arguments.
        """
        if self.fused:
            hidden = self.hidden(inputs).flatten(0, 1)[predictors]
            scores = self.head_scores(hidden, targets, temperature, entropy)
        else:
            output = self.model(**inputs, output_hidden_states=True)
            hidden = output.hidden_states[-1].flatten(0, 1)[predictors]
            scores = log_probs_from_logits(output.logits.flatten(0, 1)[predictors], targets, temperature, entropy)
        states = hidden if self.critic is None else self.critic(**inputs).last_hidden_state.flatten(0, 1)[predictors]
        return scores._replace(values=_flat(self.value(states.to(self.value.weight.dtype))))
