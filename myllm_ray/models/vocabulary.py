"""Additional rows of the token embeddings, for a tokenizer with more tokens than the model that it is used with.

The new rows of the embedding and of the output head are the mean of the existing rows. A model with such rows gives a
new token about the probability of an average token, and the other probabilities hardly change (Hewitt, 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html). The number of rows becomes a multiple of 64, which suits the
matrix units of accelerators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from myllm_ray.common.materialize import Source
from myllm_ray.common.tensor_files import Box, part_of
from myllm_ray.config.errors import ConfigError

MULTIPLE = 64
_BLOCK = 4096
"""Number of rows that are summed at once, which bounds the memory of the fp64 copies."""


def new_rows(rows: int, tokens: int) -> int:
    """Returns the number of embeddings for a tokenizer: `rows` if they suffice, else `tokens` rounded up to 64.

    Args:
        rows: The number of embeddings of the model.
        tokens: The number of tokens of the tokenizer.
    """
    return rows if tokens <= rows else -(-tokens // MULTIPLE) * MULTIPLE


def resized_source(source: Source, skeleton: nn.Module) -> Source:
    """Returns the source of a model whose embeddings have more rows than the tensors of another source.

    Args:
        source: The source of the model before it was resized.
        skeleton: The resized transformers model, possibly on the meta device.
    """
    rows = {name: len(tensor) for name, tensor in _vocabulary_tensors(skeleton).items()}

    def resized(name: str, box: Box | None = None) -> Tensor:
        if name not in rows:
            return source(name, box)
        # The mean of the rows needs all of them.
        return part_of(with_mean_rows(source(name), rows[name]), box)

    return resized


def resize_embeddings(model: Any, tokens: int) -> None:
    """Adds rows to the embeddings and the output head of a transformers model, in place.

    Args:
        model: The model, with its weights.
        tokens: The number of tokens of the tokenizer.
    """
    before = len(model.get_input_embeddings().weight)
    if (rows := new_rows(before, tokens)) == before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for tensor in _vocabulary_tensors(model).values():
            tensor.copy_(with_mean_rows(tensor[:before], rows))


def check_trained(model: Any, before: int) -> None:
    """Checks that added rows of the embeddings are trained, because all new tokens have the same embedding otherwise.

    Args:
        model: The resized transformers model with adapters, possibly on the meta device.
        before: The number of embeddings before the model was resized.

    Raises:
        ConfigError: The embedding has new rows and is frozen.
    """
    embedding = model.get_input_embeddings()
    if len(embedding.weight) > before and not embedding.weight.requires_grad:
        frozen = [m for m in (embedding, model.get_output_embeddings()) if m is not None]
        names = [name.rpartition(".")[2] for name, module in model.named_modules() if module in frozen]
        raise ConfigError(
            f"model.resize_vocabulary: the embeddings of the new tokens would stay frozen: set "
            f"model.lora.modules_to_save: [{', '.join(names)}]"
        )


def with_mean_rows(tensor: Tensor, rows: int) -> Tensor:
    """Returns a tensor of (rows, ...): the given rows, followed by copies of their mean."""
    if rows <= len(tensor):
        return tensor
    # Sums of blocks in fp64, in a fixed order: the mean does not depend on the number of threads.
    total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
    for block in tensor.split(_BLOCK):
        total += block.double().sum(0)
    mean = (total / len(tensor)).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *mean.shape)])


def _vocabulary_tensors(model: Any) -> dict[str, Tensor]:
    """Returns the parameters with one row for each token: of the embedding, and of the output head if there is one."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    owned = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if id(p) in owned}
