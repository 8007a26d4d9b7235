"""Mixtures of sources by share: the source of each row of a run.

The rows of a mixture are one endless sequence. Each row has documents of one source, and the next row comes from a
source that is owed tokens, of these from the one whose share reaches the end of its next row first. This is WF2Q of
packet networks (Bennett and Zhang, "WF2Q: Worst-case Fair Weighted Fair Queueing", 1996) with rows in place of packets:
after any number of rows of a stage, the tokens of a source differ from share x tokens of all by at most the tokens of
the longest row, and by less than one row if all rows have the same length.

The sequence is planned in epochs of `Mixture.rows` rows. They are parts of it, not passes over the data: a source
begins its next pass when its rows are used up, in any row. The state between two epochs is small: the tokens that each
source is owed, and the number of its next row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from myllm_ray.config.errors import DataError
from myllm_ray.config.mixture_section import stages_of
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.examples import TOKENS
from myllm_ray.data.packing import Rows, joined
from myllm_ray.data.store import TokenStore

UNIT = 10**9
"""The sum of the shares of a stage. Shares are integers, so that sums of tokens are exact."""
_LEAST_ROWS = 4096
"""Smallest number of rows of an epoch, so that small data is not planned in many small parts."""
_MOST_ROWS = 65536
"""Largest number of rows whose sources are chosen together."""


@dataclass(frozen=True)
class Stage:
    """The shares of the sources up to a row.

    Attributes:
        until: Number of rows of the run after which the stage ends; None: it has no end.
        shares: Share of each source, in units of 1 / `UNIT`.
    """

    until: int | None
    shares: tuple[int, ...]


@dataclass(frozen=True)
class Mixture:
    """The stages of a run, and the number of rows of an epoch.

    Attributes:
        stages: Stages in ascending order; the last one has no end.
        rows: Number of rows of an epoch, a multiple of the global batch size.
    """

    stages: tuple[Stage, ...]
    rows: int

    def stage_at(self, row: int) -> tuple[int, Stage]:
        """Returns the stage of a row of the run, and the row at which the stage begins."""
        begin = 0
        for stage in self.stages[:-1]:
            if stage.until is not None and row < stage.until:
                return begin, stage
            begin = stage.until or begin
        return begin, self.stages[-1]


@dataclass(frozen=True)
class State:
    """The state of a mixture before a row.

    Attributes:
        owed: Tokens that each source is owed in this stage, times `UNIT`; negative if it has more than its share.
        rounds: Number of the round of each source, see `RowsOf`.
        rows: Number of the next row of each source in its round.
    """

    owed: tuple[int, ...]
    rounds: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def first(cls, sources: int) -> State:
        """Returns the state before the first row."""
        none = (0,) * sources
        return cls(none, none, none)

    @classmethod
    def read(cls, path: Path) -> State:
        """Reads the state that `write` has written."""
        saved = json.loads(path.read_text(encoding="utf-8"))
        return cls(*(tuple(map(int, saved[name])) for name in ("owed", "rounds", "rows")))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


RowsOf = Callable[[int, int], Iterator[Rows]]
"""Returns the rows of a source (first argument) in a round (second argument): one or several passes over it."""


def mixture_of(config: TrainerConfig, store: TokenStore, packed: bool) -> Mixture:
    """Returns the mixture of a config whose sources have shares.

    The stages end with a global batch: that of their last optimizer step. An epoch has at least the rows that the data
    fills, and whole global batches.

    Args:
        config: The config of the run.
        store: The training data.
        packed: Whether several documents share a row.
    """
    data, size, per_batch = config.data, config.batch.global_size, config.steps_per_batch
    stages: list[Stage] = []
    for end, shares in stages_of(data.sources, data.mixture):
        step = round(end * (config.run.max_steps or 0)) if isinstance(end, Fraction) else end
        until = None if step is None else -(-step // per_batch) * size
        stages.append(Stage(until, tuple(round(share * UNIT) for share in shares)))
    filled = -(-store.tokens // data.sequence_length) if packed and store.kind == TOKENS else len(store)
    return Mixture(tuple(stages), -(-max(filled, _LEAST_ROWS) // size) * size)


def choose(shares: Sequence[int], sizes: Sequence[Sequence[int]], owed: list[int], most: int) -> list[int]:
    """Returns the sources of the next rows, up to the last row of one of the sources.

    Args:
        shares: Share of each source, in units of its sum. Sources with a share have at least one row.
        sizes: Tokens of the next rows of each source.
        owed: Tokens that each source is owed, times the sum of the shares; their sum is 0. Updated.
        most: Largest number of rows.
    """
    total = sum(shares)
    found: list[int] = []
    sharing = [(source, share) for source, share in enumerate(shares) if share]
    following = [iter(values) for values in sizes]
    sizes_now = [next(values, 0) for values in following]
    while len(found) < most:
        chosen, needed, share_of_chosen = -1, 0, 1
        for source, share in sharing:
            if owed[source] >= 0:
                # The share of the source reaches the end of the row after needed / share tokens.
                need = total * sizes_now[source] - owed[source]
                if chosen < 0 or need * share_of_chosen < needed * share:
                    chosen, needed, share_of_chosen = source, need, share
        size = sizes_now[chosen]
        for source, share in sharing:
            owed[source] += share * size
        owed[chosen] -= total * size
        found.append(chosen)
        after = next(following[chosen], None)
        if after is None:
            break
        sizes_now[chosen] = after
    return found


class Mixer:
    """Yields the rows of a mixture from a given row on.

    Args:
        mixture: The stages.
        row: Number of the first row of the run.
        state: The state before that row. Updated.
        rows_of: The rows of the sources.
        names: Names of the sources, for error messages.
        by_tokens: Whether shares are of tokens. If not, they are of rows: each row counts the same.
    """

    def __init__(
        self, mixture: Mixture, row: int, state: State, rows_of: RowsOf, names: Sequence[str], by_tokens: bool
    ):
        self._mixture, self._row, self._owed = mixture, row, list(state.owed)
        self._sources = [
            _Source(rows_of, number, name, state.rounds[number], state.rows[number], by_tokens)
            for number, name in enumerate(names)
        ]

    @property
    def state(self) -> State:
        """The state after the rows that were yielded."""
        return State(tuple(self._owed), tuple(s.round for s in self._sources), tuple(s.row for s in self._sources))

    def rows(self, count: int) -> Iterator[Rows]:
        """Yields the next `count` rows in pieces.

        Raises:
            DataError: A source with a share has no rows.
        """
        end = self._row + count
        while self._row < end:
            begin, stage = self._mixture.stage_at(self._row)
            if self._row == begin:
                self._owed = [0] * len(self._sources)
            for source, share in zip(self._sources, stage.shares, strict=True):
                if share:
                    source.fill()
            most = min(end, stage.until or end) - self._row
            chosen = choose(stage.shares, [s.sizes for s in self._sources], self._owed, min(most, _MOST_ROWS))
            yield self._taken(np.asarray(chosen))
            self._row += len(chosen)

    def _taken(self, chosen: np.ndarray) -> Rows:
        """Takes the next rows from the sources `chosen` (n,)."""
        counts = np.bincount(chosen, minlength=len(self._sources)).tolist()
        by_source = joined([source.take(count) for source, count in zip(self._sources, counts, strict=True) if count])
        order = np.empty(len(chosen), np.int64)
        order[np.argsort(chosen, kind="stable")] = np.arange(len(chosen))
        return by_source.take(order)


class _Source:
    """The rows of one source, round after round, from a given row of a round on."""

    def __init__(self, rows_of: RowsOf, number: int, name: str, round: int, row: int, by_tokens: bool):
        self.round, self.row = round, row
        self.sizes: list[int] = []
        """Sizes of the rows that are held."""
        self._rows_of, self._number, self._name, self._by_tokens = rows_of, number, name, by_tokens
        self._held: Rows | None = None
        self._pieces: Iterator[Rows] | None = None

    def fill(self) -> None:
        """Reads the next piece of rows if none is held."""
        if self.sizes:
            return
        skipped = 0
        if self._pieces is None:
            self._pieces, skipped = self._rows_of(self._number, self.round), self.row
        while True:
            piece = next(self._pieces, None)
            if piece is None and self.row == 0:
                raise DataError(
                    f"data source {self._name!r} has no documents for training; change data.validation.split or "
                    "provide more data"
                )
            if piece is None:
                self.round, self.row, skipped = self.round + 1, 0, 0
                self._pieces = self._rows_of(self._number, self.round)
                continue
            if skipped >= len(piece.counts):
                skipped -= len(piece.counts)
                continue
            self._held = piece.split(skipped)[1] if skipped else piece
            self.sizes = self._measured(self._held)
            return

    def take(self, count: int) -> Rows:
        """Removes the next `count` of the rows that are held, and returns them."""
        assert self._held is not None
        taken, self._held = self._held.split(count)
        self.sizes = self.sizes[count:]
        self.row += count
        return taken

    def _measured(self, rows: Rows) -> list[int]:
        if not self._by_tokens:
            return [1] * len(rows.counts)
        firsts = np.cumsum(rows.counts) - rows.counts
        sizes: list[int] = np.add.reduceat(rows.segments[:, 2], firsts).tolist()
        return sizes
