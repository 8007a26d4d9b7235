"""Tests whether a model can compute a prompt and two answers to it in one row."""

from __future__ import annotations

import torch

from myllm_ray.common.materialize import materialize
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import config_of
from myllm_ray.models.load import build_deferred
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.ops.pairs import answers, one_answer_per_row, shared_prompt_mask

_SAME = 1e-4


class _NoTokenizer:
    """The part of the tokenizer interface that is needed to build a model."""

    eos_token_id = bos_token_id = None

    def __len__(self) -> int:
        return 64


def shares_prompts(section: ModelSection, sequence_length: int) -> bool:
    """Returns whether a prompt and two answers in one row give the same log-probabilities as two separate rows.

    It is tested on a small model of the same architecture. The result is False for a model from a factory, which cannot
    be reduced, and for a sliding window that is shorter than the row.

    Args:
        section: The section `model` of the config.
        sequence_length: The largest number of tokens in a prompt with one answer.
    """
    if section.factory:
        return False
    window = getattr(config_of(section).get_text_config(), "sliding_window", None)
    if window is not None and window < 2 * sequence_length:
        return False
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small, _ = without_dropout(small_model(section).model_copy(update={"lora": None}))
        model = materialize(build_deferred(small, _NoTokenizer(), 32, 0)).eval()
        segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 6 + [-1], [0] * 3 + [1] * 7 + [2] * 2 + [-1] * 4])
        ids = torch.randint(1, 64, segments.shape)
        first = (segments == 0).sum(1, keepdim=True)
        second = first + (segments == 1).sum(1, keepdim=True)
        places = torch.arange(segments.shape[1])
        # The second answer continues the prompt, so its positions start where those of the first answer start.
        positions = torch.where(segments == 2, places - second + first, places)
        micro = {"input_ids": ids, "segment_ids": segments, "position_ids": positions}
        found = []
        for inputs, per_row in (
            ({**micro, "attention_mask": shared_prompt_mask(segments)}, 2),
            (one_answer_per_row(micro), 1),
        ):
            flat = answers(inputs["input_ids"], inputs["segment_ids"], per_row)
            inputs = {name: value for name, value in inputs.items() if name != "segment_ids"}
            try:
                scores = model(predictors=flat.predictors, targets=flat.targets, **inputs)
            # An architecture that does not accept a 4D mask fails in one of these ways.
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
                return False
            order = flat.answer.argsort(stable=True)
            found.append(scores.log_probs[order])
        return bool((found[0] - found[1]).abs().max() < _SAME)
