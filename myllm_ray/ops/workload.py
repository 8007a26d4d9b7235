"""What a model computes for a micro-batch: runs of tokens, what they attend to, and positions with logits.

It is counted on the host, from the tensors that the collator has built. Padding is not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from myllm_ray.common.types import IGNORE, Micro


class Workload(NamedTuple):
    """Runs of consecutive tokens. Token t of a run attends to `context` earlier tokens, and to tokens 0 to t of its
    run. A document is one run without context; an answer that shares its prompt is a run whose context is the prompt.
    """

    lengths: np.ndarray
    """(n,) int64, tokens of each run."""
    predicted: int
    """Number of positions whose logits or scores are used."""
    contexts: np.ndarray | None = None
    """(n,) int64, tokens before each run that its tokens attend to; None: no run has any."""

    @property
    def tokens(self) -> int:
        """The number of tokens, without padding."""
        return int(self.lengths.sum())


def attended(lengths: np.ndarray, window: int | None = None, chunk: int | None = None) -> int:
    """Returns the number of (token, attended token) pairs of documents of the given lengths (n,).

    Args:
        lengths: tokens of each document.
        window: size of a sliding window, which includes the token itself; None: causal attention.
        chunk: size of the chunks that attention is restricted to; None: the whole document.
    """
    if chunk is not None:
        whole, rest = np.divmod(lengths, chunk)
        return int((whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2).sum())
    if window is None:
        return int(lengths.dot(lengths + 1)) // 2
    inside = np.minimum(lengths, window)
    return int(inside.dot(inside + 1)) // 2 + int((lengths - inside).sum()) * window


def pairs_of(work: Workload, window: int | None = None, chunk: int | None = None) -> int:
    """Returns the number of (token, attended token) pairs of a workload; see `attended`."""
    # The pairs of a run with a context are those of the longer document without those of the context alone.
    if work.contexts is None:
        return attended(work.lengths, window, chunk)
    return attended(work.contexts + work.lengths, window, chunk) - attended(work.contexts, window, chunk)


def document_work(micro: Micro) -> Workload:
    """Returns the workload of rows of packed documents, whose positions restart at 0 at each document.

    Positions with `source_ids` -1 are padding. Without `source_ids`, all positions count.

    Raises:
        KeyError: the micro-batch has no labels, so its rows are not documents.
    """
    labels = _array(micro["labels"])
    predicted = int(np.count_nonzero(labels[:, 1:] != IGNORE))
    if "position_ids" not in micro:
        return Workload(np.full(len(labels), labels.shape[1], np.int64), predicted)
    begins = _array(micro["position_ids"]) == 0
    begins[:, 0] = True
    starts = begins.reshape(-1).nonzero()[0]
    lengths = np.diff(starts, append=begins.size)
    if "source_ids" in micro:
        lengths = lengths[_array(micro["source_ids"]).reshape(-1)[starts] >= 0]
    return Workload(lengths, predicted)


def pair_work(micro: Micro, shared_prompt: bool, answers: int = 2) -> Workload:
    """Returns the workload of prompts with several answers each (`segment_ids`).

    Args:
        micro: the micro-batch.
        shared_prompt: whether a prompt is computed once for its answers, instead of once per answer.
        answers: number of answers per row that are counted.
    """
    segments = _array(micro["segment_ids"])
    prompts = (segments == 0).sum(1)
    sizes = np.stack([(segments == number).sum(1) for number in range(1, answers + 1)], 1)
    predicted = int(sizes.sum())
    if not shared_prompt:
        lengths = (sizes + prompts[:, None] * (sizes > 0)).flatten()
        return Workload(lengths, predicted)
    contexts = np.concatenate([np.zeros_like(prompts), np.repeat(prompts, answers)])
    return Workload(np.concatenate([prompts, sizes.flatten()]), predicted, contexts)


def answer_work(micro: Micro) -> Workload:
    """Returns the workload of training rows of a prompt and a sampled answer (`ops/rollouts.py`)."""
    answers = _array(micro["lengths"]).reshape(-1)
    lengths = _array(micro["prompt_lengths"]).reshape(-1) + answers
    return Workload(lengths, int(answers.sum()))


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
