"""The win rate of a model against another: a reward model judges their answers to the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from myllm_ray.config.errors import ConfigError
from myllm_ray.data.examples import LengthLimits, prompt_row, split, tokenize_example
from myllm_ray.data.formats import BadRow, Labelled, Text
from myllm_ray.data.messages import Messages
from myllm_ray.data.store import TokenStore
from myllm_ray.evaluate.answers import Answer
from myllm_ray.models.heads import RewardModel


class WinRate(NamedTuple):
    """Outcomes of the comparison of two models, one per prompt."""

    outcomes: list[float]
    """1 if the first model's answer has the higher reward, 0 if the other's has, 0.5 if the rewards are equal."""
    rewards: list[tuple[float, float]]
    """The rewards of both answers."""

    @property
    def rate(self) -> float:
        """The share of wins; a tie is half a win."""
        return sum(self.outcomes) / len(self.outcomes)

    @property
    def counts(self) -> dict[str, int]:
        """The number of wins, ties and losses."""
        return {name: self.outcomes.count(value) for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}


class Judge:
    """A reward model that scores answers. It reads prompts and answers with its own tokenizer and chat template.

    Args:
        model: the reward model, on the device and in evaluation mode.
        tokenizer: the tokenizer of the reward model.
        device: the device of the model.
        autocast: returns the context of the forward passes.
        batch_size: answers per forward pass.

    Raises:
        ConfigError: the model is not a reward model.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        batch_size: int,
    ):
        if not isinstance(model, RewardModel):
            raise ConfigError(f"--win-rate needs a reward model; this one is a {type(model).__name__}")
        self.model, self.tokenizer, self.device = model, tokenizer, device
        self.autocast, self.batch_size = autocast, batch_size
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.limits = LengthLimits(int(most or 2**20))

    def rows(self, answers: Sequence[Answer], store: TokenStore) -> list[list[int]]:
        """Returns the token ids of each prompt with its answer, as the reward model was trained on them.

        Raises:
            ConfigError: a prompt is too long for the reward model.
        """
        found = []
        for answer in answers:
            row = prompt_row(store, answer.document)
            prompt: Text = row.prompt if isinstance(row.prompt, str) else Messages(row.prompt, tools=row.tools)
            text: Text = answer.text
            if isinstance(prompt, Messages):
                text = Messages([{"role": "assistant", "content": answer.text}])
            try:
                document, _ = tokenize_example(Labelled(prompt, text, True), self.tokenizer, self.limits)
            except BadRow as error:
                raise ConfigError(
                    f"--win-rate: row {answer.document}: the reward model can't read it: {error}"
                ) from None
            found.append(np.concatenate(split(document)[:2]).tolist())
        return found

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer], store: TokenStore) -> list[float]:
        """Returns the reward of each answer, the score at its last token."""
        rows = self.rows(answers, store)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found = [0.0] * len(rows)
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            width = len(rows[chosen[0]])
            # Causal attention: the padding after an answer does not change the score at its last token.
            ids = torch.zeros(len(chosen), width, dtype=torch.long)
            for i, number in enumerate(chosen):
                ids[i, : len(rows[number])] = torch.tensor(rows[number])
            ends = torch.tensor([i * width + len(rows[number]) - 1 for i, number in enumerate(chosen)])
            positions = torch.arange(width).expand(len(chosen), -1)
            with self.autocast():
                scores = self.model(
                    input_ids=ids.to(self.device), ends=ends.to(self.device), position_ids=positions.to(self.device)
                )
            for number, score in zip(chosen, scores.tolist(), strict=True):
                found[number] = score
        return found


def compare(judge: Judge, own: list[Answer], others: list[Answer], own_store: TokenStore, store: TokenStore) -> WinRate:
    """Returns the win rate of a model's answers against those of another model.

    Args:
        judge: the reward model.
        own: the answers of the first model.
        others: the answers of the other model to the same prompts.
        own_store: the prompts as tokenized for the first model.
        store: the prompts as tokenized for the other model. The rows are numbered equally.
    """
    pairs = list(zip(judge(own, own_store), judge(others, store), strict=True))
    return WinRate([0.5 if a == b else float(a > b) for a, b in pairs], pairs)
