"""The load-balancing loss of mixture-of-experts models, for every micro-batch size.

It is compared with the function of transformers and with slow loops.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import MakeConfig
from test_invariance import Recording, unequal_batch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from myllm_ray.common.types import IGNORE, Position, StepOutput
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.prepare import prepare
from myllm_ray.data.stream import LocalStream
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.models.load import build_model
from myllm_ray.models.routers import Routers, own_router_loss_weight
from myllm_ray.ops.load_balancing import load_balancing_loss, router_probabilities
from myllm_ray.preparation import check_model
from myllm_ray.trainers.base import BaseTrainer
from myllm_ray.trainers.sft import SFTTrainer

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **SIZES,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_shared_experts": 1,
    },
}


def model_of(kind: str, weight: float | None = None) -> Any:
    return build_model(ModelSection(config=MOE[kind], router_loss_weight=weight), byte_tokenizer(), 160, 0)


def test_even_load_costs_k_and_one_expert_costs_more() -> None:
    even = torch.full((8, 4), 0.25)
    experts = torch.tensor([[0, 1], [2, 3]] * 4)
    sequences, weights = torch.zeros(8, dtype=torch.long), torch.ones(1)
    loss, loads = load_balancing_loss(even, experts, sequences, weights)
    assert float(loss) == pytest.approx(2.0)
    assert loads.tolist() == [4, 4, 4, 4]
    certain = torch.tensor([[0.5, 0.5, 0, 0]]).expand(8, 4)
    assert float(load_balancing_loss(certain, torch.tensor([[0, 1]] * 8), sequences, weights)[0]) == pytest.approx(4.0)


def test_scores_become_probabilities() -> None:
    logits = torch.randn(5, 4)
    for scoring in ("softmax", "sigmoid", "sqrtsoftplus"):
        torch.testing.assert_close(router_probabilities(logits, scoring).sum(-1), torch.ones(5))
    with pytest.raises(ValueError, match="unknown expert scoring"):
        router_probabilities(logits, "guess")


def test_loss_of_a_sequence_is_that_of_transformers() -> None:
    """Compares weighted, padded sequences of different lengths with transformers' function, row by row."""
    model = model_of("mixtral", 0.5)
    ids = torch.randint(0, 200, (3, 12))
    lengths, weights = [12, 5, 1], torch.tensor([3.0, 2.0, 0.5])
    sequences = torch.tensor(
        [[row if place < length else -1 for place in range(12)] for row, length in enumerate(lengths)]
    )
    result = model(
        input_ids=ids,
        labels=ids,
        position_ids=torch.arange(12).expand(3, 12),
        sequences=sequences,
        sequence_weights=weights,
    )
    expected, loads = 0.0, torch.zeros(2, 4)
    for row, length in enumerate(lengths):
        logits = model.model(
            input_ids=ids[row : row + 1, :length], output_router_logits=True, use_cache=False
        ).router_logits
        for layer, gate in enumerate(logits):
            expected = expected + weights[row] * load_balancing_loss_func((gate,), 4, 2) / 2
            loads[layer] += torch.bincount(gate.topk(2).indices.flatten(), minlength=4)
    torch.testing.assert_close(result.router.loss_sum, expected, rtol=1e-6, atol=0)
    assert torch.equal(result.router.loads.float(), loads)
    wanted = torch.autograd.grad(expected, model.model.model.layers[1].mlp.gate.weight)[0]
    found = torch.autograd.grad(result.router.loss_sum, model.model.model.layers[1].mlp.gate.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)


def test_deepseek_scores_by_sigmoid_and_chooses_with_its_bias() -> None:
    model = model_of("deepseek_v3")
    gate = model.model.model.layers[1].mlp.gate
    gate.e_score_correction_bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0]))
    ids = torch.randint(0, 200, (1, 8))
    result = model(
        input_ids=ids, labels=ids, sequences=torch.zeros(1, 8, dtype=torch.long), sequence_weights=torch.ones(1)
    )
    assert model.routers.layers == [1], "the first layer is dense"
    assert result.router.loads.tolist() == [[8, 8, 0, 0]], "the bias decides, not the logits"
    scores = gate(model.model.model(ids, output_hidden_states=True).hidden_states[1])[0]
    assert scores.shape == (8, 4)
    assert model.routers.scoring[id(gate)] == "sigmoid"
    assert own_router_loss_weight(model.config) == 0.0
    assert not result.router.loss_sum.requires_grad, "without a weight the loss is only measured"


def test_weight_is_the_models_own_or_given_and_refused_without_routers() -> None:
    assert model_of("mixtral").router_loss_weight == pytest.approx(0.001)
    assert model_of("mixtral", 0.25).router_loss_weight == 0.25
    assert model_of("mixtral", 0.0).router_loss_weight == 0
    with pytest.raises(ConfigError, match=r"model\.router_loss_weight=0\.1: llama has no routers"):
        build_model(
            ModelSection(config={"model_type": "llama", **SIZES}, router_loss_weight=0.1), byte_tokenizer(), 160, 0
        )


