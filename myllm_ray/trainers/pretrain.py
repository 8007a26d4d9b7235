"""Causal-LM pretraining: every token of a text is a target of the loss.

With `data.packing: true`, documents are concatenated and split every `data.sequence_length` tokens. Attention and
positions restart at each document. Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.trainers.causal_lm import CausalLMTrainer


class PretrainTrainer(CausalLMTrainer):
    """Trains on every token of every text."""

    class Config(TrainerSection):
        """Settings of causal-LM pretraining: none."""

        trains_on_whole_text = True

        def length_limit(self, config: TrainerConfig) -> int | None:
            # Long documents are split, so no text is too long.
            return None
