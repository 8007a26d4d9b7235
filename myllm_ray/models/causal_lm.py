"""A Hugging Face causal LM whose forward pass gives token losses instead of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from myllm_ray.common.types import TokenLosses, shifted_targets
from myllm_ray.ops.cross_entropy import cross_entropy_from_logits, linear_cross_entropy

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
        self.fused = isinstance(head, nn.Linear) and head.bias is None and not changed
        """Whether the logits are exactly `hidden @ head.T`, so that the fused head may stand in for the model's own."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> TokenLosses:
        """Losses at the positions with a target. All arguments (B, S).

        Documents of a packed row are told apart by `position_ids` that restart. transformers does so only without an
        attention mask and without a cache: with either, documents leak into each other silently.
        """
        targets = shifted_targets(labels)
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if not self.fused:
            return cross_entropy_from_logits(self.model(**inputs).logits, targets)
        hidden = self.model.base_model(**inputs).last_hidden_state
        return linear_cross_entropy(hidden, self.model.get_output_embeddings().weight, targets)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """`torch.compile` of all but the fused head, which picks its rows and writes its own gradients already."""
        if self.fused:
            self.model.base_model.compile(*args, **kwargs)
        else:
            super().compile(*args, **kwargs)
