"""Whether a config trains the tokens at which sampling stops: a model that never saw one does not end its answers."""

from __future__ import annotations

from dataclasses import dataclass

from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.inspect import ended_documents
from myllm_ray.data.records import PROMPTS
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.roles import model_section, stop_tokens
from myllm_ray.worker import absolute, prepare_data


@dataclass(frozen=True)
class EndTokensCheck:
    """`tokens`: those at which sampling stops. `ended` of the first `documents` documents train on one of them."""

    tokens: tuple[str, ...]
    ended: int
    documents: int

    @property
    def wrong(self) -> bool:
        return self.documents > 0 and not self.ended

    def __str__(self) -> str:
        names = " or ".join(self.tokens)
        if not self.documents:
            return f"sampling stops at {names}; the data holds no answers"
        return f"sampling stops at {names}; {self.ended} of {self.documents} documents train on it"


def check_end_tokens(config: TrainerConfig) -> EndTokensCheck:
    """Compare what the sampler stops at with what the prepared documents train on. Prompts hold no answers: none is looked at."""
    config = absolute(config)
    prepared = prepare_data(config)
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    ids = stop_tokens(model_section(config), tokenizer)
    store = prepared.train.plan.store
    ended = [] if store.kind == PROMPTS else list(ended_documents(store, ids))
    return EndTokensCheck(tuple(tokenizer.convert_ids_to_tokens(list(ids))), sum(ended), len(ended))
