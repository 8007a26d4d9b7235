"""Checks that a config trains the tokens at which sampling stops.

A model that was not trained on any of them does not end its answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.examples import PROMPTS
from myllm_ray.data.inspect import ended_documents
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.dependencies import model_section, stop_tokens
from myllm_ray.preparation import absolute, prepare_data


@dataclass(frozen=True)
class EndTokensCheck:
    """The result of the check.

    Sampling stops at `tokens`. Of the first `documents` documents, `ended` train on at least one of them.
    """

    tokens: tuple[str, ...]
    ended: int
    documents: int

    @property
    def wrong(self) -> bool:
        """Whether documents were checked and none trains on an end token."""
        return self.documents > 0 and not self.ended

    def __str__(self) -> str:
        names = " or ".join(self.tokens)
        if not self.documents:
            return f"sampling stops at {names}; the data contains no answers"
        return f"sampling stops at {names}; {self.ended} of {self.documents} documents train on it"


def check_end_tokens(config: TrainerConfig) -> EndTokensCheck:
    """Counts the prepared documents that train on a token at which sampling stops.

    Data that consists of prompts contains no answers, so no document is counted.
    """
    config = absolute(config)
    prepared = prepare_data(config)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    ids = stop_tokens(model_section(config), tokenizer)
    store = prepared.train.plan.store
    ended = [] if store.kind == PROMPTS else list(ended_documents(store, ids))
    return EndTokensCheck(tuple(tokenizer.convert_ids_to_tokens(list(ids))), sum(ended), len(ended))
