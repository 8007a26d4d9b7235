"""From the config's data section to a token store and the streams on it. Tokenising happens once, here.

A store's key is a hash of everything that decides its tokens (files by path, size and time; format; tokenizer), so a
second run, a resume or a sweep's trial with the same data starts at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from myllm_ray.common.files import published
from myllm_ray.common.types import Isolation
from myllm_ray.config.errors import DataError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.schema import SourceSection, TrainerConfig
from myllm_ray.data import sources as reading
from myllm_ray.data.chat_template import ChatTemplate
from myllm_ray.data.formats import BadRow, Labelled, Messages, Preference, Prompt, Text
from myllm_ray.data.order import Order
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.records import PROMPTS, TOKENS, Room
from myllm_ray.data.sources import Unit
from myllm_ray.data.store import FORMAT_VERSION, TokenStore, write_store
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.tokenize import TokenizeOptions, tokenize_rows
from myllm_ray.data.tokenizer import (
    TOKENIZER_VERSION,
    TURN_END,
    TURN_START,
    fingerprint,
    has_own_template,
    load_tokenizer,
    open_tokenizer,
    tokenizer_section,
)

log = logging.getLogger(__name__)
MapUnits = Callable[[Callable[[Unit], pa.RecordBatch], list[Unit]], Iterable[pa.RecordBatch]]
"""Applies a function to units and gives the results in order: in-process, or by Ray Data."""


_DUPLICATES = 0.01
"""The share of documents that are copies of others from which it is worth a warning."""


@dataclass
class PreparedData:
    """What training reads: small, picklable, everything on disk."""

    train: StreamSpec
    validation: StreamSpec | None
    tokenizer_folder: str
    skipped: int
    notes: tuple[str, ...] = ()
    """What a user should know about how the data became tokens, one line each."""
    isolation: Isolation | None = None
    """Whether the model keeps the documents of a row apart; None: not asked, rows are as the config says."""
    packs_answers: bool = True
    """Whether trainers that sample put several answers in one row."""

    @property
    def packing(self) -> str:
        """What shares a row, in words."""
        kind = self.train.plan.packing.kind
        if self.train.plan.store.kind == PROMPTS:
            return "several answers a row" if self.packs_answers else "one answer a row"
        return {"record": "one record a row", "none": "one document a row"}.get(kind, f"several documents a row ({kind})")

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run goes on: the tokens and the order of rows."""
        return {"tokens": self.train.plan.store.content_hash, "rows": self.train.plan.key,
                "batch.global_size": self.train.global_size, "packing": self.packing}


def prepare(config: TrainerConfig, map_units: MapUnits = map, isolation: Isolation | None = None) -> PreparedData:
    """Tokenise what is not yet in the cache, and lay the streams over it.

    Args:
        isolation: whether the model keeps the documents of a row apart (`roles.isolation_of`): if not, each has a row of its own.
            None: rows are as the config says.

    Raises:
        DataError, ConfigError: as the parts below it do; nothing half-written stays behind.
    """
    data = config.data
    cache = Path(data.cache or Path(config.run.storage) / ".data")
    tokenizer_folder = prepare_tokenizer(config, cache)
    named = [(s, f"data.train[{i}]" if isinstance(data.train, list) else "data.train") for i, s in enumerate(data.sources)]
    train = _store(config, cache, tokenizer_folder, named, map_units)
    tokenizer = open_tokenizer(str(tokenizer_folder))
    pad_id = pad_token_id(tokenizer)
    own = data.validation if data.validation and data.validation.split is None else None
    share = data.validation.split or 0.0 if data.validation else 0.0
    weights = tuple(s.weight for s in data.sources)
    order = Order(config.run.seed, data.shuffle, data.shuffle_window, weights, share)

    def spec(store: TokenStore, order: Order) -> StreamSpec:
        plan = RowPlan(store, order, packing_of(config, isolation) if store.kind == TOKENS else Packing("record", config.data.sequence_length))
        return StreamSpec(plan, config.batch.global_size, config.batch.micro_size, pad_id)

    validation = None
    if own is not None:
        held_out = _store(config, cache, tokenizer_folder, [(own, "data.validation")], map_units)
        validation = spec(held_out, Order(config.run.seed, "none"))
    elif share:
        validation = spec(train, Order(config.run.seed, "none", held_out=share, validation=True))
    prepared = PreparedData(spec(train, order), validation, str(tokenizer_folder),
                            sum(s["skipped"] for s in train.meta["sources"]), tuple(_notes(config, tokenizer, train)), isolation,
                            packs(config, isolation))
    for stream in filter(None, (prepared.train, prepared.validation)):
        stream.plan.rows_in_epoch(0)  # written before workers start, so that they find it, and errors come early
    return prepared


