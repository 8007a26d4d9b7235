"""The sharding units of a model and the share of one of 64 ranks.

The tests run in one process, on the fake process group of torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import LLAMA, MakeConfig
from models_table import NEEDED
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from myllm_ray.accelerators.base import Accelerator
from myllm_ray.accelerators.fsdp import FSDPAccelerator
from myllm_ray.accelerators.sharding import OUTSIDE, largest_shard, local_bytes, placement
from myllm_ray.common import distributed
from myllm_ray.common.modules import outside_blocks, parameter_count, repeated_blocks
from myllm_ray.config import ConfigError
from myllm_ray.config.resolve import resolve
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.models.load import build_deferred
from myllm_ray.models.shrink import small_model
from myllm_ray.preparation import check_model

RANKS = 64
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
JAMBA = {
    "model_type": "jamba",
    **SIZES,
    "num_experts": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "use_mamba_kernels": False,
}
FEW: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4},
    "jamba": JAMBA,
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, "moe_intermediate_size": 128},
}


@pytest.fixture
def ranks() -> Iterator[None]:
    """Makes this process rank 0 of 64; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def deferred(config: dict[str, Any], kind: str = "causal_lm") -> nn.Module:
    return build_deferred(
        ModelSection(config=config, attention="eager" if config["model_type"] == "jamba" else "sdpa"),
        byte_tokenizer(),
        64,
        0,
        kind,
    )


def sharded(model: nn.Module, **options: Any) -> tuple[nn.Module, FSDPAccelerator]:
    """Returns a model that is sharded by FSDP on the meta device, and its accelerator."""
    model.__dict__.pop("_initial_values", None)
    accelerator = FSDPAccelerator({"accelerator": {"name": "fsdp", "options": options}})
    accelerator.device = torch.device("meta")
    accelerator._device_mesh = init_device_mesh("cpu", (RANKS,))
    return accelerator.wrap(model), accelerator


def check_sharded(model: nn.Module, blocks: list[nn.Module], accelerator: FSDPAccelerator, slack: float = 1.2) -> None:
    """Asserts that each block is a unit and that this rank holds its share of the parameters."""
    assert all(isinstance(block, FSDPModule) for block in blocks)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    held, expected = accelerator.parameter_bytes(model)
    assert held <= expected
    assert held <= slack * 4 * parameter_count([model]) / RANKS


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("name", [*FEW, "own_critic"])
def test_every_block_is_a_unit(name: str) -> None:
    """Regression: jamba has blocks of two classes, and the critic's trunk is a second list; neither was wrapped."""
    own = name == "own_critic"
    model = deferred(FEW["llama" if own else name], "actor_own_critic" if own else "causal_lm")
    blocks = repeated_blocks(model)
    assert len(blocks) == (8 if own else 4)
    assert len({type(block) for block in blocks}) == (2 if name == "jamba" else 1)
    check_sharded(*(lambda m, a: (m, blocks, a))(*sharded(model)))


HYBRIDS = [
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "gemma3n_text",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "olmo_hybrid",
    "qwen3_5_text",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "xlstm",
    "zamba",
    "zamba2",
]
"""Architectures with recurrent, convolutional or linear-attention layers."""
USUAL = ("qwen3_next", "zamba2")


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("kind", ["actor_critic", "actor_own_critic"])
@pytest.mark.parametrize("name", [n if n in USUAL else pytest.param(n, marks=pytest.mark.slow) for n in HYBRIDS])
def test_hybrid_architectures_are_wrapped_by_block(name: str, kind: str) -> None:
    """With a critic too, all layers are units, and little but embeddings and head is gathered with the root."""
    section = small_model(ModelSection(config={"model_type": name, **NEEDED.get(name, {})}, attention="eager"))
    # Random weights of some architectures are created with the model.
    model = build_deferred(section, byte_tokenizer(), 32, 0, kind).to("meta")
    blocks = repeated_blocks(model)
    sharded(model)
    assert len(blocks) >= (4 if kind == "actor_own_critic" else 2)
    assert all(isinstance(block, FSDPModule) for block in blocks)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    outside, total = outside_blocks(model, blocks)
    assert outside <= OUTSIDE * total


