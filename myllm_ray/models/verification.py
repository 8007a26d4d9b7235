"""Verification of exported models: what was written is read again and compared with the model in memory.

The comparison by logits loads the whole exported model, so two models are in memory at once. The comparison by tensors
reads one tensor at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.config.errors import UserError
from myllm_ray.models.trial_forward import one_line
from myllm_ray.models.weights_folder import weight_files

_ROWS, _TOKENS = 2, 16
TOLERANCE = 1e-5
"""Largest difference of two logits, relative to the largest logit, that is due to rounding in fp32."""
MERGE_TOLERANCE = 1e-4
"""The same for merged adapters: the sums of the adapted layers have another order."""


def probe(inner: Any) -> Tensor:
    """Returns the fixed token ids of the comparison by logits, (2, up to 16), as a function of the model's config."""
    config = inner.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or _TOKENS
    random = torch.Generator().manual_seed(0)
    rows = inner.get_input_embeddings().weight.shape[0]
    return torch.randint(0, int(rows), (_ROWS, min(_TOKENS, int(limit))), generator=random)


@torch.no_grad()
def logits_of(inner: Any, ids: Tensor) -> Tensor:
    """Returns the logits of a transformers model without dropout, in fp32.

    Args:
        inner: A causal LM, or a sequence classifier with the head `score`.
        ids: (B, S) token ids.

    Returns:
        (B, S, V) logits, or for a sequence classifier the (B, S, labels) scores of all positions.
    """
    training = inner.training
    inner.eval()
    try:
        if inner.get_output_embeddings() is None and hasattr(inner, "score"):
            hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return inner.score(hidden).float()  # type: ignore[no-any-return]
        return inner(input_ids=ids, use_cache=False).logits.float()  # type: ignore[no-any-return]
    finally:
        inner.train(training)


def compare_logits(expected: Tensor, found: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Compares two tensors of logits of the same shape. Two NaNs are equal.

    Args:
        expected: The logits of the run's model.
        found: The logits of the exported model.
        what: What computed `found`, for the error message.
        tolerance: The largest difference, relative to the largest finite expected logit.

    Raises:
        UserError: The shapes differ, or a difference exceeds the tolerance.
    """
    if expected.shape != found.shape:
        raise UserError(
            f"{what} computes logits of shape {tuple(found.shape)}, the run's model {tuple(expected.shape)}; "
            "nothing is kept"
        )
    same = (expected == found) | (expected.isnan() & found.isnan())
    apart = torch.where(same, torch.zeros_like(expected), (expected - found).abs())
    largest = float(torch.nan_to_num(apart, nan=torch.inf, posinf=torch.inf).max())
    scale = float(expected[torch.isfinite(expected)].abs().max()) if torch.isfinite(expected).any() else 1.0
    if largest > tolerance * scale:
        raise UserError(
            f"{what} computes other logits than the run's model: the largest difference is {largest:.2e}, the "
            f"tolerance {tolerance * scale:.2e}; nothing is kept"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the warnings, reports and progress bars of loading inside the block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), without_progress_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def load_folder(folder: Path | str, like: Any, trust_remote_code: bool = False, **settings: Any) -> Any:
    """Loads a transformers model from a folder, in fp32 unless `dtype` is given.

    Args:
        folder: The folder in Hugging Face format.
        like: A model of the same kind (causal LM or sequence classifier) with the attention to use.
        trust_remote_code: Whether to run Python code of the folder.
        settings: Other arguments of `from_pretrained`.
    """
    head = like.get_output_embeddings() is None and hasattr(like, "score")
    auto: Any = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    with quiet():
        return auto.from_pretrained(
            folder,
            attn_implementation=like.config._attn_implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **{"dtype": torch.float32, **settings},
        )


def verify_logits(inner: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Loads a folder in Hugging Face format and compares its logits with those of the model that was written.

    Both compute in fp32, so that only the written values matter. The model in memory is converted to fp32.

    Raises:
        UserError: The folder can't be loaded, or the logits differ.
    """
    ids = probe(inner)
    expected = logits_of(inner.float(), ids)
    try:
        again = load_folder(folder, inner, trust_remote_code)
    except Exception as error:  # the code of an architecture may raise any exception
        raise UserError(f"the exported folder can't be loaded: {one_line(error)}; nothing is kept") from None
    compare_logits(expected, logits_of(again, ids), "the exported folder")


def has_own_names(inner: Any, folder: Path) -> bool:
    """Returns whether the folder has each parameter of the model under its own name.

    transformers stores some architectures under other names: the stacked experts of a mixture as one tensor per expert.
    """
    return {name for name, _ in inner.named_parameters()} <= weight_files(folder).keys()


def verify_tensors(inner: Any, folder: Path) -> None:
    """Compares each parameter with the tensor of the folder that has its name, bit for bit, one at a time.

    Raises:
        UserError: A tensor is missing or differs.
    """
    stored = weight_files(folder)
    for name, parameter in inner.named_parameters():
        if name not in stored:
            raise UserError(
                f"the exported folder has no tensor {name}: transformers stores this architecture under other names; "
                "use --verify logits"
            )
        with safe_open(folder / stored[name], "pt") as file:
            found = file.get_tensor(name)
        if found.dtype != parameter.dtype or not same_bits(found, parameter.data):
            raise UserError(f"the exported folder has other values of {name} than the run's model; nothing is kept")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same shape and values; two NaNs are equal."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
