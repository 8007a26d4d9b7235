"""Batched sampling with a key-value cache and separate random numbers for each answer.

An answer depends on the weights, the prompt and its seed. It does not depend on the number of workers as long as the
same prompts are sampled together, which holds for the prompts of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import StopStringCriteria

from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.types import Samples
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.growing_cache import GrowingLayer

_BLOCK = 256
_COMPACT = 0.75
"""Finished answers are removed from the batch when at most this share of its rows is still generating."""


def draw(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Returns, for each row, the first index whose cumulative probability exceeds the draw.

    The search finds first a block of tokens and then the token in the block, because a cumulative sum over the whole
    vocabulary in fp64 costs more than the head.

    Args:
        probabilities: (rows, V).
        draws: (rows,) uniform random numbers in [0, 1).

    Returns:
        (rows,) token ids.
    """
    _rows, size = probabilities.shape
    full = size // _BLOCK * _BLOCK
    sums = torch.cat(
        [probabilities[:, :full].unflatten(1, (-1, _BLOCK)).sum(-1), probabilities[:, full:].sum(-1, keepdim=True)], 1
    )
    # In fp64: in fp32 the rounding error of the cumulative sums could exceed the probability of rare tokens.
    upto = sums.double().cumsum(-1)
    # The draws are scaled by the total, because softmax in fp32 does not sum to exactly 1.
    wanted = draws * upto[:, -1]
    block = torch.searchsorted(upto, wanted[:, None], right=True).squeeze(1).clamp(max=upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1), 0.0)
    places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=probabilities.device)
    inside = probabilities.gather(1, places.clamp(max=size - 1)).double() * (places < size)
    place = torch.searchsorted(inside.cumsum(-1), (wanted - before)[:, None], right=True).squeeze(1)
    # Rounding can place a draw after the last token with a non-zero probability in its block.
    last = (inside > 0).long().cumsum(-1).argmax(-1)
    return block * _BLOCK + torch.minimum(place, last)