@pytest.mark.usefixtures("ranks")
def test_stacked_experts_are_divided_evenly() -> None:
    """Four experts on 64 ranks: sharded along the first dimension, this rank would hold a whole expert."""
    model, _ = sharded(deferred(FEW["qwen3_moe"]))
    experts = [p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
    assert experts
    assert all(local_bytes(p) == 4 * p.numel() // RANKS for p in experts)


@pytest.mark.usefixtures("ranks")
def test_blocks_that_share_parameters_are_one_unit() -> None:
    class Block(nn.Module):
        def __init__(self, shared: nn.Linear):
            super().__init__()
            self.own, self.shared = nn.Linear(128, 128), nn.Linear(128, 128)
            self.shared.weight = shared.weight

    with torch.device("meta"):
        model, shared = nn.Module(), nn.Linear(128, 128)
        model.layers = nn.ModuleList(Block(shared) for _ in range(3))
    wrapped, accelerator = sharded(model)
    check_sharded(wrapped, list(model.layers), accelerator)  # type: ignore[arg-type]
    assert len({id(b.shared.weight) for b in model.layers}) == 1  # type: ignore[union-attr]


class Unlisted(nn.Module):
    """A model with most of its parameters in attributes instead of a list of repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Sequential(nn.Linear(64, 64), nn.Tanh()),
            nn.Sequential(nn.Linear(64, 64), nn.Tanh()),
        )
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))


@pytest.mark.usefixtures("ranks")
def test_a_model_that_would_be_gathered_whole_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"98% of the parameters of Unlisted \(8,320, .*transformer_layer_cls_to_wrap, or set it to \[\]",
    ):
        sharded(Unlisted())
    with pytest.raises(ConfigError, match=r"transformer_layer_cls_to_wrap: Unlisted has no module of class Block"):
        sharded(Unlisted(), transformer_layer_cls_to_wrap=["Block"])
    with torch.device("meta"):
        model = Unlisted()
    named, _ = sharded(model, transformer_layer_cls_to_wrap=["Sequential"])
    assert isinstance(named.first, FSDPModule)
    sharded(torch.nn.Linear(64, 64, device="meta"), transformer_layer_cls_to_wrap=[])


def test_refused_before_anything_is_written(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from myllm_ray.data.prepare import prepare

    monkeypatch.setattr("myllm_ray.accelerators.sharding.repeated_blocks", lambda model: [])
    config = make_config("accelerator.name=fsdp")
    with pytest.raises(ConfigError, match="100% of the parameters of CausalLM"):
        check_model(config, prepare(config))


@pytest.mark.parametrize(
    ("shape", "shards", "dim", "largest"),
    [
        ((128, 64), 64, None, 128),
        ((100, 64), 64, None, 128),
        ((1, 64), 64, None, 64),
        ((64,), 64, None, 1),
        ((), 64, None, 1),
        ((16, 128, 256), 64, 2, 16 * 128 * 4),
        ((64, 128, 256), 64, None, 128 * 256),
        ((3, 5, 7), 64, None, 35),
    ],
)
def test_placement_and_its_largest_shard(shape: tuple[int, ...], shards: int, dim: int | None, largest: int) -> None:
    chosen = placement(shards)(nn.Parameter(torch.empty(shape, device="meta")))
    assert (None if chosen is None else chosen.dim) == dim
    assert largest_shard(shape, shards) == largest


def test_blocks_of_models_outside_transformers() -> None:
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())  # noqa: E731
    sequential = nn.Sequential(nn.Embedding(5, 4), block(), block(), nn.Linear(4, 5))
    assert repeated_blocks(sequential) == [sequential[1], sequential[2]]
    nested = nn.ModuleList([nn.ModuleList([block(), block()]), nn.ModuleList([block()])])
    assert repeated_blocks(nested) == [nested[0][0], nested[0][1], nested[1][0]]  # type: ignore[index]
    bare = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    assert repeated_blocks(nn.ModuleDict({"layers": bare})) == list(bare)
    beside = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)), "projections": bare}
    )
    assert repeated_blocks(beside) == list(beside["layers"])  # type: ignore[arg-type]
    assert repeated_blocks(nn.Linear(4, 4)) == []


@pytest.mark.parametrize(("name", "state"), [("AdamW", "fused"), ("Adam", "fused"), ("SGD", None)])
def test_optimizers_of_sharded_tensors_never_take_the_single_tensor_loop(name: str, state: str | None) -> None:
    """AdamW uses its fused kernel, and for SGD torch chooses the implementation.

    Regression: DTensors got `fused=False`, which selects torch's loop over single tensors.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def stepped(sharded: bool) -> tuple[torch.optim.Optimizer, torch.Tensor]:
            model = nn.Linear(7, 5)
            nn.init.constant_(model.weight, 0.5)
            if sharded:
                for key, p in list(model.named_parameters()):
                    setattr(model, key, nn.Parameter(distribute_tensor(p.detach(), mesh)))
            optimizer = OptimizerManager(model, {"optimizer": {"name": name, "lr": 0.1}}).build(model)
            for step in range(3):
                for p in model.parameters():
                    gradient = torch.linspace(-1, 1, p.numel()).view(p.shape).sin() * (step + 1)
                    p.grad = distribute_tensor(gradient, mesh) if sharded else gradient
                optimizer.step()
            weight = model.weight
            return optimizer, weight.full_tensor() if isinstance(weight, DTensor) else weight

        (optimizer, found), (_, expected) = stepped(True), stepped(False)
        assert optimizer.defaults["fused"] is (True if state else None)
        assert optimizer.defaults["foreach"] is None
        assert torch.equal(found, expected)
        if not state:
            model = nn.Linear(2, 2)
            model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
            with pytest.raises(ConfigError, match="SGD has no fused kernel for sharded tensors"):
                OptimizerManager(model, {"optimizer": {"name": "sgd", "lr": 0.1, "fused": True}}).build(model)
    finally:
        dist.destroy_process_group()


def test_fused_false_leaves_the_choice_to_torch() -> None:
    model = nn.Linear(2, 2)
    optimizer = OptimizerManager(model, {"optimizer": {"name": "adamw", "lr": 0.1, "fused": False}}).build(model)
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (None, None)


@pytest.mark.parametrize("given", [None, 123.0])
def test_the_timeout_of_a_process_group(given: float | None) -> None:
    """The default is two hours.

    torch's defaults are half an hour for gloo and ten minutes for NCCL; checking a large checkpoint on rank 0 can
    take longer.
    """
    config = {"accelerator": {"name": "ddp"}, **({"scaling": {"timeout_seconds": given}} if given else {})}
    accelerator: Accelerator = resolve("accelerators", "ddp", "accelerator.name")(config)
    accelerator.setup()
    try:
        timeout = distributed.timeout()
        assert timeout is not None
        assert timeout.total_seconds() == (given or 7200)
    finally:
        accelerator.close()


def test_a_frozen_model_in_half_precision_keeps_what_autocast_keeps() -> None:
    """Weights that autocast would cast at every use are kept in bf16: the same results with half of the memory.

    Embeddings, norms and biases stay in fp32.
    """
    for config in (LLAMA, {**LLAMA, "tie_word_embeddings": False}, FEW["gpt2"]):
        accelerator: Accelerator = resolve("accelerators", "single", "x")(
            {"accelerator": {"name": "single", "precision": "bf16"}}
        )
        accelerator.setup()
        trained = deferred(config)
        trained = accelerator.prepare(
            trained, OptimizerManager(trained, {}).build, SchedulerManager(config={"max_steps": 1}).build
        ).eval()
        frozen = accelerator.prepare_frozen(deferred(config))
        dtypes = {
            p.dtype
            for name, p in frozen.named_parameters()
            if "norm" in name or "ln_" in name or "embed" in name or "wte" in name
        }
        assert dtypes == {torch.float32}
        assert sum(p.numel() for p in frozen.parameters() if p.dtype == torch.bfloat16) > 0.5 * parameter_count(
            [frozen]
        )
        ids = torch.arange(64)[None]
        with torch.no_grad(), accelerator.autocast():
            assert torch.equal(frozen(input_ids=ids, labels=ids).nll, trained(input_ids=ids, labels=ids).nll)


@pytest.mark.slow
@pytest.mark.usefixtures("ranks")
def test_every_causal_lm_of_transformers_is_sharded() -> None:
    """Shards every model at the sizes of its default config, on the meta device.

    Models that can't be built without settings or packages are skipped.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wrong, done = {}, 0
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name), dtype=torch.float32)
        except Exception:  # the default config is not a valid model, or a package is not installed
            continue
        done += 1
        try:
            blocks = repeated_blocks(model)
            check_sharded(*(lambda m, a, b=blocks: (m, b, a))(*sharded(model)))
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {str(error)[:200]}"
    assert wrong == {}
    assert done > 150