def _notes(config: TrainerConfig, tokenizer: Any, store: TokenStore) -> Iterator[str]:
    own, loaded = has_own_template(tokenizer), bool(tokenizer_section(config).path or tokenizer_section(config).name)
    if any(source.format == "instruction" for source in config.data.sources):
        log.info("format instruction: %s", "a user's turn and its answer, by the tokenizer's chat template" if own else
                 "Alpaca's layout (### Instruction: ... ### Response:), as the tokenizer has no chat template of its own")
    if store.chats:
        if loaded and not own:
            known = TURN_END in tokenizer.get_vocab()
            yield (f"the tokenizer has no chat template: chats are written as ChatML ({TURN_START}role ... {TURN_END}), each turn ended by "
                   f"{TURN_END if known else tokenizer.eos_token}"
                   + ("" if known else f", as {TURN_END} is no token of it; what begins a turn takes several tokens")
                   + "; a model that was trained on chats in another layout has to learn this one. Give the tokenizer its chat template if it has one")
        yield from ChatTemplate.of(tokenizer).notes()
    if store.duplicates > _DUPLICATES * len(store):
        yield (f"{store.duplicates:,} of {len(store):,} documents ({store.duplicates / len(store):.1%}) are exact copies of others: each is trained on "
               "as often as it is in the data")


def packs(config: TrainerConfig, isolation: Isolation | None) -> bool:
    """Whether several documents, or answers, share a row: where the config asks for it and the model keeps them apart."""
    return bool(config.data.packing) and (isolation is None or isolation.isolated is True)


def packing_of(config: TrainerConfig, isolation: Isolation | None = None) -> Packing:
    """Continuous for text that is trained on whole; best-fit, which never cuts a document, for everything else; none where
    `packs` says no."""
    whole_text = config.trainer == "pretrain"
    overflow = config.data.overflow or ("split" if whole_text else "truncate")
    kind = "none" if not packs(config, isolation) else "continuous" if whole_text and overflow == "split" else "best_fit"
    return Packing(kind, config.data.sequence_length, overflow)


