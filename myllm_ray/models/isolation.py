"""Whether documents that share a row are independent of each other in a model: tried on a small model of the same kind.

transformers keeps packed documents apart by `position_ids` that restart, but only in attention whose mask it builds itself.
Linear attention, state spaces, convolutions over tokens and ALiBi look across the boundary. No list of architectures says
which is which; this probe does, for the config at hand. It runs rows as the trainers do, and every document by itself, and
compares log-probabilities, gradients of all parameters, and what changes when another document of the row is changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
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
from myllm_ray.config.schema import ModelSection
from myllm_ray.models.load import build_deferred, config_of
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.ops.log_probs import log_probs_from_logits
from myllm_ray.ops.rollouts import packed_answers, training_rows
from myllm_ray.ops.segments import restarting_positions

log = logging.getLogger(__name__)

PROBE_VERSION = 1
"""Part of the key under which verdicts are cached: raise it when the probe changes."""
LAYOUTS = ("documents", "rollouts", "padded")
"""documents: several in a row; rollouts: prompts with their answers, several in a row; padded: one in a row."""
LONG = 2**31
"""A row longer than any window."""
FACTORY_PARAMETERS = 20_000_000
"""Models of a factory, which can't be made small, are tried as they are up to this size."""
DECLARATION = "isolates_packed_documents"
"""Attribute by which a factory, or the module it gives, says that `position_ids` that restart keep documents apart."""

_SAME = 1e-3
"""Nats, and shares of the largest gradient, that sums in another order may change in fp32."""
_MOVED = 1e-2
"""Nats by which a document must at least react to a change of its own beginning: else the small model shows nothing."""
_STD = 0.15
"""Of the weights of the small model: distributions that are nearly flat would hide what they depend on."""
_VOCABULARY, _WIDTH, _WINDOW = 32, 48, 8
_ROWS = ((11, 19, 10), (22, 26))
"""Lengths of the documents in the rows: with padding behind them, and filled. To a model a row of continuous packing, which begins
within a document, is one like the second: its positions begin at 0 too."""
_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size", "local_attention", "attention_chunk_size",
            "chunk_size", "mamba_chunk_size", "block_size", "index_block_size", "keep_window_size", "index_topk")
"""Settings that say how far a layer looks: made shorter than the documents."""


class _NoTokenizer:
    """As much of a tokenizer as a model is built with."""

    eos_token_id = bos_token_id = 0

    def __len__(self) -> int:
        return _VOCABULARY


class _Laid(NamedTuple):
    """Documents as the input of one forward pass: where their targets are predicted, and of which document each is."""

    inputs: Micro
    predictors: Tensor
    targets: Tensor
    document: Tensor


def find_isolation(section: ModelSection, kind: str, layout: str, sequence_length: int, cache: Path) -> Isolation:
    """`probe_isolation`, kept in a file of the data cache: a run, its restarts and the trials of a sweep ask once.

    The key is the small config, the versions of torch and transformers, and that of the probe. A factory's code may change under
    the same name, so its model is tried each time.

    Raises:
        ConfigError: the section names a model that can't be found.
    """
    if section.factory:
        return probe_isolation(section, kind, layout, sequence_length)
    try:
        small = _small_section(section, sequence_length).model_dump(mode="json")
    except ConfigError:
        raise
    except Exception as error:  # a config that makes no model; whoever builds it says what is wrong
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
        log.debug("%s can't be written: %s", path, error)
    return found


