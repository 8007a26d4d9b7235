"""Tests on a small model of the same architecture whether documents that share a row are independent of each other.

transformers separates packed documents by restarting `position_ids`, but only in attention layers whose mask it builds
itself. Linear attention, state-space layers, convolutions over tokens and ALiBi use tokens across the boundary. There
is no reliable list of affected architectures, so this probe tests the given config. It computes rows as the trainers do
and each document in a row of its own, and compares the log-probabilities, the gradients of all parameters, and the
effect of a change in another document of the row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from myllm_ray.common.files import write_json
from myllm_ray.common.materialize import materialize
from myllm_ray.common.modules import logits_of
from myllm_ray.common.types import Isolation, Micro, Samples, TokenScores
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.resolve import load_object
from myllm_ray.config.sections import ModelSection
from myllm_ray.models.architecture import config_of
from myllm_ray.models.attention import takes_documents
from myllm_ray.models.load import build_deferred
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.ops.documents import Documents, document_lengths
from myllm_ray.ops.log_probs import log_probs_from_logits
from myllm_ray.ops.rollouts import packed_answers, training_rows
from myllm_ray.ops.segments import restarting_positions

log = logging.getLogger(__name__)

PROBE_VERSION = 2
"""Part of the cache key of the results; increment it when the probe changes."""
LAYOUTS = ("documents", "rollouts", "padded")
"""documents: several per row; rollouts: several prompts with their answers per row; padded: one document per row."""
LONG = 2**31
"""A row length greater than any attention window."""
FACTORY_PARAMETERS = 20_000_000
"""Largest number of parameters of a factory's model that is tested. Such a model cannot be reduced."""
DECLARATION = "isolates_packed_documents"
"""Attribute by which a factory or its module declares whether restarting `position_ids` separate documents."""

_SAME = 1e-3
"""Tolerance for fp32 sums in a different order: in nats, and relative to the largest gradient."""
_MOVED = 1e-2
"""Smallest effect, in nats, of a document's first token on its later tokens for the test to be meaningful."""
_STD = 0.15
"""Standard deviation of the small model's weights. Nearly uniform distributions would hide a leak."""
_VOCABULARY, _WIDTH, _WINDOW = 32, 48, 8
_ROWS = ((11, 19, 10), (22, 26))
"""Lengths of the documents in each row: the first row ends with padding, the second is full.

A row of continuous packing starts inside a document, but its positions also start at 0, so the second row covers it.
"""
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "attention_chunk_size",
    "chunk_size",
    "mamba_chunk_size",
    "block_size",
    "index_block_size",
    "keep_window_size",
    "index_topk",
)
"""Config keys that limit how far a layer attends. The small model uses windows shorter than the documents."""


class _NoTokenizer:
    """The part of the tokenizer interface that is needed to build a model."""

    eos_token_id = bos_token_id = 0

    def __len__(self) -> int:
        return _VOCABULARY


class _Laid(NamedTuple):
    """Documents as the input of one forward pass, with the index, the id and the document of each target."""

    inputs: Micro
    predictors: Tensor
    targets: Tensor
    document: Tensor


