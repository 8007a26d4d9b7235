"""Causal-LM pretraining: the loss stands on every token of a text.

Documents are laid end to end and cut every `data.sequence_length` tokens (`data.packing: true`); attention and positions
restart at each document. Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

from myllm_ray.trainers.causal_lm import CausalLMTrainer


class PretrainTrainer(CausalLMTrainer):
    """Causal-LM pretraining (the original engine's default trainer)."""