def probe_isolation(section: ModelSection, kind: str = "causal_lm", layout: str = "documents",
                    sequence_length: int = LONG) -> Isolation:
    """Try a layout on a small model of the same kind; a pure function of the section and the code.

    Args:
        kind: see `build_deferred`.
        layout: one of `LAYOUTS`.
        sequence_length: of the rows to be trained on. Windows that they do not exceed are left out of account.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes and settings of the small model
        torch.manual_seed(0)
        try:
            model = _small(section, kind, sequence_length)
            if isinstance(model, Isolation):
                return model
            return _compare(model, layout, has_critic=kind.startswith("actor"))
        except Exception as error:  # an architecture may fail in any way; what can't be tried counts as leaking
            return _untried(error)


def _untried(error: Exception) -> Isolation:
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    return Isolation(None, f"it could not be tried on a small model ({' '.join(text.split())[:300]})")


def _small(section: ModelSection, kind: str, sequence_length: int) -> nn.Module | Isolation:
    if section.factory:
        return _of_factory(section, kind)
    model = materialize(build_deferred(_small_section(section, sequence_length), _NoTokenizer(), _WIDTH, 0, kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, _STD)
    return model


def _small_section(section: ModelSection, sequence_length: int) -> ModelSection:
    """Small, with windows shorter than the documents; without dropout, adapters and a weight for the loss of its routers."""
    small = small_model(section)
    whole = config_of(section).to_dict()
    known = {name: whole[name] for name in _WINDOWS if type(whole.get(name)) is int}
    windows = {name: min(value, _WINDOW) if value < sequence_length else value for name, value in known.items()}
    return without_dropout(small.model_copy(update={"config": {**(small.config or {}), **windows}, "lora": None, "router_loss_weight": None}))[0]


def _of_factory(section: ModelSection, kind: str) -> nn.Module | Isolation:
    factory = load_object(section.factory or "", "model.factory")
    if getattr(factory, DECLARATION, None) is not None:
        said = bool(getattr(factory, DECLARATION))
        return Isolation(said, f"its factory says {DECLARATION} = {said}")
    with torch.device("meta"):
        skeleton = factory(**section.options)
    if getattr(skeleton, DECLARATION, None) is not None:
        said = bool(getattr(skeleton, DECLARATION))
        return Isolation(said, f"it says {DECLARATION} = {said}")
    size = sum(p.numel() for p in skeleton.parameters())
    if size > FACTORY_PARAMETERS:
        return Isolation(None, f"a factory's model of {size:,} parameters is too large to be tried: give it {DECLARATION} = True if "
                               "position_ids that restart keep documents apart in it")
    return build_deferred(section, _NoTokenizer(), _WIDTH, 0, kind).eval()


def _compare(model: nn.Module, layout: str, has_critic: bool) -> Isolation:
    documents = [torch.randint(1, _VOCABULARY, (length,)) for row in _ROWS for length in row]
    first = [len(d) // 2 if layout == "rollouts" else 1 for d in documents]
    weights = torch.rand(sum(len(d) - f for d, f in zip(documents, first, strict=True))) + 0.5

    def scores(lay: Any, given: Sequence[Tensor]) -> Tensor:
        """(targets, 1 or 2): log-probabilities, and values of the critic, document by document."""
        found = []
        for laid in lay(given, first):
            scored = _score(model, laid)
            columns = [scored.log_probs] + ([scored.values] if has_critic and scored.values is not None else [])
            found.append((torch.stack(columns, 1), laid.document))
        order = torch.cat([document for _, document in found]).argsort(stable=True)
        return torch.cat([s for s, _ in found])[order]

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
        for changed in ({0, len(_ROWS[0])}, {len(_ROWS[0]) - 1, len(documents) - 1}):  # the first, and the last, of each row
            other = [(d + 7) % (_VOCABULARY - 1) + 1 if n in changed else d for n, d in enumerate(documents)]
            kept = torch.tensor([int(n) not in changed for n in owner])
            leak = max(leak, _largest((scores(lay, other) - together)[kept]))
        ahead, reaction = _own_influence(scores, documents, first, owner)
    if not ahead <= _SAME:
        return Isolation(False, "a token is predicted from tokens behind it: this is no causal language model", ahead, causal=False)
    if leak != leak or off != off:
        return Isolation(None, "the small model gives NaN")
    if leak > _SAME or off > _SAME:
        size = f"{leak:.2g} nats in a small model of its kind" if leak > _SAME else f"{off:.2g} of the gradient in a small model of its kind"
        if layout == "padded":
            return Isolation(False, f"the padding of a row changes what is computed of its document ({size})", leak)
        return Isolation(False, f"documents in one row see each other ({size}){_missing_kernels(model)}", leak)
    if 0 < reaction < _MOVED:
        return Isolation(None, f"the small model hardly reacts to its input ({reaction:.2g} nats)")
    return Isolation(True, "documents in one row do not see each other", leak)


def _own_influence(scores: Any, documents: list[Tensor], first: list[int], owner: Tensor) -> tuple[float, float]:
    """By how many nats a document's tokens change with its last token, which none of them may see; and with its first one."""
    alone = scores(_lay_alone, documents)
    last = torch.cat([owner[1:] != owner[:-1], torch.tensor([True])])
    ends = [torch.cat([d[:-1], (d[-1:] + 7) % (_VOCABULARY - 1) + 1]) for d in documents]
    begins = [torch.cat([(d[:1] + 7) % (_VOCABULARY - 1) + 1, d[1:]]) for d in documents]
    ahead = _largest((scores(_lay_alone, ends) - alone)[~last])
    later = torch.cat([torch.arange(f, len(d)) > 1 for d, f in zip(documents, first, strict=True)])
    return ahead, _largest((scores(_lay_alone, begins) - alone)[later])


