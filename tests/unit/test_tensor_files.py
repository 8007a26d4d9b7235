"""Tensors in parts: any layout of parts fills any box, and the files are valid for every reader of safetensors."""

from __future__ import annotations

import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from myllm_ray.common import distributed
from myllm_ray.common.tensor_files import Box, Part, TensorFiles, index_of, plan_reads, reads, to_json, whole
from myllm_ray.config import CheckpointError
from myllm_ray.engine.checkpointing import files
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, read_manifest, read_tensors
from myllm_ray.engine.checkpointing.verification import manifest_checksum, sha256
from myllm_ray.models.deferred import CheckpointTensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


def grid(shape: tuple[int, ...], random: random.Random) -> list[Box]:
    """Divides a tensor into boxes, at random places in each dimension."""
    cuts = [sorted({0, size, *(random.randrange(size + 1) for _ in range(2))}) for size in shape]
    sides = [list(itertools.pairwise(c)) for c in cuts]
    return [Box(tuple(a for a, _ in box), tuple(b - a for a, b in box)) for box in itertools.product(*sides)]


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(*box, strict=True))


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5)])
def test_parts_of_any_layout_fill_boxes_of_any_other(shape: tuple[int, ...]) -> None:
    draw = random.Random(0)
    complete = torch.randn(shape)
    for _ in range(20):
        parts = [Part(str(i), box) for i, box in enumerate(grid(shape, draw))]
        for wanted in grid(shape, draw):
            found = torch.full(wanted.lengths, torch.nan)
            count = 0
            for read in reads(parts, wanted):
                found[read.target] = complete[slices(read.part.box)][read.source]
                count += found[read.target].numel()
            assert torch.equal(found, complete[slices(wanted)])
            assert count == found.numel(), "no element is read twice"


def test_boxes_that_the_parts_do_not_fill_are_refused() -> None:
    parts = [Part("a", Box((0, 0), (2, 3))), Part("b", Box((3, 0), (1, 3)))]
    assert set(plan_reads({"w": parts}, {"w": Box((3, 0), (1, 3))})) == {"b"}, "only the file that overlaps"
    with pytest.raises(ValueError, match="hold 9 of 12 elements of w"):
        plan_reads({"w": parts}, {"w": whole((4, 3))})
    with pytest.raises(ValueError, match="hold 0 of 1 elements of x"):
        plan_reads({"w": parts}, {"x": whole(())})


def state() -> dict[str, torch.Tensor]:
    """Tensors of all dtypes, without dimensions, without elements, and not contiguous."""
    made = {f"model.{str(d).removeprefix('torch.')}": torch.arange(15).reshape(3, 5).to(d) for d in DTYPES}
    return {
        **made,
        "model.turned": torch.randn(4, 3).T,
        "model.empty": torch.ones(0, 4),
        "optimizer.w.step": torch.tensor(3.0),
        "optimizer.w.exp_avg": torch.randn(33, 7),
    }


