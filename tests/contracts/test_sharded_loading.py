"""Initial weights on several ranks of FSDP: each rank holds its part of the weights of one process, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import LLAMA
from spawned import leave, start_processes
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.common.materialize import source_of
from myllm_ray.common.tensor_files import box_of, part_of
from myllm_ray.config.sections import LoraSection, ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models import initialization
from myllm_ray.models.load import build_deferred, build_model

MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "vocab_size": 260}


def sections(folder: str) -> dict[str, ModelSection]:
    plain = {**LLAMA, "tie_word_embeddings": False}
    gpt2 = {"model_type": "gpt2", "n_embd": 40, "n_layer": 2, "n_head": 2}
    return {
        "adapters": ModelSection(config=plain, lora=LoraSection(rank=3, dora=True)),
        "pissa": ModelSection(config=gpt2, lora=LoraSection(rank=3, initialization="pissa")),
        "random": ModelSection(config=plain),
        "random experts": ModelSection(config=MIXTRAL),
        "folder": ModelSection(name=folder),
        "resized": ModelSection(name=folder, resize_vocabulary=True),
    }


def compare(section: ModelSection, config: dict[str, Any]) -> None:
    expected = dict(build_model(section, byte_tokenizer(), 64, 0).named_parameters())
    model = build_deferred(section, byte_tokenizer(), 64, 0)
    assert source_of(model) is not None
    accelerator = FSDPAccelerator(config)
    accelerator.setup()
    for name, shard in accelerator.wrap(model).named_parameters():
        assert isinstance(shard, DTensor)
        assert torch.equal(shard.to_local(), part_of(expected[name], box_of(shard))), name
        # The shards together are the whole: no part is held twice or left out.
        assert torch.equal(shard.full_tensor(), expected[name]), name


def process(rank: int, world: int, store: str, folder: str, replicas: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    initialization.DRAWN_IN_BLOCKS = 1
    for section in sections(folder).values():
        compare(section, {"accelerator": {"name": "fsdp", "options": {"replicas": replicas}}})
    leave()


@pytest.mark.parametrize(
    ("world", "replicas"), [(3, 1), pytest.param(4, 2, marks=pytest.mark.promise)], ids=["uneven", "hybrid"]
)
def test_shards_are_parts_of_the_same_weights(tmp_path: Path, world: int, replicas: int) -> None:
    """Random weights and those of a folder with separate experts, cut unevenly, and in groups of replicas."""
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**MIXTRAL)).save_pretrained(tmp_path / "folder")
    start_processes(process, (world, str(tmp_path / "store"), str(tmp_path / "folder"), replicas), world)