def _missing_kernels(model: nn.Module) -> str:
    """Packages with which the architecture would keep documents apart by `seq_idx` or `cu_seq_lens_q`: CUDA kernels, which
    transformers names in its refusal to compute without them."""
    base: Any = getattr(getattr(model, "model", None), "base_model", None)
    ids = torch.ones(1, 8, dtype=torch.long)
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    forms = ({"seq_idx": torch.tensor([[0] * 4 + [1] * 4], dtype=torch.int32)},
             {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 4, "max_length_k": 4})
    missing = []
    for form in forms if base is not None else ():
        try:
            base(input_ids=ids, use_cache=False, **form)
        except Exception as error:
            missing += re.findall(r"can't keep packed sequences apart without `([^`]+)`", str(error))
    names = " and ".join(dict.fromkeys(missing))
    return f"; sequence boundaries keep them apart only in the CUDA kernels of {names}, which are not supported" if names else ""


def _largest(values: Tensor) -> float:
    """NaN where there is one."""
    return float(values.detach().abs().max()) if values.numel() else 0.0


def _score(model: nn.Module, laid: _Laid) -> TokenScores:
    if getattr(model, "computes_token_losses", False):
        scores: TokenScores = model(predictors=laid.predictors, targets=laid.targets, **laid.inputs)
        return scores
    return log_probs_from_logits(logits_of(model, laid.inputs).flatten(0, 1)[laid.predictors], laid.targets)


def _lay(rows: Sequence[Sequence[int]], documents: Sequence[Tensor], first: Sequence[int], width: int) -> _Laid:
    """Documents in rows as the collator of texts lays them (data/collate.py)."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    positions = torch.stack([torch.from_numpy(restarting_positions([len(documents[n]) for n in row], width)).long() for row in rows])
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
    return _Laid({"input_ids": ids, "position_ids": positions}, torch.cat(predictors), torch.cat(targets), torch.cat(owner))


def _lay_packed(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    numbers = iter(range(len(documents)))
    return [_lay([[next(numbers) for _ in row] for row in _ROWS], documents, first, _WIDTH)]


def _lay_padded(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    return [_lay([[n] for n in range(len(documents))], documents, first, _WIDTH)]


def _lay_alone(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    return [laid._replace(document=torch.full_like(laid.document, n)) for n, d in enumerate(documents)
            for laid in [_lay([[0]], [d], [first[n]], len(d))]]


def _lay_rollouts(documents: Sequence[Tensor], first: Sequence[int]) -> list[_Laid]:
    """As PPO and GRPO score answers to prompts."""
    prompts = nn.utils.rnn.pad_sequence([d[:f] for d, f in zip(documents, first, strict=True)], batch_first=True)
    answers = nn.utils.rnn.pad_sequence([d[f:] for d, f in zip(documents, first, strict=True)], batch_first=True)
    lengths = torch.tensor([len(d) - f for d, f in zip(documents, first, strict=True)])
    mask = torch.arange(prompts.shape[1]) < torch.tensor(list(first))[:, None]
    inputs, scored = packed_answers(training_rows(prompts, mask, Samples(answers, lengths, lengths > 0)))
    return [_Laid(inputs, scored.predictors, scored.targets, scored.rows)]
