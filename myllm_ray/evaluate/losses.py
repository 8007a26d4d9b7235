"""The loss of a model on documents, and what follows from it.

The scored tokens are the targets of training on the same rows: the labelled tokens that have a preceding token in their
segment. With the number T of scored tokens and their total negative log-likelihood N in nats:

    loss = N / T        perplexity = exp(loss)        bits per byte = N / (ln 2 · B)

B is the number of UTF-8 bytes of the text of the scored tokens. Special tokens, such as the end-of-text token, count in
N and T and have 0 bytes. The first token of a row is not scored, so its bytes are not in B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from myllm_ray.common.types import IGNORE, shifted_targets
from myllm_ray.data.collate import build_micro, to_tensors
from myllm_ray.data.packing import Row
from myllm_ray.data.store import TokenStore
from myllm_ray.trainers.causal_lm import token_losses


@torch.no_grad()
def loss_sums(
    model: nn.Module,
    store: TokenStore,
    batches: Iterable[list[Row]],
    pad_id: int,
    sizes: Tensor,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Tensor:
    """Returns (4,) float64 sums over the scored tokens: negative log-likelihood, number, correct ones, bytes.

    Args:
        model: the model, on the device and in evaluation mode.
        store: the documents.
        batches: rows of segments of the documents. An empty row is all padding and adds nothing.
        pad_id: the token id of the padding.
        sizes: (V,) number of UTF-8 bytes of each token, on the CPU.
        device: the device of the model.
        autocast: returns the context of the forward passes.
    """
    found = torch.zeros(2, dtype=torch.float64, device=device)
    tokens, size = 0, 0
    for rows in batches:
        micro = to_tensors(build_micro(store, rows, pad_id))
        # Counted on the host, where the micro-batch is built.
        targets = shifted_targets(micro["labels"])
        targets = targets[targets != IGNORE]
        tokens, size = tokens + len(targets), size + int(sizes[targets].sum())
        with autocast():
            losses = token_losses(model, {name: tensor.to(device) for name, tensor in micro.items()})
        found += torch.stack([losses.nll.double().sum(), losses.correct.double().sum()])
    nll, correct = found.tolist()
    return torch.tensor([nll, float(tokens), correct, float(size)], dtype=torch.float64)


def loss_metrics(sums: Tensor) -> dict[str, float]:
    """Returns loss, perplexity, token_accuracy and, if the scored tokens have bytes, bits_per_byte.

    Args:
        sums: the result of `loss_sums`, possibly summed over ranks, with at least one token.
    """
    nll, tokens, correct, size = sums.tolist()
    loss = nll / tokens
    # math.exp raises an OverflowError above about 709.
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": correct / tokens}
    return {**found, **({"bits_per_byte": nll / math.log(2) / size} if size else {})}