def pad_token_id(tokenizer: Any) -> int:
    """The id that fills rows up: never attended to, never trained on, so the end-of-text token serves as well."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def prepare_tokenizer(config: TrainerConfig, cache: Path) -> Path:
    """The config's tokenizer as a folder in the cache (trained there, if it is to be trained)."""
    section = tokenizer_section(config)
    described: list[Any] = [TOKENIZER_VERSION, section.model_dump()]
    if section.train:
        described += [(s.model_dump(), reading.signature(_units(s, "data.train"))) for s in config.data.sources]
    folder = cache / f"tokenizer-{_hash(described)}"
    if section.path or section.name or not (folder / "tokenizer.json").exists():
        if section.train:
            log.info("training a tokenizer of %d tokens on the data", section.vocab_size)
        tokenizer = load_tokenizer(section, _texts(config) if section.train else None)
        folder = cache / f"tokenizer-{_hash([*described, fingerprint(tokenizer)])}" if not section.train else folder
        try:
            _save_tokenizer(tokenizer, folder)
        except OSError as error:
            raise DataError(f"data.cache: {folder} can't be written: {error}") from None
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Whole or absent, also when several processes prepare at once: what stands there already is the same."""
    if folder.exists():
        return
    with published(folder, existing="keep") as beside:
        tokenizer.save_pretrained(beside)


def _store(config: TrainerConfig, cache: Path, tokenizer_folder: Path, named: list[tuple[SourceSection, str]],
           map_units: MapUnits) -> TokenStore:
    units = [_units(source, key) for source, key in named]
    names = _names([source for source, _ in named])
    train_on_prompt = bool(getattr(getattr(config, "sft", None), "train_on_prompt", False))
    room = Room(config.room, config.data.overflow or "truncate") if config.room else None
    described = [FORMAT_VERSION, tokenizer_folder.name, train_on_prompt, config.data.on_bad_row, *([asdict(room)] if room else []),
                 [(s.model_dump(exclude={"weight", "split"}), reading.signature(u))
                  for (s, _), u in zip(named, units, strict=True)]]
    folder = cache / f"tokens-{_hash(described)}"
    if not (folder / "meta.json").exists():
        log.info("tokenising %s: %d pieces, once; kept in %s", ", ".join(names), sum(map(len, units)), folder)
        parts = []
        for (source, key), name, source_units in zip(named, names, units, strict=True):
            resolve("formats", source.format, f"{key}.format")  # a wrong name fails here, not in a task
            options = TokenizeOptions(source.fields, config.data.on_bad_row, train_on_prompt, room)
            work = partial(tokenize_unit, source=source, tokenizer_folder=str(tokenizer_folder), options=options)
            parts.append((name, map_units(work, source_units), source.limit))
        write_store(folder, parts, {"tokenizer": str(tokenizer_folder)})
    return TokenStore(folder)


_tokenizers: dict[str, Any] = {}


def tokenize_unit(unit: Unit, source: SourceSection, tokenizer_folder: str, options: TokenizeOptions) -> pa.RecordBatch:
    """One unit of one source as tokens: what one task does."""
    if tokenizer_folder not in _tokenizers:
        _tokenizers[tokenizer_folder] = open_tokenizer(tokenizer_folder)
    format_row = resolve("formats", source.format, "data.train.format")
    return tokenize_rows(reading.read_unit(unit, source), format_row, _tokenizers[tokenizer_folder], options)


def _units(source: SourceSection, key: str) -> list[Unit]:
    units = reading.list_units(source, f"{key}.path" if source.path else f"{key}.source")
    if not units:
        raise DataError(f"{key}: {source.path or source.source!r} is empty: there is nothing to train on")
    return units


def _names(sources: list[SourceSection]) -> list[str]:
    """A name for each source: its own, or the stem of its path."""
    names: list[str] = []
    for source in sources:
        path = source.path[0] if isinstance(source.path, list) else source.path
        name = source.name or source.source or Path(path or "data").stem.replace("*", "") or "data"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _texts(config: TrainerConfig) -> Iterator[str]:
    """The training texts, for a tokenizer that is trained on them."""
    for source in config.data.sources:
        format_row = resolve("formats", source.format, "data.train.format")
        for unit in _units(source, "data.train"):
            for place, row in reading.read_unit(unit, source):
                try:
                    yield _as_text(row, format_row, source.fields)
                except BadRow as error:
                    if config.data.on_bad_row == "error":
                        raise DataError(f"{place}: {error} (data.on_bad_row=skip leaves such rows out)") from None


def _as_text(row: Mapping[str, Any] | BadRow, format_row: Callable[..., Any], fields: Mapping[str, str]) -> str:
    if isinstance(row, BadRow):
        raise row
    formatted = format_row({**row, **{new: row[old] for new, old in fields.items() if old in row}})
    if isinstance(formatted, (Preference, Labelled, Prompt)):
        return "\n".join(_plain(value) for value in vars(formatted).values() if isinstance(value, (str, Messages)))
    return _plain(formatted) if isinstance(formatted, Messages) else "".join(piece for piece, _ in formatted)


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
