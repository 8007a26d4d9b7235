"""Sampled answers to prompts, and their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from myllm_ray.common.seeds import derive_seed
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.trainers import RolloutSection
from myllm_ray.data.collate import to_tensors
from myllm_ray.data.collate_examples import build_prompts
from myllm_ray.data.packing import Row
from myllm_ray.data.store import TokenStore
from myllm_ray.dependencies import reward_fields
from myllm_ray.models.causal_lm import CausalLM
from myllm_ray.models.generate import HFSampler
from myllm_ray.trainers.rewards import FunctionReward, RewardFailure, gather_columns

EXACT_MATCH = "exact_match"
ANSWER = "answer"
"""The field of a prompt's data row with the expected answer, or a list of accepted ones, for `exact_match`."""
Z = 1.959964
"""Half of the width of a 95 % interval of the standard normal distribution."""


@dataclass(frozen=True)
class Answer:
    """A sampled answer.

    Attributes:
        document: number of the prompt in its store.
        text: the text without special tokens.
        prompt_ids: token ids of the prompt.
        ids: token ids of the answer, including the token that ended it.
        ended: whether it ended by itself, not at the largest length.
    """

    document: int
    text: str
    prompt_ids: list[int]
    ids: list[int]
    ended: bool


def sampling(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> RolloutSection:
    """Returns the settings of the sampler. Temperature 0 selects the most likely token at every step."""
    return RolloutSection(
        max_new_tokens=max_new_tokens,
        temperature=temperature or 1.0,
        top_p=top_p if temperature else 1.0,
        top_k=None if temperature else 1,
    )


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    sampler: HFSampler,
    store: TokenStore,
    batches: Iterable[list[Row]],
    pad_id: int,
    seed: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> list[Answer]:
    """Samples one answer to each prompt.

    The random numbers of an answer depend on the seed and on the number of its prompt in the data.

    Args:
        model: a `CausalLM`, possibly wrapped, on the device.
        sampler: samples and decodes the answers.
        store: a store of prompts.
        batches: rows of one prompt each.
        pad_id: the token id of the padding.
        seed: the seed of the answers.
        device: the device of the model.
        autocast: returns the context of the forward passes.

    Raises:
        ConfigError: the model is not a causal language model of transformers.
    """
    inner = getattr(model, "module", model)
    if not isinstance(inner, CausalLM):
        raise ConfigError(
            f"answers can be sampled from a causal language model of transformers only, not from a "
            f"{type(inner).__name__}"
        )
    found = []
    for rows in batches:
        micro = to_tensors(build_prompts(store, rows, pad_id))
        mask, documents = micro["segment_ids"] >= 0, micro["documents"][:, 0].tolist()
        seeds = [derive_seed("evaluation", seed, document) for document in documents]
        with autocast():
            samples = sampler(model, micro["input_ids"].to(device), mask.to(device), 1, seeds)
        tokens, lengths, ended = (t.tolist() for t in samples)
        for i, document in enumerate(documents):
            ids = tokens[i][: lengths[i]]
            prompt = micro["input_ids"][i][mask[i]].tolist()
            found.append(Answer(document, sampler.decode(ids), prompt, ids, ended[i]))
    return sorted(found, key=lambda answer: answer.document)


def exact_match(completions: Sequence[str], answer: Sequence[Any]) -> list[float]:
    """Returns 1 for each completion that equals the expected answer, else 0. Space at both ends is ignored.

    Args:
        completions: the answers of the model.
        answer: the expected answer to each prompt, or a list of accepted ones.
    """
    accepted = [a if isinstance(a, list) else [a] for a in answer]
    return [
        float(completion.strip() in {str(a).strip() for a in given})
        for completion, given in zip(completions, accepted, strict=True)
    ]


class Scorer:
    """A metric of answers: `exact_match`, or a function of the user with the signature of reward functions.

    Args:
        name: `exact_match`, or the import path of the function.
        key: the option or config key that names it, for error messages.

    Raises:
        ConfigError: there is no such function.
    """

    def __init__(self, name: str, key: str = "--metric"):
        if name != EXACT_MATCH and ":" not in name:
            raise ConfigError(f"{key}: unknown metric {name!r}: give {EXACT_MATCH}, or my_pkg.my_mod:fn")
        self.key, self.path = key, name
        self._reward = FunctionReward(
            FunctionReward.Config(function=name, timeout=None), exact_match if name == EXACT_MATCH else None
        )
        self.name = name if name == EXACT_MATCH else self._reward.name

    def check(self, store: TokenStore) -> None:
        """Checks that every data row has the field that the metric needs, before answers are sampled.

        Raises:
            DataError: the field is missing.
        """
        for document in range(len(store) if self.path == EXACT_MATCH else 0):
            fields = reward_fields(store, document)
            if fields.get(ANSWER) is None:
                names = ", ".join(sorted(n for n in fields if n not in ("prompts", "prompt_texts", "tools")))
                raise DataError(
                    f"{self.key}: {EXACT_MATCH} needs the field {ANSWER!r} in each row; row {document} has, in "
                    f"addition to its prompt, {names or 'no field'} (fields renames columns: {ANSWER}=COLUMN)"
                )

    def __call__(self, answers: Sequence[Answer], store: TokenStore) -> list[float]:
        """Returns one finite number per answer.

        Raises:
            ConfigError: the function raises, or returns something else.
        """
        if not answers:
            return []
        columns = gather_columns(partial(reward_fields, store), [a.document for a in answers])
        prompts = columns.pop("prompts")
        columns.update(prompt_ids=[a.prompt_ids for a in answers], completion_ids=[a.ids for a in answers])
        try:
            values = self._reward.within_time(prompts, [a.text for a in answers], columns)
            return self._reward.checked(values, len(answers))
        except RewardFailure as error:
            raise ConfigError(f"{self.key}: {self.path} {error}") from error.__cause__


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns a 95 % confidence interval of the mean of independent values.

    For values between 0 and 1 it is the score interval of Wilson, 1927, "Probable inference, the law of succession, and
    statistical inference", which is also valid for few values and for means of 0 and 1. The variance of values between
    the two ends is smaller, so the interval is then wider than needed. For other values it is the mean ± 1.96 standard
    errors.

    Args:
        values: at least one value.
    """
    count, mean = len(values), math.fsum(values) / len(values)
    if all(0 <= value <= 1 for value in values):
        scale = 1 + Z**2 / count
        middle = (mean + Z**2 / (2 * count)) / scale
        half = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2)) / scale
        return max(0.0, middle - half), min(1.0, middle + half)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, count - 1)
    return mean - Z * math.sqrt(variance / count), mean + Z * math.sqrt(variance / count)