class HFSampler:
    """Samples answers from a causal LM of transformers with the model's own forward pass.

    Args:
        tokenizer: Decodes the answers.
        settings: The section `rollout` of the config.
        end_tokens: The ids of the tokens that end an answer; default: the tokenizer's end-of-text token.
    """

    def __init__(self, tokenizer: Any, settings: RolloutSection, end_tokens: Sequence[int] = ()):
        self.tokenizer, self.settings = tokenizer, settings
        self.max_new_tokens, self.temperature = settings.max_new_tokens, settings.temperature
        self.end_tokens = tuple(end_tokens) or (int(tokenizer.eos_token_id),)
        self.warpers = LogitsProcessorList()
        if settings.top_k:
            self.warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))
        if settings.min_p:
            self.warpers.append(MinPLogitsWarper(settings.min_p))
        self.stop = StopStringCriteria(tokenizer, settings.stop) if settings.stop else None

    def decode(self, tokens: list[int]) -> str:
        """Returns the text of an answer without special tokens, cut before the first stop text."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        ends = [at for word in self.settings.stop if (at := text.find(word)) >= 0]
        return text[: min(ends)] if ends else text

    @torch.no_grad()
    def __call__(self, model: nn.Module, prompts: Tensor, mask: Tensor, group: int, seeds: list[int]) -> Samples:
        """Samples `group` answers to each prompt.

        Args:
            model: A `CausalLM`, possibly wrapped.
            prompts: (N, P) token ids.
            mask: (N, P) bool, true at the tokens of the prompt, which precede the padding.
            group: The number of answers to each prompt.
            seeds: One seed for each of the N · group answers.

        Returns:
            The N · group answers; those to one prompt are consecutive.
        """
        inner = getattr(model, "module", model)
        assert isinstance(inner, CausalLM), "sampling needs a causal LM of transformers"
        was_training = inner.training
        inner.eval()
        try:
            return self._sample(inner, prompts, mask, group, seeds)
        finally:
            inner.train(was_training)

    def _sample(self, model: CausalLM, prompts: Tensor, mask: Tensor, group: int, seeds: list[int]) -> Samples:
        device, most, (count, width) = prompts.device, self.max_new_tokens, prompts.shape
        # All random numbers are drawn before the loop: an answer does not depend on when other answers end.
        draws = torch.from_numpy(
            np.stack([np.random.Generator(np.random.PCG64(seed)).random(most) for seed in seeds])
        ).to(device)
        cache = DynamicCache()
        layers = [GrowingLayer(width + most) for _ in range(model.config.get_text_config().num_hidden_layers)]
        cache.layers = list(layers)
        # Prompts are aligned to the right, so that all answers start in the same column.
        lengths = mask.sum(1)
        shift = (torch.arange(width, device=device) - (width - lengths)[:, None]) % width
        ids, seen = prompts.gather(1, shift), mask.gather(1, shift)
        # Each prompt is computed once. Its keys and values are then repeated for the answers of its group.
        logits = self._forward(model, ids, seen, (seen.cumsum(1) - 1).clamp(min=0), cache).repeat_interleave(group, 0)
        for layer in layers:
            layer.key_buffer, layer.value_buffer = (
                b.repeat_interleave(group, 0) for b in (layer.key_buffer, layer.value_buffer)
            )
        whole = bool(mask.all())  # without padding no mask is needed, and the forward pass is shorter
        seen = torch.nn.functional.pad(seen, (0, most), value=True).repeat_interleave(group, 0)
        positions = lengths.repeat_interleave(group)
        rows = count * group
        ends = torch.tensor(self.end_tokens, device=device)
        tokens = torch.full((rows, most), self.end_tokens[0], device=device)
        lengths, ended = torch.full((rows,), most, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
        alive = torch.arange(rows, device=device)  # indices of the rows that are still in the batch
        for step in range(most):
            chosen = self.choose(logits, draws[alive, step])
            chosen = torch.where(ended[alive], self.end_tokens[0], chosen)
            tokens[alive, step] = chosen
            done = self._ended(chosen, tokens[alive, : step + 1], ends) & ~ended[alive]
            lengths[alive[done]] = step + 1
            ended[alive[done]] = True
            writing = ~ended[alive]
            left = int(writing.sum())
            if left == 0 or step + 1 == most:
                break
            if left <= _COMPACT * len(alive):
                kept = writing.nonzero().squeeze(1)
                for layer in layers:
                    layer.select(kept)
                alive, seen, positions, chosen = alive[kept], seen[kept], positions[kept], chosen[kept]
            used = width + step + 1
            logits = self._forward(model, chosen[:, None], None if whole else seen[:, :used], positions[:, None], cache)
            positions = positions + 1
        return Samples(tokens, lengths, ended)

    @staticmethod
    def _forward(model: nn.Module, ids: Tensor, seen: Tensor | None, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Returns the (rows, V) logits after the last token of each row.

        It calls the model itself, so that the hooks of FSDP run.
        """
        logits: Tensor = model(
            input_ids=ids, attention_mask=None if seen is None else seen.long(), position_ids=positions, cache=cache
        )
        return logits

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Returns one token for each row, drawn by inverse transform sampling.

        Args:
            logits: (rows, V).
            draws: (rows,) uniform random numbers in [0, 1).

        Returns:
            (rows,) token ids.
        """
        scores = logits.float() if self.temperature == 1 else logits.float() / self.temperature
        # These warpers read the scores only, not the tokens before them.
        scores = self.warpers(cast(Any, None), cast(Any, scores)) if len(self.warpers) else scores
        return draw(torch.softmax(scores, -1), draws)

    def _ended(self, chosen: Tensor, written: Tensor, ends: Tensor) -> Tensor:
        found = torch.isin(chosen, ends)
        return found if self.stop is None else found | self.stop(written, None)


def sample(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    end_tokens: Sequence[int] = (),
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> list[str]:
    """Returns a completion of each prompt as text.

    Args:
        model: The model to sample from.
        tokenizer: Decodes the completions.
        prompts: Token ids of each prompt.
        end_tokens: The ids of the tokens that end a completion; default: the tokenizer's end-of-text token.
        max_new_tokens: The largest number of tokens in a completion.
        temperature: Divides the logits; 0 selects the most likely token at every step.
        top_p: Smallest probability mass of the tokens to sample from (nucleus sampling).
        seed: The seed of the random numbers.
    """
    settings = RolloutSection(
        max_new_tokens=max_new_tokens, temperature=temperature or 1.0, top_p=top_p, top_k=None if temperature else 1
    )
    sampler = HFSampler(tokenizer, settings, end_tokens)
    texts = []
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        result = sampler(model, ids, torch.ones_like(ids), 1, [derive_seed("sample", seed, number)])
        texts.append(sampler.decode(result.tokens[0, : int(result.lengths[0])].tolist()))
    return texts
