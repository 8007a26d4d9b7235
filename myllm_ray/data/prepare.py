"""Prepares the data of a config: tokenizes it into a token store and builds the streams that read the store.

The cache key of a store is a hash of everything that determines its tokens (path, size and modification time of the
files; format; tokenizer). A second run, a resumed run or a sweep trial with the same data reuses the store.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from myllm_ray.common.files import published
from myllm_ray.common.progress import Task
from myllm_ray.common.types import Isolation
from myllm_ray.config.components import format_of
from myllm_ray.config.errors import ConfigError, DataError
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.config.sections import SourceSection
from myllm_ray.data import sources as reading
from myllm_ray.data.cache import DataCache
from myllm_ray.data.chat_template import ChatTemplate
from myllm_ray.data.examples import PROMPTS, TOKENS, LengthLimits
from myllm_ray.data.formats import BadRow, Labelled, Messages, Preference, Prompt, Text
from myllm_ray.data.mixture import mixture_of
from myllm_ray.data.order import Order, documents_in_passes
from myllm_ray.data.plan import Packing, RowPlan
from myllm_ray.data.pretokenized import Tokens
from myllm_ray.data.shard_tasks import ShardTask, make_shard, opened, shard_tasks
from myllm_ray.data.sources import Unit
from myllm_ray.data.special_tokens import vocabulary_size
from myllm_ray.data.store import TokenStore, is_shard
from myllm_ray.data.store_writer import FORMAT_VERSION, SourceShards, write_store
from myllm_ray.data.stream import StreamSpec
from myllm_ray.data.templates import TURN_END, TURN_START
from myllm_ray.data.tokenize import TokenizeOptions
from myllm_ray.data.tokenizer import (
    TOKENIZER_VERSION,
    fingerprint,
    has_own_template,
    load_tokenizer,
    open_tokenizer,
    template_of,
    tokenizer_section,
)

log = logging.getLogger(__name__)
MapUnits = Callable[[Callable[[ShardTask], pa.RecordBatch], list[ShardTask]], Iterable[pa.RecordBatch]]
"""Applies a function to tasks and returns the results in order, in-process or with Ray Data."""


_DUPLICATES = 0.01
"""Share of duplicate documents above which the user is warned."""


@dataclass
class PreparedData:
    """The prepared data of a run. Small and picklable, because all tokens are on disk."""

    train: StreamSpec
    validation: StreamSpec | None
    tokenizer_folder: str
    skipped: int
    notes: tuple[str, ...] = ()
    """Warnings for the user about the tokenized data, one line each."""
    isolation: Isolation | None = None
    """Whether the model isolates the documents of a row. None: not checked; rows are packed as configured."""
    packs_answers: bool = True
    """Whether trainers with rollouts pack several answers into one row."""
    base: dict[str, Any] | None = None
    """The identity of the frozen weights (`base_weights.base_identity`). None: checkpoints hold all weights."""
    tasks: tuple[RowPlan | None, ...] = ()
    """The rows of each entry of `evaluation.tasks`; None for a task of lm-evaluation-harness."""

    @property
    def packing(self) -> str:
        """A description of what shares a row. It is part of `identity`, so its wording must not change."""
        kind = self.train.plan.packing.kind
        if self.train.plan.store.kind == PROMPTS:
            return "several answers a row" if self.packs_answers else "one answer a row"
        return {"record": "one example a row", "none": "one document a row"}.get(
            kind, f"several documents a row ({kind})"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The properties that must not change when a run is resumed: tokens, order of the rows, frozen weights."""
        return {
            "tokens": self.train.plan.store.content_hash,
            "rows": self.train.plan.key,
            "batch.global_size": self.train.global_size,
            "packing": self.packing,
            **({"base": self.base} if self.base is not None else {}),
        }