def find_isolation(section: ModelSection, kind: str, layout: str, sequence_length: int, cache: Path) -> Isolation:
    """Returns the result of `probe_isolation`, cached in a file of the data cache.

    A run, its restarts and the trials of a sweep run the probe once. The cache key consists of the small config and the
    versions of torch, transformers and the probe. The code of a factory can change under the same name, so its model is
    tested every time.

    Args:
        section: The section `model` of the config.
        kind: See `build_deferred`.
        layout: One of `LAYOUTS`.
        sequence_length: The length of the training rows, in tokens.
        cache: The folder of the data cache.

    Raises:
        ConfigError: The section names a model that cannot be found.
    """
    if section.factory:
        return probe_isolation(section, kind, layout, sequence_length)
    try:
        small = _small_section(section, sequence_length).model_dump(mode="json")
    except ConfigError:
        raise
    except Exception as error:  # an invalid config; building the model reports the error
        return _untried(error)
    described = [PROBE_VERSION, torch.__version__, transformers.__version__, kind, layout, small]
    path = cache / f"isolation-{hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]}.json"
    try:
        return Isolation(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        found = probe_isolation(section, kind, layout, sequence_length)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    except OSError as error:
        log.debug("%s cannot be written: %s", path, error)
    return found


def probe_isolation(
    section: ModelSection, kind: str = "causal_lm", layout: str = "documents", sequence_length: int = LONG
) -> Isolation:
    """Tests a row layout on a small model of the same architecture.

    The result depends only on the arguments and the code.

    Args:
        section: The section `model` of the config.
        kind: See `build_deferred`.
        layout: One of `LAYOUTS`.
        sequence_length: The length of the training rows, in tokens. Windows of at least this length are not reduced,
            because they have no effect in training.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about the small model's config
        torch.manual_seed(0)
        try:
            model = _small(section, kind, sequence_length)
            if isinstance(model, Isolation):
                return model
            found = _compare(model, layout, has_critic=kind.startswith("actor"))
            return _with_boundaries(found, model, layout, has_critic=kind.startswith("actor"))
        except Exception as error:  # an architecture may raise anything; without a result, documents count as dependent
            return _untried(error)


def _untried(error: Exception) -> Isolation:
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return Isolation(None, f"it could not be tried on a small model ({' '.join(text.split())[:300]})")


def _small(section: ModelSection, kind: str, sequence_length: int) -> nn.Module | Isolation:
    if section.factory:
        return _of_factory(section, kind)
    model = materialize(
        build_deferred(_small_section(section, sequence_length), _NoTokenizer(), _WIDTH, 0, kind)
    ).eval()
    # The default initialization gives nearly uniform predictions, in which a leak would be too small to measure.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _STD)
    return model


def _small_section(section: ModelSection, sequence_length: int) -> ModelSection:
    """Returns a small section with windows shorter than the documents, without dropout, adapters and a router loss."""
    small = small_model(section)
    whole = config_of(section).to_dict()
    known = {name: whole[name] for name in _WINDOWS if type(whole.get(name)) is int}
    windows = {name: min(value, _WINDOW) if value < sequence_length else value for name, value in known.items()}
    return without_dropout(
        small.model_copy(
            update={"config": {**(small.config or {}), **windows}, "lora": None, "router_loss_weight": None}
        )
    )[0]


def _of_factory(section: ModelSection, kind: str) -> nn.Module | Isolation:
    factory = load_object(section.factory or "", "model.factory")
    if getattr(factory, DECLARATION, None) is not None:
        said = bool(getattr(factory, DECLARATION))
        return Isolation(said, f"its factory declares {DECLARATION} = {said}")
    with torch.device("meta"):
        skeleton = factory(**section.options)
    if getattr(skeleton, DECLARATION, None) is not None:
        said = bool(getattr(skeleton, DECLARATION))
        return Isolation(said, f"the model declares {DECLARATION} = {said}")
    size = sum(p.numel() for p in skeleton.parameters())
    if size > FACTORY_PARAMETERS:
        return Isolation(
            None,
            f"a factory's model of {size:,} parameters is too large to be tested: set {DECLARATION} = True on it if "
            "restarting position_ids separate its documents",
        )
    return build_deferred(section, _NoTokenizer(), _WIDTH, 0, kind).eval()


def _with_boundaries(found: Isolation, model: nn.Module, layout: str, has_critic: bool) -> Isolation:
    """Returns the result with whether attention within documents gives the same outputs as documents alone."""
    if not found.isolated or not takes_documents(model):
        return found
    try:
        within = _compare(model, layout, has_critic, boundaries=True)
    except Exception as error:  # an architecture may raise anything
        return replace(found, boundaries_reason=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    if within.isolated:
        return replace(found, boundaries=True, boundaries_reason="", leak=max(found.leak, within.leak))
    return replace(found, boundaries_reason=f"with attention within documents, {within.reason}")


def _compare(model: nn.Module, layout: str, has_critic: bool, boundaries: bool = False) -> Isolation:
    documents = [torch.randint(1, _VOCABULARY, (length,)) for row in _ROWS for length in row]
    first = [len(d) // 2 if layout == "rollouts" else 1 for d in documents]
    weights = torch.rand(sum(len(d) - f for d, f in zip(documents, first, strict=True))) + 0.5

    def scores(lay: Any, given: Sequence[Tensor]) -> Tensor:
        """Returns the log-probabilities and the critic's values, (targets, 1 or 2), ordered by document."""
        found = []
        for laid in lay(given, first):
            scored = _score(model, laid, boundaries and lay is not _lay_alone)
            columns = [scored.log_probs] + ([scored.values] if has_critic and scored.values is not None else [])
            found.append((torch.stack(columns, 1), laid.document))
        order = torch.cat([document for _, document in found]).argsort(stable=True)
        return torch.cat([s for s, _ in found])[order]

    # Random weights: with equal ones, opposite changes in the gradients of two tokens would cancel.
    def gradients(of: Tensor) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        given = torch.autograd.grad((of * weights[:, None]).sum(), parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, given, strict=True)]

    lay = {"documents": _lay_packed, "rollouts": _lay_rollouts, "padded": _lay_padded}[layout]
    alone, together = scores(_lay_alone, documents), scores(lay, documents)
    leak = _largest(alone - together)
    expected, found = gradients(alone), gradients(together)
    with torch.no_grad():
        scale = max(_largest(g) for g in expected)
        off = max(_largest(a - b) for a, b in zip(expected, found, strict=True)) / max(scale, 1e-12)
        owner = torch.cat([torch.full((len(d) - f,), n) for n, (d, f) in enumerate(zip(documents, first, strict=True))])
        # Change the first document of each row, then the last one: a leak can go in either direction.
        for changed in ({0, len(_ROWS[0])}, {len(_ROWS[0]) - 1, len(documents) - 1}):
            other = [(d + 7) % (_VOCABULARY - 1) + 1 if n in changed else d for n, d in enumerate(documents)]
            kept = torch.tensor([int(n) not in changed for n in owner])
            leak = max(leak, _largest((scores(lay, other) - together)[kept]))
        ahead, reaction = _own_influence(scores, documents, first, owner)
    if not ahead <= _SAME:
        return Isolation(
            False, "a token is predicted from tokens after it: the model is not causal", ahead, causal=False
        )
    if leak != leak or off != off:  # NaN
        return Isolation(None, "the small model returns NaN")
    if leak > _SAME or off > _SAME:
        size = (
            f"{leak:.2g} nats in a small model of this type"
            if leak > _SAME
            else f"{off:.2g} of the gradient in a small model of this type"
        )
        if layout == "padded":
            return Isolation(False, f"the padding of a row changes the outputs for its document ({size})", leak)
        return Isolation(False, f"documents in one row see each other ({size}){_missing_kernels(model)}", leak)
    if 0 < reaction < _MOVED:
        return Isolation(None, f"the outputs of the small model hardly depend on its input ({reaction:.2g} nats)")
    return Isolation(True, "documents in one row do not see each other", leak)


