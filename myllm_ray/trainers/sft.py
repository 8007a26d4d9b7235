"""Supervised fine-tuning: the targets of the loss are the response and the token that ends it.

The mask is created during tokenization (`data/tokenize.py`): the labels of the prompt are IGNORE unless
`sft.train_on_prompt` is set. The equation is therefore that of `trainers/causal_lm.py` with m_t = 1 on response tokens.
The average is over the response tokens of the global batch, not over examples. A long response has more weight than a
short one, independent of the rank or micro-batch that contains it. Ouyang et al., 2022, "Training language models to
follow instructions with human feedback" §3.5.
"""

from __future__ import annotations

from pydantic import Field

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.trainers import TrainerSection
from myllm_ray.trainers.causal_lm import CausalLMTrainer


class SFTTrainer(CausalLMTrainer):
    """Trains on responses, and on prompts if `train_on_prompt` is set."""

    class Config(TrainerSection):
        """Settings of supervised fine-tuning."""

        train_on_prompt: bool = Field(
            False, description="train on the tokens of the prompt too, not only on the response"
        )

        @property
        def trains_on_prompt(self) -> bool:
            return self.train_on_prompt

        def length_limit(self, config: TrainerConfig) -> int | None:
            return None
