"""Parts of the evaluation of models: batches, intervals, metrics of answers, and generators of random numbers."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from myllm_ray.common.seeds import preserved_random_state
from myllm_ray.config.sections import SourceSection
from myllm_ray.data.cache import DataCache
from myllm_ray.data.evaluation_rows import Batches, digest, rows_of
from myllm_ray.data.plan import Packing
from myllm_ray.data.prepare import save_in_cache, token_store
from myllm_ray.data.store import TokenStore
from myllm_ray.data.tokenize import TokenizeOptions
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.evaluate.answers import exact_match, interval, sampling
from myllm_ray.evaluate.losses import loss_metrics
from myllm_ray.evaluate.results import finite


def store_of(folder: Path, texts: list[str]) -> TokenStore:
    (folder / "text.txt").write_text("\n".join(texts))
    save_in_cache(byte_tokenizer(), folder / "tokenizer-bytes")
    source = SourceSection(path=str(folder / "text.txt"), split_text="line")
    return token_store(DataCache(folder), folder / "tokenizer-bytes", [(source, "data")], TokenizeOptions({}))


def test_batches_have_every_row_once_and_the_longest_first(tmp_path: Path) -> None:
    store = store_of(tmp_path, ["a" * n for n in (3, 9, 1, 30, 5)])
    batches = Batches(rows_of(store, Packing("none", 20, "split")), 2)
    lengths = [[sum(s.length for s in row) for row in rows] for rows in batches]
    # A line has its line break, except the last one, and the token that ends a document: 5, 11, 3, 32 and 6 tokens.
    assert lengths == [[20, 12], [11, 6], [5, 3]], "the document of 32 tokens is split at 20"
    assert len(batches) == 3
    assert batches[1:] == [batches[1], batches[2]]
    with pytest.raises(IndexError):
        batches[3]


def test_the_digest_is_that_of_the_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, text in (("1.txt", "x"), ("2.txt", "yz")):
        (tmp_path / "a" / name).write_text(text)
    source = SourceSection(path=str(tmp_path / "a"))
    first = digest(source, "--data")
    (tmp_path / "b").mkdir()
    for name, text in (("3.txt", "x"), ("4.txt", "yz")):
        (tmp_path / "b" / name).write_text(text)
    assert digest(SourceSection(path=str(tmp_path / "b")), "--data") == first
    for name, text in (("1.txt", "xy"), ("2.txt", "z")):
        (tmp_path / "a" / name).write_text(text)
    assert digest(source, "--data") != first, "the ends of files count"


def test_exact_match() -> None:
    assert exact_match([" 4\n", "4.", "b", ""], [4, "4", ["a", "b"], "x"]) == [1.0, 0.0, 1.0, 0.0]


def test_wilsons_interval() -> None:
    """Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert interval([1.0] * 81 + [0.0] * 182) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert interval([0.0] * 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert interval([1.0] + [0.0] * 28) == pytest.approx((0.0061, 0.1718), abs=1e-4)
    low, high = interval([-1.0, 3.0, 4.0, 6.0])
    assert (low + high) / 2 == pytest.approx(3.0)
    assert high - low == pytest.approx(2 * 1.959964 * np.std([-1, 3, 4, 6], ddof=1) / 2)
    assert interval([5.0]) == (5.0, 5.0)


def test_metrics_of_sums_that_are_large_or_have_no_bytes() -> None:
    found = loss_metrics(torch.tensor([8000.0, 10.0, 1.0, 0.0], dtype=torch.float64))
    assert found["perplexity"] == math.exp(700.0)
    assert "bits_per_byte" not in found
    assert finite({"a": [math.nan, 1.0], "b": {"c": math.inf}}) == {"a": [None, 1.0], "b": {"c": None}}


def test_temperature_zero_selects_the_most_likely_token() -> None:
    assert sampling(4).top_k == 1
    assert sampling(4, 0.7, 0.9).top_k is None
    assert sampling(4, 0.7, 0.9).temperature == 0.7


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@preserved_random_state()
def draws_and_fails() -> None:
    seed(9)
    draw()
    raise ValueError("inside")


def test_generators_are_restored_also_after_an_error() -> None:
    seed(1)
    with pytest.raises(ValueError, match="inside"):
        draws_and_fails()
    found = draw()
    seed(1)
    assert found == draw()
