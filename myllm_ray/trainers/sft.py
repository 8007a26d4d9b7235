"""Supervised fine-tuning: the loss stands on the response, and on the token that ends it.

The mask is made where the text is tokenised (`data/tokenize.py`): the prompt's labels are IGNORE unless
`sft.train_on_prompt`. So the equation is that of `trainers/causal_lm.py` with m_t = 1 on response tokens. The average is
over response tokens of the global batch, not over examples: a long answer weighs more than a short one, whichever rank or
micro-batch it falls in. Ouyang et al., 2022, "Training language models to follow instructions with human feedback" §3.5.
"""

from __future__ import annotations

from myllm_ray.trainers.causal_lm import CausalLMTrainer


class SFTTrainer(CausalLMTrainer):
    """Supervised fine-tuning."""
