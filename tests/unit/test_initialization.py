"""Random weights in parts: any cut of a tensor gives the values of the whole tensor."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from myllm_ray.common.seeds import derive_seed
from myllm_ray.common.tensor_files import Box, part_of, whole
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models import initialization
from myllm_ray.models.initialization import BLOCK, block_shape, blocks, record_initialization
from myllm_ray.models.load import build_model

SHAPES = [(40_000,), (7, 20_000), (150, 300), (1, 5), (3, 150, 200), (2, 2, 130, 140)]


class Module(nn.Module):
    def __init__(self, *shape: int, zero_row: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))
        self.zero_row = zero_row

    def initialize(self) -> None:
        self.weight.normal_(0, 0.5)
        if self.zero_row is not None:
            self.weight[self.zero_row].zero_()


def cuts(shape: tuple[int, ...], count: int, dim: int) -> list[Box]:
    """Returns the shards of `count` ranks along a dimension, as FSDP cuts them: the last ones are shorter or empty."""
    length = -(-shape[dim] // count)
    found = []
    for rank in range(count):
        start = min(rank * length, shape[dim])
        offsets, lengths = [0] * len(shape), list(shape)
        offsets[dim], lengths[dim] = start, min(length, shape[dim] - start)
        found.append(Box(tuple(offsets), tuple(lengths)))
    return found


@pytest.fixture
def all_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "DRAWN_IN_BLOCKS", 1)


@pytest.mark.usefixtures("all_in_blocks")
@pytest.mark.parametrize("shape", SHAPES)
def test_any_cut_gives_the_values_of_the_whole(shape: tuple[int, ...]) -> None:
    model = Module(*shape)
    source = record_initialization(model, model.initialize, 5).source
    expected = source("weight")
    assert expected.shape == shape
    for dim, ranks in itertools.product(range(len(shape)), (2, 3, 64)):
        boxes = cuts(shape, ranks, dim)
        assert torch.equal(torch.cat([source("weight", box) for box in boxes], dim), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_divide_a_tensor(shape: tuple[int, ...]) -> None:
    seen = torch.zeros(shape, dtype=torch.int64)
    numbers = []
    for number, block in blocks(shape, whole(shape)):
        assert math.prod(block.lengths) <= BLOCK
        part_of(seen, block).add_(1)
        numbers.append(number)
    assert bool((seen == 1).all())
    assert numbers == list(range(len(numbers)))


def test_blocks_of_the_usual_shapes() -> None:
    assert block_shape((8192, 8192)) == (2, 8192)
    assert block_shape((8192, 28_672)) == (1, BLOCK)
    assert block_shape((1_000_000,)) == (BLOCK,)
    assert block_shape((8, 32_768, 6144)) == (1, 128, 128)


def test_a_large_tensor_is_drawn_in_blocks_and_a_small_one_as_before() -> None:
    bound = initialization.DRAWN_IN_BLOCKS
    for rows, in_blocks in ((bound // 1024 - 1, False), (bound // 1024, True)):
        model = Module(rows, 1024)
        found = record_initialization(model, model.initialize, 5).source("weight")
        torch.manual_seed(derive_seed("weight", 5, "weight"))
        assert torch.equal(found, torch.empty(rows, 1024).normal_(0, 0.5)) == (not in_blocks)
        assert found.mean().abs() < 1e-3
        assert found.std() == pytest.approx(0.5, rel=2e-3)
        assert len({float(v) for v in found[:: BLOCK // 1024, 0]}) == -(-rows // (BLOCK // 1024))


@pytest.mark.usefixtures("all_in_blocks")
@pytest.mark.parametrize("row", [0, 70, -1])
def test_the_row_of_the_padding_token_is_zero(row: int) -> None:
    model, plain = Module(100, 300, zero_row=row), Module(100, 300)
    found = record_initialization(model, model.initialize, 5).source
    expected: Tensor = record_initialization(plain, plain.initialize, 5).source("weight")
    expected[row] = 0
    assert torch.equal(found("weight"), expected)
    assert torch.equal(torch.cat([found("weight", box) for box in cuts((100, 300), 7, 0)]), expected)


@pytest.mark.usefixtures("all_in_blocks")
def test_what_is_not_drawn_by_element_is_drawn_whole() -> None:
    model = Module(300, 300)
    source = record_initialization(model, lambda: nn.init.orthogonal_(model.weight), 5)
    assert "weight" in source.dependent or torch.equal(
        source.source("weight", whole((300, 300))), source.source("weight")
    )
    halves = Module(300, 300)
    source = record_initialization(halves, lambda: (halves.weight.zero_(), halves.weight[:150].normal_()), 5)
    expected = source.source("weight")
    assert bool(expected[:150].any())
    assert not bool(expected[150:].any())
    assert torch.equal(torch.cat([source.source("weight", box) for box in cuts((300, 300), 7, 0)]), expected)


@pytest.mark.usefixtures("all_in_blocks")
def test_a_model_has_the_same_weights_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution of each tensor stays that of the architecture."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}
    found = build_model(ModelSection(config=config), byte_tokenizer(), 32, 3)
    monkeypatch.setattr(initialization, "DRAWN_IN_BLOCKS", 2**60)
    expected = build_model(ModelSection(config=config), byte_tokenizer(), 32, 3)
    for (name, one), (_, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        if name.endswith("weight") and "ln" not in name:
            assert not torch.equal(one, other), name
            assert one.std().item() == pytest.approx(other.std().item(), rel=0.1), name
        else:
            assert torch.equal(one, other), name