def prepare(config: TrainerConfig, map_units: MapUnits = map, isolation: Isolation | None = None) -> PreparedData:
    """Tokenizes the data that is not in the cache yet, and builds the training and validation streams.

    Args:
        config: Config of the run.
        map_units: Applies the tokenization to units, see `MapUnits`.
        isolation: Whether the model isolates the documents of a row (`model_checks.isolation_of`). If it does not, each
            document has its own row. None: rows are packed as configured.

    Raises:
        DataError: The data or a cache folder can't be read or written, or a part of the data is empty. No partially
            written files remain.
        ConfigError: An option names an unknown format or an unusable tokenizer.
    """
    data = config.data
    cache = DataCache.of(config)
    tokenizer_folder = prepare_tokenizer(config, cache)
    named = [
        (s, f"data.train[{i}]" if isinstance(data.train, list) else "data.train") for i, s in enumerate(data.sources)
    ]
    train = _store(config, cache, tokenizer_folder, named, map_units)
    tokenizer = open_tokenizer(str(tokenizer_folder))
    pad_id = pad_token_id(tokenizer)
    own = data.validation if data.validation and data.validation.split is None else None
    share = data.validation.split or 0.0 if data.validation else 0.0
    weights = tuple(s.weight for s in data.sources)
    most = data.shuffle_in_memory
    by_formula = data.shuffle == "full" and most is not None and documents_in_passes(train, weights) > most
    order = Order(config.run.seed, data.shuffle, data.shuffle_window, weights, share, by_formula=by_formula)
    if data.has_shares:
        order = replace(order, weights=(), mixture=mixture_of(config, train, packs(config, isolation)))

    def spec(store: TokenStore, order: Order) -> StreamSpec:
        plan = RowPlan(
            store,
            order,
            packing_of(config, isolation) if store.kind == TOKENS else Packing("record", config.data.sequence_length),
        )
        return StreamSpec(plan, config.batch.global_size, config.batch.micro_size, pad_id)

    validation = None
    if own is not None:
        held_out = _store(config, cache, tokenizer_folder, [(own, "data.validation")], map_units)
        validation = spec(held_out, Order(config.run.seed, "none"))
    elif share:
        held = Order(config.run.seed, "none", held_out=share, validation=True, by_formula=by_formula)
        validation = spec(train, held)
    prepared = PreparedData(
        spec(train, order),
        validation,
        str(tokenizer_folder),
        sum(s["skipped"] for s in train.meta["sources"]),
        tuple(_notes(config, tokenizer, train)),
        isolation,
        packs(config, isolation),
    )
    for stream in filter(None, (prepared.train, prepared.validation)):
        # Written before workers start: they find the plan on disk, and errors in the data are raised early.
        stream.plan.segments(0)
    return prepared


def _notes(config: TrainerConfig, tokenizer: Any, store: TokenStore) -> Iterator[str]:
    own, loaded = has_own_template(tokenizer), bool(tokenizer_section(config).path or tokenizer_section(config).name)
    if any(source.format == "instruction" for source in config.data.sources):
        log.info(
            "format instruction: %s",
            "a user turn and its answer, written with the tokenizer's chat template"
            if own
            else "Alpaca layout (### Instruction: ... ### Response:), as the tokenizer comes without a chat template",
        )
    if store.chats:
        if loaded and not own:
            known = TURN_END in tokenizer.get_vocab()
            yield (
                f"the tokenizer has no chat template: chats are written as ChatML ({TURN_START}role ... {TURN_END}), "
                "and each turn ends with "
                f"{TURN_END if known else tokenizer.eos_token}"
                + ("" if known else f", as {TURN_END} is not in its vocabulary; a turn start is several tokens")
                + "; a model that was trained on another chat layout has to learn this one. If the model has a chat "
                "template, add it to the tokenizer"
            )
        yield from ChatTemplate.of(tokenizer).notes()
    if store.duplicates > _DUPLICATES * len(store):
        yield (
            f"{store.duplicates:,} of {len(store):,} documents ({store.duplicates / len(store):.1%}) are exact copies "
            "of others: each is trained on as often as it is in the data"
        )


def packs(config: TrainerConfig, isolation: Isolation | None) -> bool:
    """Returns whether several documents or answers share a row.

    This requires that the config enables packing, and that the model isolates documents or was not checked.
    """
    return bool(config.data.packing) and (isolation is None or isolation.isolated is True)


def packing_of(config: TrainerConfig, isolation: Isolation | None = None) -> Packing:
    """Returns the packing of documents of tokens.

    "continuous" for pretraining with `overflow: split`; "best_fit", which never splits a document to fill a row, for
    all other data; "none" where `packs` is false.
    """
    whole_text = config.trainer_section.trains_on_whole_text
    overflow = config.data.overflow or ("split" if whole_text else "truncate")
    kind = (
        "none" if not packs(config, isolation) else "continuous" if whole_text and overflow == "split" else "best_fit"
    )
    return Packing(kind, config.data.sequence_length, overflow)


def pad_token_id(tokenizer: Any) -> int:
    """Returns the token id of the padding.

    Padding is never attended to and never trained on, so the end-of-text token is used if there is no padding token.
    """
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


_NEWER = ("chat_template", "add_special_tokens")
"""Keys of the tokenizer section that are newer than the existing caches."""


def prepare_tokenizer(config: TrainerConfig, cache: DataCache) -> Path:
    """Returns the folder of the config's tokenizer in the cache. Loads or trains the tokenizer if needed."""
    section = tokenizer_section(config)
    # Without the keys that a config does not give, so that they do not change the names of existing caches.
    given = section.model_dump()
    described: list[Any] = [TOKENIZER_VERSION, {k: v for k, v in given.items() if k not in _NEWER or v}]
    if section.chat_template:
        described.append(template_of(section.chat_template).text)
    if section.train:
        described += [(_identity(s), reading.signature(_units(s, "data.train"))) for s in config.data.sources]
    folder = cache.folder / f"tokenizer-{_hash(described)}"
    cache.fetch(folder)
    if section.path or section.name or not (folder / "tokenizer.json").exists():
        if section.train:
            log.info("training a tokenizer of %d tokens on the data", section.vocab_size)
        with Task("training a tokenizer" if section.train else "loading the tokenizer"):
            tokenizer = load_tokenizer(section, _texts(config) if section.train else None)
        folder = (
            cache.folder / f"tokenizer-{_hash([*described, fingerprint(tokenizer)])}" if not section.train else folder
        )
        try:
            if not cache.fetch(folder):
                save_in_cache(tokenizer, folder)
                cache.upload(folder, folder)
        except OSError as error:
            raise DataError(f"data.cache: {folder} can't be written: {error}") from None
    return folder