def _own_influence(scores: Any, documents: list[Tensor], first: list[int], owner: Tensor) -> tuple[float, float]:
    """Returns the effects, in nats, of a document's last and first token on the predictions of its other tokens.

    In a causal model the last token has no effect on the predictions of the tokens before it.
    """
    alone = scores(_lay_alone, documents)
    last = torch.cat([owner[1:] != owner[:-1], torch.tensor([True])])
    ends = [torch.cat([d[:-1], (d[-1:] + 7) % (_VOCABULARY - 1) + 1]) for d in documents]
    begins = [torch.cat([(d[:1] + 7) % (_VOCABULARY - 1) + 1, d[1:]]) for d in documents]
    ahead = _largest((scores(_lay_alone, ends) - alone)[~last])
    later = torch.cat([torch.arange(f, len(d)) > 1 for d, f in zip(documents, first, strict=True)])
    return ahead, _largest((scores(_lay_alone, begins) - alone)[later])


def _missing_kernels(model: nn.Module) -> str:
    """Returns a note about missing CUDA kernels that would separate documents by `seq_idx` or `cu_seq_lens_q`, or "".

    transformers names the packages of these kernels in the error that it raises without them.
    """
    base: Any = getattr(getattr(model, "model", None), "base_model", None)
    ids = torch.ones(1, 8, dtype=torch.long)
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    forms = (
        {"seq_idx": torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32)},
        {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4},
    )
    missing = []
    for form in forms if base is not None else ():
        try:
            base(input_ids=ids, use_cache=False, **form)
        except Exception as error:
            missing += re.findall(r"can't keep packed sequences apart without `([^`]+)`", str(error))
    names = " and ".join(dict.fromkeys(missing))
    return (
        f"; sequence boundaries keep them apart only in the CUDA kernels of {names}, which are not supported"
        if names
        else ""
    )


