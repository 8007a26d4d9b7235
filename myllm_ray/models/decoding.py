"""Decoding one token at a time, for answers that are shown while they are sampled.

`HFSampler` samples a batch of answers as a whole. The classes here return the logits after each token instead:
`SequenceDecoder` for one conversation, whose keys and values are kept between its turns, and `BatchDecoder` for answers
that start and end at different times. `stream` draws the same tokens as `HFSampler` for the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from myllm_ray.config.errors import ConfigError
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.generate import HFSampler
from myllm_ray.models.growing_cache import GrowingLayer

_CAPACITY = 256
"""Tokens that a new cache allocates in addition to its first prompt."""
_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}


def check_decodable(model: CausalLM) -> None:
    """Checks that the state of a model is the keys and values of its tokens.

    Raises:
        ConfigError: The model has recurrent layers (Mamba, linear attention), whose state can't be cut.
    """
    config = model.config.get_text_config()
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others or getattr(model.model, "_is_stateful", False):
        raise ConfigError(
            f"models of type {config.model_type} have recurrent layers{f' ({others[0]})' if others else ''}, which the "
            "sampler does not support: export the run and use vLLM or transformers"
        )


class SequenceDecoder:
    """Next-token logits of one sequence. Keys and values are kept between sequences with a common beginning.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.tokens: list[int] = []
        """The tokens whose keys and values are in the cache."""
        self.reused = 0
        """The number of tokens of the last prompt that were in the cache."""
        self.layers: list[GrowingLayer] = []

    @torch.no_grad()
    def start(self, prompt: Sequence[int]) -> Tensor:
        """Returns the (1, V) logits after a prompt; computes only the tokens after the part that is in the cache.

        Args:
            prompt: Token ids, at least one.
        """
        same = 0
        for known, wanted in zip(self.tokens, prompt[:-1], strict=False):  # the last token is always computed
            if known != wanted:
                break
            same += 1
        self.reused = same
        if not self.layers:
            count = self.model.config.get_text_config().num_hidden_layers
            self.layers = [GrowingLayer(len(prompt) + _CAPACITY) for _ in range(count)]
        for layer in self.layers:
            layer.keep_first(same)
        return self._forward(list(self.tokens[:same]), prompt[same:])

    @torch.no_grad()
    def extend(self, token: int) -> Tensor:
        """Returns the (1, V) logits after one more token."""
        return self._forward(self.tokens, [token])

    def _forward(self, before: list[int], new: Sequence[int]) -> Tensor:
        # An exception (Ctrl-C, memory) leaves layers of unequal length, so the cache is empty until the pass is done.
        layers, self.layers, self.tokens = self.layers, [], []
        cache = DynamicCache()
        cache.layers = list(layers)
        device = self.model.head.device
        logits: Tensor = self.model(
            input_ids=torch.tensor([list(new)], device=device),
            position_ids=torch.arange(len(before), len(before) + len(new), device=device)[None],
            cache=cache,
        )
        before.extend(new)
        self.layers, self.tokens = layers, before
        return logits


class BatchDecoder:
    """Next-token logits of sequences that are decoded together and that start and end at different times.

    The last tokens of all sequences are in the same column of the cache. The columns before a shorter sequence are
    masked. A sequence that is alone is computed as by `SequenceDecoder`.

    Args:
        model: The model, in evaluation mode.
    """

    def __init__(self, model: CausalLM):
        self.model = model
        self.lengths: list[int] = []
        """The number of tokens of each sequence."""
        self._layers: list[GrowingLayer] = []

    def add(self, prompt: Sequence[int]) -> Tensor:
        """Adds a sequence and returns the (1, V) logits after its prompt.

        Args:
            prompt: Token ids, at least one.
        """
        alone = SequenceDecoder(self.model)
        logits = alone.start(prompt)
        if self.lengths:
            for layer, added in zip(self._layers, alone.layers, strict=True):
                layer.append_rows(added)
        else:
            self._layers = alone.layers
        self.lengths.append(len(prompt))
        return logits

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Appends one token to each sequence and returns the (rows, V) logits after them.

        Args:
            tokens: The token of each sequence, in the order of `lengths`.
        """
        device, used = self.model.head.device, max(self.lengths)
        lengths = torch.tensor(self.lengths, device=device)
        mask = None
        if min(self.lengths) < used:  # without padding no mask is needed
            mask = (torch.arange(used + 1, device=device) >= used - lengths[:, None]).long()
        cache = DynamicCache()
        cache.layers = list(self._layers)
        logits: Tensor = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            attention_mask=mask,
            position_ids=lengths[:, None],
            cache=cache,
        )
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Removes all sequences except these, and the columns that only the removed ones used."""
        used = max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        if not self.lengths:
            self._layers = []
            return
        kept = torch.tensor(rows, device=self.model.head.device)
        for layer in self._layers:
            if layer.is_initialized:
                layer.select(kept)
                layer.keep_first(layer.used)
                layer.remove_first(used - max(self.lengths))


def stream(decoder: SequenceDecoder, sampler: HFSampler, prompt: Sequence[int], seed: int) -> Iterator[int]:
    """Yields the tokens of an answer as they are drawn, including the token that ends it.

    Args:
        decoder: Computes the logits.
        sampler: The settings and the end tokens. Stop texts are ignored: `serving.text_stream` finds them in the text.
        prompt: Token ids of the prompt.
        seed: The seed of the answer's random numbers, as `HFSampler` takes it.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    logits = decoder.start(prompt)
    for number in range(sampler.max_new_tokens):
        token = choose_one(sampler, logits, random)
        yield token
        if token in sampler.end_tokens or number + 1 == sampler.max_new_tokens:
            return
        logits = decoder.extend(token)


@torch.no_grad()
def choose_one(sampler: HFSampler, logits: Tensor, random: np.random.Generator) -> int:
    """Draws one token from (1, V) logits with the next random number of an answer."""
    draw = torch.tensor([random.random()], dtype=torch.float64, device=logits.device)
    return int(sampler.choose(logits, draw))
