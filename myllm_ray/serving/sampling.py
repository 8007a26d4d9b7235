"""Settings with which answers are sampled, as users give them in a chat and clients in a request."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveInt
from transformers import GenerationConfig

from myllm_ray.common.seeds import derive_seed
from myllm_ray.config.sections import Section
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.models.generate import HFSampler

_SHARED = ("temperature", "top_p", "top_k", "min_p")


class Sampling(Section):
    """The distribution from which tokens are sampled, and where an answer ends."""

    temperature: float = Field(0.8, ge=0, description="divides the logits; 0: the most likely token at every step")
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: PositiveInt | None = None
    min_p: float = Field(0.0, ge=0, lt=1)
    max_new_tokens: PositiveInt = 512
    stop: list[str] = Field(default_factory=list, description="texts that end an answer")

    @staticmethod
    def of(generation: GenerationConfig) -> dict[str, Any]:
        """Returns the settings that a model's generation config contains."""
        if generation.do_sample is False:
            return {}
        given = {name: getattr(generation, name, None) for name in _SHARED}
        # transformers writes top_k: 0 and temperature: 0.0 for values that are not set.
        return {name: value for name, value in given.items() if value}

    def sampler(self, tokenizer: Any, end_tokens: Sequence[int]) -> HFSampler:
        """Returns the sampler of these settings. It does not end at stop texts; `TextStream` finds them."""
        settings = RolloutSection(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature or 1.0,
            top_p=self.top_p,
            top_k=self.top_k if self.temperature else 1,
            min_p=self.min_p,
        )
        return HFSampler(tokenizer, settings, end_tokens)


def answer_seed(seed: int, number: int) -> int:
    """Returns the seed of an answer's random numbers, as `myllm-ray sample` derives it.

    Args:
        seed: The seed that the user gave.
        number: The index of the answer in a chat or in a request.
    """
    return derive_seed("sample", seed, number)


def random_seed() -> int:
    """Returns a seed for a request that has none."""
    return secrets.randbits(63)
