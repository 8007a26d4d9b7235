"""A Hugging Face causal LM whose forward pass gives token losses or scores instead of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import RouterLosses, TokenLosses, TokenScores, shifted_targets
from myllm_ray.models.routers import Routers
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits, linear_cross_entropy
from myllm_ray.ops.log_probs import linear_log_probs, log_probs_from_logits

_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class CausalLM(nn.Module):
    """Wraps a causal LM of transformers; parameter names are the wrapped model's behind `model.`.

    The head runs inside `forward`, so that DDP and FSDP see it, and only where there is a target.
    """

    computes_token_losses = True

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config
        head = model.get_output_embeddings()
        changed = any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES)
        self.fused = isinstance(head, nn.Linear) and head.bias is None and not changed and model.base_model is not model
        """Whether the logits are exactly `hidden @ head.T`, so that the fused head may stand in for the model's own."""
        self.routers = Routers([model.base_model])
        self.router_loss_weight = 0.0
        """What trainers multiply the loss of the routers by; see `models/routers.py`."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None,
                predictors: Tensor | None = None, targets: Tensor | None = None, attention_mask: Tensor | None = None,
                temperature: float = 1.0, entropy: bool = False, cache: Any = None, sequences: Tensor | None = None,
                sequence_weights: Tensor | None = None) -> TokenLosses | TokenScores | Tensor:
        """Losses at the positions with a label; where `targets` are given instead, their scores; with a cache, the next logits.

        Documents of a packed row are told apart by `position_ids` that restart. transformers does so only without an
        attention mask and without a cache: with either, documents leak into each other silently.

        Args:
            input_ids, labels, position_ids: (B, S).
            predictors: (T,) places in the flattened (B · S) input of the tokens that predict the targets.
            targets: (T,) token ids to score.
            attention_mask: (B, 1, S, S) bool, true where a token may look; default: causal.
            temperature, entropy: see `linear_log_probs`.
            cache: keys and values of what precedes `input_ids`, of transformers; then the result is (B, V), behind the last token,
                and `attention_mask` (B, all tokens so far) says which are padding.
            sequences: (B, S) number of the sequence that each token belongs to, -1 for padding. With it, and with `sequence_weights`
                (N,), the result has the loss of the model's routers, if it has any.
        """
        if cache is not None:
            return self.next_logits({"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask,
                                     "past_key_values": cache, "use_cache": True})
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False, "attention_mask": attention_mask}
        if getattr(self.config, "output_router_logits", False):  # transformers' own loss is neither wanted nor made for 4D masks
            inputs["output_router_logits"] = False
        if targets is not None:
            assert predictors is not None
            if sequences is None or not self.routers:
                return self.score(inputs, predictors, targets, temperature, entropy)
            with self.routers.recording():
                scores = self.score(inputs, predictors, targets, temperature, entropy)
            return scores._replace(router=router_losses(self, sequences, sequence_weights))
        assert labels is not None, "forward needs labels or targets"
        if sequences is None or not self.routers:
            return self.token_losses(inputs, labels)
        with self.routers.recording():
            losses = self.token_losses(inputs, labels)
        return losses._replace(router=router_losses(self, sequences, sequence_weights))

    def token_losses(self, inputs: dict[str, Any], labels: Tensor) -> TokenLosses:
        """Losses at the positions with a label."""
        shifted = shifted_targets(labels)
        if not self.fused:
            return cross_entropy_from_logits(self.model(**inputs).logits, shifted)
        return linear_cross_entropy(self.hidden(inputs), self.head, shifted)

    def score(self, inputs: dict[str, Any], predictors: Tensor, targets: Tensor, temperature: float, entropy: bool) -> TokenScores:
        """Log-probabilities and entropies of the targets."""
        if not self.fused:
            logits = self.model(**inputs).logits.flatten(0, 1)[predictors]
            return log_probs_from_logits(logits, targets, temperature, entropy)
        hidden = self.hidden(inputs).flatten(0, 1)[predictors]
        return linear_log_probs(hidden, self.head, targets, temperature, entropy)

    def next_logits(self, inputs: dict[str, Any]) -> Tensor:
        """(B, V): logits behind the last token of each row."""
        if not self.fused:
            return self.model(**inputs, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]
        hidden = self.hidden(inputs)[:, -1]
        return hidden @ self.head.T.to(hidden.dtype)

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """(B, S, H): the states that the head looks at."""
        states: Tensor = self.model.base_model(**inputs).last_hidden_state
        return states

    @property
    def head(self) -> Tensor:
        """(V, H)."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def parameters_used_directly(self) -> list[nn.Parameter]:
        """Parameters that `forward` uses without calling the module that has them."""
        return [self.model.get_output_embeddings().weight] if self.fused else []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` of all but the fused head, which picks its rows and writes its own gradients already."""
        if self.fused:
            self.model.base_model.compile(*args, **kwargs)
        else:
            super().compile(*args, **kwargs)


def router_losses(module: Any, sequences: Tensor, weights: Tensor | None) -> RouterLosses:
    """What the routers of a wrapper recorded; without a graph where their loss is switched off."""
    assert weights is not None, "sequences need sequence_weights"
    losses: RouterLosses
    with torch.set_grad_enabled(torch.is_grad_enabled() and module.router_loss_weight > 0):
        losses = module.routers.losses(sequences, weights)
    return losses
