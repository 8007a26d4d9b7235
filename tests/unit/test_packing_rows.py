"""Documents to rows: packing and splitting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm_ray.config.errors import DataError
from myllm_ray.data.packing import Segment, best_fit, continuous, fit

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(4, 32), st.integers(1, 8))
def test_best_fit_never_cuts_a_document(lengths: list[int], size: int, open_rows: int) -> None:
    rows = list(best_fit(fit(enumerate(lengths), size, "truncate"), size, open_rows))
    placed = sorted(s for row in rows for s in row)
    assert placed == [Segment(i, 0, min(n, size)) for i, n in enumerate(lengths)]
    assert all(0 < sum(s.length for s in row) <= size for row in rows)


@given(LENGTHS, st.integers(4, 32))
def test_continuous_keeps_every_token_in_order(lengths: list[int], size: int) -> None:
    rows = list(continuous(enumerate(lengths), size))
    tokens = [(s.document, s.start + i) for row in rows for s in row for i in range(s.length)]
    assert tokens == [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    assert all(sum(s.length for s in row) == size for row in rows[:-1])


@given(LENGTHS, st.integers(4, 32))
def test_split_keeps_every_token(lengths: list[int], size: int) -> None:
    pieces = list(fit(enumerate(lengths), size, "split"))
    assert sum(p.length for p in pieces) == sum(lengths)
    assert max(p.length for p in pieces) <= size


def test_overflow_error_names_the_document() -> None:
    with pytest.raises(DataError, match=r"document 1 has 9 tokens.*sequence_length=8"):
        list(fit([(0, 8), (1, 9)], 8, "error"))