@pytest.mark.parametrize("limit", [files.FILE_BYTES, 100])
def test_files_are_plain_safetensors_and_known_to_torch(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors and torch.distributed.checkpoint read what is written, whatever the number of files is."""
    monkeypatch.setattr(files, "FILE_BYTES", limit)
    monkeypatch.setattr(files, "_CHUNK", 7)
    saved = state()
    folder = CheckpointManager(folder=tmp_path).save(1, saved, {})
    manifest = read_manifest(folder)
    paths = sorted(folder.glob("*.safetensors"))
    assert (len(paths) > 1) == (limit == 100)
    assert manifest["files"] == {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in paths}
    assert find_damage(folder) is None
    found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    assert found.keys() == {n for n, t in saved.items() if t.numel()}
    for name, tensor in found.items():
        assert tensor.dtype == saved[name].dtype
        assert torch.equal(tensor, saved[name]), name
    theirs = {name: torch.zeros_like(saved[name]) for name in found}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(theirs, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(theirs[name], saved[name]) for name in theirs)
    ours = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    CheckpointManager(folder=tmp_path).load(folder, ours)
    assert all(torch.equal(ours[name], saved[name]) for name in saved)


def test_a_dtype_that_can_not_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't be written: model.c has the dtype torch.complex64"):
        CheckpointManager(folder=tmp_path).save(1, {"model.c": torch.ones(2, dtype=torch.complex64)}, {})
    assert list(tmp_path.iterdir()) == []


def format_2(folder: Path, content: dict[str, dict[str, tuple[torch.Tensor, list[int]]]]) -> Path:
    """Writes a checkpoint as earlier versions did: the offsets of the parts are in the headers of the files."""
    folder.mkdir()
    shapes: dict[str, list[int]] = {}
    for file, parts in content.items():
        offsets = {name: {"saved_offsets": first} for name, (_, first) in parts.items()}
        save_file(
            {name: tensor for name, (tensor, _) in parts.items()},
            folder / file,
            metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)},
        )
        for name, (tensor, first) in parts.items():
            ends = [a + n for a, n in zip(first, tensor.shape, strict=True)]
            shapes[name] = [max(a, b) for a, b in zip(shapes.get(name, ends), ends, strict=True)]
    sign(folder, {"format": 2, "step": 1, "tensors": shapes})
    return folder


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = {
        p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(folder.glob("*.safetensors"))
    }
    manifest["checksum"] = manifest_checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_checkpoints_of_format_2_are_read(tmp_path: Path) -> None:
    weight, step = torch.randn(5, 3), torch.tensor(4.0)
    folder = format_2(
        tmp_path / "step-00000001",
        {
            "shard-00001-model-00001-of-00001.safetensors": {"model.model.w": (weight[:3].clone(), [0, 0])},
            "shard-00002-model-00001-of-00001.safetensors": {
                "model.model.w": (weight[3:].clone(), [3, 0]),
                "optimizer.w.step": (step, []),
            },
        },
    )
    manager = CheckpointManager(folder=tmp_path)
    assert manager.latest() == folder
    live = {"model.model.w": torch.zeros(5, 3), "optimizer.w.step": torch.tensor(0.0)}
    manager.load(folder, live)
    assert torch.equal(live["model.model.w"], weight)
    assert live["optimizer.w.step"] == 4
    assert torch.equal(CheckpointTensors(folder).read("w"), weight)
    assert torch.equal(CheckpointTensors(folder).read("w", box=Box((2, 1), (2, 2))), weight[2:4, 1:3])


def test_what_torch_wrote_for_format_2_is_read(tmp_path: Path) -> None:
    saved = {name: tensor for name, tensor in state().items() if tensor.numel() and tensor.is_contiguous()}
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    numbers = {name: 1 + place % 2 for place, name in enumerate(saved)}
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(saved, storage_writer=writer, no_dist=True)
    sign(folder, {"format": 2, "step": 1, "tensors": {name: list(t.shape) for name, t in saved.items()}})
    assert len(read_manifest(folder)["files"]) == 2
    live = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    CheckpointManager(folder=tmp_path).load(folder, live)
    assert all(torch.equal(live[name], saved[name]) for name in saved)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return CheckpointManager(folder=tmp_path).save(1, {"model.w": torch.randn(4, 3), "model.b": torch.ones(4)}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("layouts"), "malformed"),
        (lambda m: m.pop("index"), "malformed"),
        (lambda m: m["index"].update({"model.w": 7}), "malformed"),
        (lambda m: m["index"].update({"model.w": "0"}), "malformed"),
        (lambda m: m["index"].update({"model.w": m["index"]["model.b"]}), "another number of dimensions"),
        (lambda m: m["layouts"][0][0].__setitem__(0, "../../other"), "not listed"),
        (lambda m: m["layouts"][0][0].__setitem__(1, [-1, 0]), "natural numbers"),
        (lambda m: m["layouts"][0][0].__setitem__(1, 3), "natural numbers"),
        (lambda m: m["layouts"][0].append(3), "malformed"),
    ],
)
def test_a_malformed_index_is_damage(folder: Path, change: Any, message: str) -> None:
    manifest = read_manifest(folder)
    change(manifest)
    sign(folder, manifest)
    assert message in str(find_damage(folder))
    with pytest.raises(CheckpointError, match=message):
        read_tensors(folder)


def test_an_index_that_contradicts_its_files_is_an_error(folder: Path) -> None:
    """A part of another shape must not be broadcast, and no element may be left out."""
    for lengths, message in (([1, 3], "hold 3 of 12"), ([4, 1], "hold 4 of 12")):
        manifest = read_manifest(folder)
        manifest["layouts"][manifest["index"]["model.w"]][0][2] = lengths
        sign(folder, manifest)
        with pytest.raises(CheckpointError, match=message):
            read_tensors(folder)
        manifest["tensors"]["model.w"] = lengths
        sign(folder, manifest)
        with pytest.raises(CheckpointError, match=r"holds model.w of shape \[4, 3\]"):
            read_tensors(folder)
        manifest["tensors"]["model.w"] = [4, 3]
        sign(folder, manifest)


def test_a_rank_that_can_not_read_is_reported_on_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = CheckpointManager(folder=folder.parent)
    live = {"model.w": torch.zeros(4, 3), "model.b": torch.zeros(4)}
    manifest = manager.verified(folder)
    monkeypatch.setattr(distributed, "gather_objects", lambda value, group=None: [value, "rank 1 can't read"])
    with pytest.raises(CheckpointError, match="rank 1 can't read"):
        manager.fill(folder, manifest, live)


def test_the_index_names_each_layout_once(folder: Path) -> None:
    parts = [[Part("a", Box((0, 0), (2, 3))), Part("b", Box((2, 0), (2, 3)))], [Part("b", whole(()))], []]
    index = {"x": parts[0], "y": list(parts[0]), "step": parts[1], "empty": parts[2]}
    stored = json.loads(json.dumps(to_json(index)))
    assert len(stored["layouts"]) == 3
    manifest = {
        "format": 3,
        "files": {"a": {}, "b": {}},
        "tensors": {"x": [4, 3], "y": [4, 3], "step": [], "empty": [0, 2]},
        **stored,
    }
    assert index_of(folder, manifest) == index
    assert TensorFiles(folder, index).read("empty", (0, 2)).shape == (0, 2)
