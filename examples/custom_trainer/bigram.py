"""A custom model factory (`model: {factory: bigram:build}`), which may return any torch module."""

from __future__ import annotations

from torch import Tensor, nn


class Bigram(nn.Module):
    """Predicts the next token from the current token only: (B, S) token ids -> (B, S, V) logits."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def build(vocab_size: int = 260, width: int = 32) -> nn.Module:
    return Bigram(vocab_size, width)