def _largest(values: Tensor) -> float:
    """Returns the largest absolute value, 0 for an empty tensor, or NaN if a value is NaN."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _score(model: nn.Module, laid: _Laid, boundaries: bool) -> TokenScores:
    if getattr(model, "computes_token_losses", False):
        inputs: dict[str, Any] = {name: laid.inputs[name] for name in ("input_ids", "position_ids")}
        if boundaries:
            inputs["documents"] = Documents(document_lengths(laid.inputs["position_ids"]), "per_document")
        scores: TokenScores = model(predictors=laid.predictors, targets=laid.targets, **inputs)
        return scores
    return log_probs_from_logits(logits_of(model, laid.inputs).flatten(0, 1)[laid.predictors], laid.targets)


def _lay(rows: Sequence[Sequence[int]], documents: Sequence[Tensor], first: Sequence[int], width: int) -> _Laid:
    """Arranges documents in rows as the collator of texts does (data/collate.py).

    Args:
        rows: The indices of the documents in each row.
        documents: The token ids of each document.
        first: The index of the first target in each document.
        width: The length of a row.
    """
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.stack(
        [torch.from_numpy(restarting_positions([len(documents[n]) for n in row], width)).long() for row in rows]
    )
    predictors, targets, owner = [], [], []
    for i, row in enumerate(rows):
        at = 0
        for n in row:
            document = documents[n]
            ids[i, at : at + len(document)] = document
            predictors.append(torch.arange(first[n] - 1, len(document) - 1) + i * width + at)
            targets.append(document[first[n] :])
            owner.append(torch.full((len(document) - first[n],), n))
            at += len(document)
    return _Laid(
        {"input_ids": ids, "position_ids": positions}, torch.cat(predictors), torch.cat(targets), torch.cat(owner)
    )


def _lay_packed(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    numbers = iter(range(len(documents)))
    return [_lay([[next(numbers) for _ in row] for row in _ROWS], documents, first, _WIDTH)]


def _lay_padded(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    return [_lay([[n] for n in range(len(documents))], documents, first, _WIDTH)]


def _lay_alone(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    return [
        laid._replace(document=torch.full_like(laid.document, n))
        for n, d in enumerate(documents)
        for laid in [_lay([[0]], [d], [first[n]], len(d))]
    ]


def _lay_rollouts(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    """Arranges prompts and answers in the rows in which PPO and GRPO score them."""
    prompts = nn.utils.rnn.pad_sequence([d[:f] for d, f in zip(documents, first, strict=True)], batch_first=True)
    answers = nn.utils.rnn.pad_sequence([d[f:] for d, f in zip(documents, first, strict=True)], batch_first=True)
    lengths = torch.tensor([len(d) - f for d, f in zip(documents, first, strict=True)])
    mask = torch.arange(prompts.shape[1]) < torch.tensor(list(first))[:, None]
    inputs, scored = packed_answers(training_rows(prompts, mask, Samples(answers, lengths, lengths > 0)))
    return [_Laid(inputs, scored.predictors, scored.targets, scored.rows)]