def gradients(
    make_config: MakeConfig, kind: str, micro_size: int, *overrides: str
) -> tuple[dict[str, float], list[torch.Tensor]]:
    config = make_config(
        f"batch.micro_size={micro_size}",
        "data.packing=false",
        "optimizer.name=sgd",
        "model.router_loss_weight=0.5",
        *overrides,
        model={"config": MOE[kind]},
    )
    prepared = prepare(config)
    model = build_model(config.model, byte_tokenizer(), 160, 0)
    accelerator = Recording(config)
    engine = TrainerEngine(
        SFTTrainer(model),
        accelerator,
        OptimizerManager(model, config),
        config=config,
        stream=LocalStream(prepared.train, 0, 1),
    )
    engine.setup()
    _, sums = engine.training_step(unequal_batch(LocalStream(prepared.train, 0, 1)).micros)
    values = sums.reduce(accelerator)
    return {**values, **engine.trainer.derived_metrics(values)}, accelerator.seen


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_a_step_with_experts_does_not_depend_on_the_micro_batch_size(make_config: MakeConfig, kind: str) -> None:
    expected, wanted = gradients(make_config, kind, 8)
    assert expected["router_loss"] > 1.5
    assert expected["loss"] == pytest.approx(expected["lm_loss"] + 0.5 * expected["router_loss"], rel=1e-6)
    assert expected["perplexity"] == pytest.approx(float(torch.tensor(expected["lm_loss"]).exp()), rel=1e-5)
    assert expected["experts/layer_1/load_max"] >= 1 >= expected["experts/layer_1/load_min"]
    for micro_size in (1, 4):
        values, found = gradients(make_config, kind, micro_size)
        for name in (
            "loss",
            "lm_loss",
            "router_loss",
            "experts/load_max",
            "experts/layer_0/load_min",
            "experts/unused",
        ):
            assert values[name] == pytest.approx(expected[name], rel=1e-6), name
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_gradient_is_that_of_the_mean_over_target_tokens(make_config: MakeConfig) -> None:
    """Compares with plain autograd and transformers' function, row by row.

    The expected loss is the mean over target tokens of cross entropy + 0.5 × the row's balancing loss.
    """
    config = make_config("data.packing=false", model={"config": MOE["mixtral"]})
    prepared = prepare(config)
    model = build_model(config.model, byte_tokenizer(), 160, 0)
    total, count = torch.zeros(()), 0
    for micro in unequal_batch(LocalStream(prepared.train, 0, 1)).micros:
        for row in range(len(micro["input_ids"])):
            length = int((micro["source_ids"][row] >= 0).sum())
            output = model.model(
                input_ids=micro["input_ids"][row : row + 1, :length], use_cache=False, output_router_logits=True
            )
            targets = micro["labels"][row, 1:length]
            number = int((targets != IGNORE).sum())
            balance = sum(load_balancing_loss_func((gate,), 4, 2) for gate in output.router_logits) / 2
            total = (
                total
                + torch.nn.functional.cross_entropy(output.logits[0, :-1], targets, reduction="sum")
                + 0.5 * number * balance
            )
            count += number
    wanted = torch.autograd.grad(total / count, list(model.parameters()))
    values, found = gradients(make_config, "mixtral", 2)
    assert values["loss"] == pytest.approx(float(total.detach() / count), rel=1e-6)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "override", ["accelerator.activation_checkpointing=full", "accelerator.activation_checkpointing=1"]
)
def test_recomputed_activations_give_the_same_gradients(make_config: MakeConfig, override: str) -> None:
    (expected, wanted), (values, found) = (
        gradients(make_config, "mixtral", 4),
        gradients(make_config, "mixtral", 4, override),
    )
    assert values["router_loss"] == expected["router_loss"]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_evaluation_leaves_the_loss_of_the_routers_out(make_config: MakeConfig) -> None:
    config = make_config("data.packing=false", "model.router_loss_weight=0.5", model={"config": MOE["mixtral"]})
    prepared = prepare(config)
    trainer = SFTTrainer(build_model(config.model, byte_tokenizer(), 160, 0))
    micro = next(LocalStream(prepared.train, 0, 1).batches(Position(), 1)).micros[0]
    trained = trainer.train_step(micro)
    with torch.no_grad():
        held_out = trainer.evaluation_step(micro)
    assert (
        float(trained.loss_sum.detach())
        > float(held_out.loss_sum)
        == pytest.approx(float(held_out.metrics["lm_loss"][0]))
    )


def test_copies_of_a_model_keep_what_they_record_apart() -> None:
    model = model_of("mixtral").model.base_model
    routers = Routers([model, copy.deepcopy(model)])
    assert len(routers) == 4
    assert routers.layers == [0, 1]
    assert len({id(module) for _, module, _, _ in routers.routers}) == 4


class Unaware(BaseTrainer):
    """A custom trainer without support for routers."""

    def batch_weight(self, micro: Any) -> torch.Tensor:
        return torch.ones(())

    def train_step(self, micro: Any) -> StepOutput:
        return StepOutput(torch.zeros(()))


def test_a_trainer_that_would_leave_the_loss_out_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("myllm_ray.model_checks.log.warning", warned.append)
    config = make_config("trainer=test_routers:Unaware", model={"config": MOE["mixtral"]})
    with pytest.raises(ConfigError, match=r"router_loss_weight=0.001: trainer test_routers:Unaware does not train"):
        check_model(config, prepare(config))
    config = make_config("trainer=test_routers:Unaware", "model.router_loss_weight=0", model={"config": MOE["mixtral"]})
    check_model(config, prepare(config))
    assert not warned
    config = make_config(model={"config": MOE["deepseek_v3"]})
    check_model(config, prepare(config))
    assert "so its experts are not balanced" in warned[0]