def save_in_cache(tokenizer: Any, folder: Path) -> None:
    """Saves a tokenizer atomically. An existing folder is kept: its content is identical."""
    if folder.exists():
        return
    with published(folder, existing="keep") as beside:
        tokenizer.save_pretrained(beside)


def _store(
    config: TrainerConfig,
    cache: DataCache,
    tokenizer_folder: Path,
    named: list[tuple[SourceSection, str]],
    map_units: MapUnits,
) -> TokenStore:
    limits = LengthLimits(config.length_limit, config.data.overflow or "truncate") if config.length_limit else None
    options = TokenizeOptions({}, config.data.on_bad_row, config.trainer_section.trains_on_prompt, limits)
    return token_store(cache, tokenizer_folder, named, options, map_units)


def token_store(
    cache: DataCache,
    tokenizer_folder: Path,
    named: list[tuple[SourceSection, str]],
    options: TokenizeOptions,
    map_units: MapUnits = map,
) -> TokenStore:
    """Returns the token store of sources. They are tokenized if the store is not in the cache yet.

    Args:
        cache: the cache of the stores.
        tokenizer_folder: folder of the tokenizer; its name is part of the cache key.
        named: the sources, with their config keys for error messages.
        options: options of the tokenization. `fields` is replaced by the fields of each source.
        map_units: applies the tokenization to units; see `MapUnits`.

    Raises:
        DataError: a source can't be read, is empty, or a row can't be used.
        ConfigError: there is no such format.
    """
    units = [_units(source, key) for source, key in named]
    names = _names([source for source, _ in named])
    described = [
        FORMAT_VERSION,
        tokenizer_folder.name,
        options.train_on_prompt,
        options.on_bad_row,
        *([asdict(options.limits)] if options.limits else []),
        [(_identity(s, "weight", "split"), reading.signature(u)) for (s, _), u in zip(named, units, strict=True)],
    ]
    folder = cache.folder / f"tokens-{_hash(described)}"
    if not cache.fetch(folder, is_shard) or not (folder / "meta.json").exists():
        log.info("tokenizing %s: %d units; cached in %s", ", ".join(names), sum(map(len, units)), folder)
        tasks = [shard_tasks(u, source.limit) for (source, _), u in zip(named, units, strict=True)]
        vocabulary = vocabulary_size(opened(str(tokenizer_folder)))
        parts: list[SourceShards] = []
        with Task(f"tokenizing {', '.join(names)}", sum(map(len, tasks))) as progress:
            for (source, key), name, own in zip(named, names, tasks, strict=True):
                format_of(source, key)  # fail on the driver, not in a Ray task
                work = partial(
                    make_shard,
                    name=name,
                    source=source,
                    tokenizer_folder=str(tokenizer_folder),
                    options=replace(options, fields=source.fields),
                    vocabulary=vocabulary,
                    cache=cache,
                    store=folder,
                    attempt=uuid.uuid4().hex[:8],
                )
                parts.append(SourceShards(name, partial(_mapped, map_units, work, own, progress), source.limit))
            write_store(folder, parts, {"tokenizer": str(tokenizer_folder)}, cache)
    return TokenStore(folder, cache)


def _mapped(
    map_units: MapUnits,
    work: Callable[..., pa.RecordBatch],
    tasks: list[ShardTask],
    progress: Task,
    folder: Path,
    index: int,
) -> Iterator[pa.RecordBatch]:
    for batch in map_units(partial(work, folder=folder, index=index), tasks):
        progress.advance()
        yield batch


def _identity(source: SourceSection, *without: str) -> dict[str, Any]:
    """Returns what determines the documents of a source. Empty options are left out: older caches stay valid."""
    return source.model_dump(exclude={*without, "share", *([] if source.options else ["options"])})


def _units(source: SourceSection, key: str) -> list[Unit]:
    units = reading.list_units(source, f"{key}.path" if source.path else f"{key}.source")
    if not units:
        raise DataError(f"{key}: {source.path or source.source!r} is empty: there is nothing to train on")
    return units


def _names(sources: list[SourceSection]) -> list[str]:
    """Returns a unique name for each source: the configured name, or the stem of its path."""
    names: list[str] = []
    for source in sources:
        path = source.path[0] if isinstance(source.path, list) else source.path
        name = source.name or source.source or Path(path or "data").stem.replace("*", "") or "data"
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _texts(config: TrainerConfig) -> Iterator[str]:
    """Yields the training texts, for training a tokenizer."""
    for source in config.data.sources:
        format_row = format_of(source)
        if isinstance(format_row, Tokens):
            raise ConfigError(
                "tokenizer.train: the data has token ids and no text; give the tokenizer with which it was tokenized "
                "(tokenizer.path or tokenizer.name)"
            )
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
