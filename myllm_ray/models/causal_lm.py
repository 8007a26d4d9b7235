"""Wrapper around a Hugging Face causal LM whose forward pass returns token losses or scores instead of logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.types import RouterLosses, TokenLosses, TokenScores, shifted_targets
from myllm_ray.models.attention import document_inputs
from myllm_ray.models.output_head import find_change
from myllm_ray.models.packed_rows import known_packing
from myllm_ray.models.routers import Routers
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits, linear_cross_entropy
from myllm_ray.ops.documents import Documents
from myllm_ray.ops.log_probs import linear_log_probs, log_probs_from_logits
from myllm_ray.ops.logits import UNCHANGED


class CausalLM(nn.Module):
    """Wraps a causal LM of transformers and returns token losses, token scores or next-token logits.

    Parameter names are those of the wrapped model with the prefix `model.`. The head runs inside `forward`, so that the
    hooks of DDP and FSDP cover it, and only at positions that have a target.

    Args:
        model: A causal LM of transformers.
    """

    computes_token_losses = True
    takes_places = True
    """Whether `forward` takes the arguments `predictors`, `targets` and `packed` together with `labels`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.config = model.config
        change = find_change(model)
        self.fused = change is not None
        """Whether the logits are `logit_change` of the linear head, so that the fused head can replace the model's."""
        self.logit_change = change or UNCHANGED
        self.routers = Routers([model.base_model])
        self.router_loss_weight = 0.0
        """Factor by which trainers multiply the load-balancing loss of the routers; see `models/routers.py`."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        predictors: Tensor | None = None,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        cache: Any = None,
        sequences: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        packed: bool | None = None,
        documents: Documents | None = None,
    ) -> TokenLosses | TokenScores | Tensor:
        """Returns token losses for `labels`, token scores for `targets`, or the next logits for a `cache`.

        Restarting `position_ids` separate the documents of a packed row. transformers applies this separation only
        without an attention mask and without a cache. With either of them, documents silently attend to each other.
        With `documents` the attention separates them without a mask (models/attention.py).

        Args:
            input_ids: (B, S) token ids.
            labels: (B, S) labels; the losses are those of the positions with a label. With `targets` and `predictors`,
                these are used instead of searching the labels, which synchronizes with the device.
            position_ids: (B, S) positions, restarting at each document.
            predictors: (T,) indices into the flattened (B · S) input of the tokens that predict the targets.
            targets: (T,) token ids to score.
            attention_mask: (B, 1, S, S) bool, true where a token may attend; default: causal. With a cache: (B, all
                tokens so far), false at padding.
            temperature: See `linear_log_probs`.
            entropy: See `linear_log_probs`.
            cache: The keys and values of the tokens before `input_ids`, a cache of transformers.
            sequences: (B, S) index of the sequence that each token belongs to, -1 for padding. It requires
                `sequence_weights`; the result then includes the loss of the model's routers, if it has routers.
            sequence_weights: (N,) weights of the sequences in the loss of the routers.
            packed: See `known_packing` (models/packed_rows.py).
            documents: The documents of each row, as in `position_ids`, instead of `attention_mask` and `cache`.

        Returns:
            `TokenLosses` for labels, `TokenScores` for targets, or (B, V) logits after the last token for a cache.
        """
        if cache is not None:
            return self.next_logits(
                {
                    "input_ids": input_ids,
                    "position_ids": position_ids,
                    "attention_mask": attention_mask,
                    "past_key_values": cache,
                    "use_cache": True,
                }
            )
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "use_cache": False,
            "attention_mask": attention_mask,
            **document_inputs(documents, input_ids),
        }
        # transformers' own router loss is not used, and it does not support 4D masks.
        if getattr(self.config, "output_router_logits", False):
            inputs["output_router_logits"] = False
        records = sequences is not None and len(self.routers) > 0
        result: TokenLosses | TokenScores
        with known_packing(packed), self.routers.recording() if records else nullcontext():
            if labels is not None:
                targets = shifted_targets(labels) if predictors is None or targets is None else targets
                result = self.token_losses(inputs, targets, predictors)
            else:
                assert targets is not None, "forward needs labels or targets"
                assert predictors is not None, "targets need predictors"
                result = self.score(inputs, predictors, targets, temperature, entropy)
        if not records or sequences is None:
            return result
        return result._replace(router=router_losses(self, sequences, sequence_weights))

    def token_losses(self, inputs: dict[str, Any], targets: Tensor, predictors: Tensor | None = None) -> TokenLosses:
        """Returns the losses at the positions with a target.

        Args:
            inputs: Arguments of the wrapped model.
            targets, predictors: See `at_targets` (ops/cross_entropy.py).
        """
        if not self.fused:
            return cross_entropy_from_logits(self.model(**inputs).logits, targets, predictors)
        return linear_cross_entropy(
            self.hidden(inputs),
            self.head,
            targets,
            predictors=predictors,
            bias=self.head_bias,
            change=self.logit_change,
        )

    def score(
        self, inputs: dict[str, Any], predictors: Tensor, targets: Tensor, temperature: float, entropy: bool
    ) -> TokenScores:
        """Returns the log-probabilities and entropies of the targets.

        Args:
            inputs: Arguments of the wrapped model.
            predictors: (T,) indices into the flattened (B · S) input.
            targets: (T,) token ids.
            temperature: Divides the logits.
            entropy: Whether to compute entropies.
        """
        if not self.fused:
            logits = self.model(**inputs).logits.flatten(0, 1)[predictors]
            return log_probs_from_logits(logits, targets, temperature, entropy)
        # Rows are selected before the head, so that no logits are computed at positions without a target.
        return self.head_scores(self.hidden(inputs).flatten(0, 1)[predictors], targets, temperature, entropy)

    def head_scores(self, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool) -> TokenScores:
        """Returns the scores of the targets for the (T, H) hidden states that predict them, with the fused head."""
        return linear_log_probs(
            hidden, self.head, targets, temperature, entropy, bias=self.head_bias, change=self.logit_change
        )

    def next_logits(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the (B, V) logits after the last token of each row."""
        if not self.fused:
            return self.model(**inputs, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]
        hidden = self.hidden(inputs)[:, -1]
        logits = hidden @ self.head.T.to(hidden.dtype)
        if self.head_bias is not None:
            logits = logits + self.head_bias.to(hidden.dtype)
        return self.logit_change.apply(logits)

    def hidden(self, inputs: dict[str, Any]) -> Tensor:
        """Returns the (B, S, H) hidden states that are the input of the head."""
        states: Tensor = self.model.base_model(**inputs).last_hidden_state
        return states

    @property
    def head(self) -> Tensor:
        """The weight of the output head, (V, H)."""
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    @property
    def head_bias(self) -> Tensor | None:
        """The bias of the output head, (V,), or None."""
        bias: Tensor | None = self.model.get_output_embeddings().bias
        return bias

    def parameters_used_directly(self) -> list[nn.Parameter]:
        """Returns the parameters that `forward` uses without calling the module that contains them.

        The forward hooks of that module do not run for them, so DeepSpeed registers them as external parameters
        (ZeRO-3).
        """
        return list(self.model.get_output_embeddings().parameters()) if self.fused else []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model in place with `torch.compile`.

        The fused head is excluded: it selects rows, whose number varies, and computes its own gradients.
        """
        if self.fused:
            self.model.base_model.compile(*args, **kwargs)
        else:
            super().compile(*args, **kwargs)


def router_losses(module: Any, sequences: Tensor, weights: Tensor | None) -> RouterLosses:
    """Returns the load-balancing loss and load that the routers of a wrapper recorded.

    Args:
        module: The wrapper, with `routers` and `router_loss_weight`.
        sequences: (B, S) index of each token's sequence, -1 for padding.
        weights: (N,) weights of the sequences.
    """
    assert weights is not None, "sequences need sequence_weights"
    losses: RouterLosses
    # With weight 0 only the load is reported, so no graph is kept.
    with torch.set_grad_enabled(torch.is_grad_enabled() and module.router_loss_weight > 0):
        losses = module.routers.losses(sequences, weights)
    return losses
