"""`model.attention`: attention within the documents of packed rows equals separate documents, or is refused."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from myllm_ray.accelerators.memory import save_memory
from myllm_ray.common.types import IGNORE, Isolation, Micro, Samples
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import AcceleratorSection, ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.model_checks import check_attention, document_kernel, isolation_of
from myllm_ray.models import attention, isolation
from myllm_ray.models.isolation import probe_isolation
from myllm_ray.models.load import build_model
from myllm_ray.models.shrink import small_model, without_dropout
from myllm_ray.ops import documents
from myllm_ray.ops.documents import Documents, chosen_kernel, document_lengths, pays_off
from myllm_ray.ops.pairs import answers, shared_prompt_mask
from myllm_ray.ops.rollouts import packed_answers, training_rows
from myllm_ray.ops.segments import restarting_positions
from myllm_ray.preparation import absolute, prepare_data
from myllm_ray.trainers.causal_lm import CausalLMTrainer, token_losses
from myllm_ray.trainers.scoring import score_tokens
from myllm_ray.worker import run_local

ACCEPTED = ("llama", "qwen3", "gemma3_text", "mistral", "gpt2", "phi3", "olmo2", "qwen3_moe", "mixtral", "gpt_neox")
REFUSED = {
    "gemma2": "the attention of the model can't be replaced",  # soft-capped scores: not `sdpa` in transformers
    "gpt_oss": "the attention of the model can't be replaced",  # sinks
    "gpt_neo": "the attention of the model can't be replaced",  # its own code
    "falcon": "the attention of the model can't be replaced",  # its own code, depends on the name
    "llama4_text": "documents in one row see each other",  # chunked attention: layers know only the mask
    "mamba": "the attention of the model can't be replaced",
}
KERNELS = ("per_document", "flex", "flash2", "flash3")
ROWS = ((19, 11, 1, 5), (26, 14))
"""Lengths of the documents of each row of 40 tokens; the first row ends with padding. The windows have 8 tokens."""


def model_of(model_type: str, choice: Any = "per_document") -> Any:
    """Returns a small model with all kinds of layers, and with random weights that are not small."""
    section = ModelSection(config={"model_type": model_type}, attention=choice)
    model = build_model(isolation._small_section(section, 10_000), isolation._NoTokenizer(), 40, 0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.router_loss_weight = 0.0  # a loss of rows, not of documents
    return model.train()


def texts(seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randint(1, 32, (n,), generator=generator) for n in row] for row in ROWS]


def micro_of(rows: list[list[Tensor]], width: int = 40) -> Micro:
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), IGNORE)
    positions = [torch.from_numpy(restarting_positions([len(d) for d in row], width)).long() for row in rows]
    for i, row in enumerate(rows):
        joined = torch.cat(row)
        ids[i, : len(joined)] = labels[i, : len(joined)] = joined
    positions_ids = torch.stack(positions)
    labels[positions_ids == 0] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": positions_ids}


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-5 * scale, name


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the calls of the kernel, as the number of rows of each."""
    made: list[int] = []
    kernel = attention._per_document

    def counted(query: Tensor, *others: Any) -> Tensor:
        made.append(len(query))
        return kernel(query, *others)

    monkeypatch.setattr(attention, "_per_document", counted)
    return made


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("model_type", ACCEPTED)
def test_packed_rows_equal_separate_documents(
    model_type: str, checkpointing: Any, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches before one backward pass: each recomputation needs the boundaries of its own layout."""
    model = model_of(model_type)
    alone = [micro_of([[d]], len(d)) for seed in (0, 1) for row in texts(seed) for d in row if len(d) > 1]
    expected_loss = sum(token_losses(model, micro).nll_sum for micro in alone)
    expected = gradients(expected_loss, model)  # type: ignore[arg-type]
    assert not calls

    save_memory(model, AcceleratorSection(activation_checkpointing=checkpointing))
    trainer = CausalLMTrainer(model)
    trainer.document_kernel = "per_document"
    masks = AttentionMaskInterface._global_mapping
    monkeypatch.setitem(masks, attention.NAME, lambda **_: pytest.fail("a mask was built"))
    first, second = (trainer.prepare_micro(micro) for micro in (micro_of(texts(0)), micro_of(texts(1)[::-1])))
    assert first["document_lengths"].tolist() == [[19, 11, 1, 5, 4], [26, 14, 0, 0, 0]]
    loss = trainer.train_step(first).loss_sum + trainer.train_step(second).loss_sum
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-5)  # type: ignore[union-attr]
    assert_same(gradients(loss, model), expected)
    layers = model.config.get_text_config().num_hidden_layers
    assert calls == [2] * 2 * layers * (2 if checkpointing == "full" else 1)


@pytest.mark.parametrize("model_type", ACCEPTED)
def test_the_probe_accepts(model_type: str) -> None:
    for choice in ("auto", "per_document"):
        section = ModelSection(config={"model_type": model_type}, attention=choice)  # type: ignore[arg-type]
        found = probe_isolation(section)
        assert (found.isolated, found.boundaries, found.boundaries_reason) == (True, True, "")
        assert found.leak < 1e-5


@pytest.mark.parametrize("model_type", REFUSED)
def test_the_probe_refuses(model_type: str) -> None:
    """`auto` then trains with a mask, or without packing."""
    found = probe_isolation(ModelSection(config={"model_type": model_type}))
    assert not found.boundaries
    assert REFUSED[model_type] in found.boundaries_reason
    assert found.isolated is not None, found


def test_the_window_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without the window of a layer is found by the probe."""
    kernel = attention._per_document
    monkeypatch.setattr(attention, "_per_document", lambda q, k, v, d, scale, window: kernel(q, k, v, d, scale, None))
    found = probe_isolation(ModelSection(config={"model_type": "gemma3_text"}))
    assert (found.isolated, found.boundaries) == (True, False)


@pytest.mark.parametrize("others", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}])
def test_the_kernel_refuses_what_it_does_not_compute(others: dict[str, Any]) -> None:
    given = torch.randn(1, 2, 8, 4)
    rows = Documents(torch.tensor([[3, 5]]), "per_document")
    empty = attention.document_inputs(rows, torch.zeros(1, 8))["attention_mask"]
    assert attention.attention(nn.Module(), given, given, given, empty, documents=rows)[0].shape == (1, 8, 2, 4)
    with pytest.raises(ValueError, match="does not support"):
        attention.attention(nn.Module(), given, given, given, empty, documents=rows, **others)
    with pytest.raises(ValueError, match="does not support dropout"):
        attention.attention(nn.Module(), given, given, given, empty, dropout=0.1, documents=rows)
    with pytest.raises(ValueError, match="does not support a mask"):
        attention.attention(nn.Module(), given, given, given, None, documents=rows)
    wrong = Documents(torch.tensor([[3, 4]]), "per_document")
    with pytest.raises(ValueError, match="do not fit rows of 8 tokens"):
        attention.attention(nn.Module(), given, given, given, empty, documents=wrong)


def test_boundaries_are_those_of_transformers() -> None:
    """Also for positions that repeat, as the padding of rows in memory, and that begin after 0."""
    from transformers.masking_utils import find_packed_sequence_indices

    for positions in ([[0, 1, 2, 0, 1, 0, 0, 0]], [[5, 6, 7, 8], [0, 1, 0, 1]], [[0, 1, 2], [0, 1, 2]], [[0], [0]]):
        given = torch.tensor(positions)
        lengths = document_lengths(given)
        found = find_packed_sequence_indices(given)
        numbers = torch.zeros_like(given) if found is None else found
        assert [[n for n in row if n] for row in lengths.tolist()] == [
            row.unique_consecutive(return_counts=True)[1].tolist() for row in numbers
        ]


def test_auto_depends_on_the_layout_of_the_rows() -> None:
    def layout(*rows: list[int]) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    ten = layout([200] * 10 + [48])
    assert pays_off(ten)
    assert chosen_kernel("auto", ten) == "per_document"
    assert chosen_kernel(None, ten) is None
    assert not pays_off(layout([2048])), "one document"
    assert not pays_off(layout([2000, 48])), "nearly one document"
    assert not pays_off(layout([100] * 10)), "short rows"
    assert not pays_off(layout([8] * 256)), "many calls"
    assert pays_off(layout([1024], [64] * 16)), "all rows of the micro-batch count"
    assert not pays_off(layout([1024], [1024], [1024], [512, 512]))
    assert chosen_kernel("per_document", layout([4, 4])) == "per_document"


def test_rows_for_which_it_does_not_pay_off_have_the_bits_of_sdpa() -> None:
    found = []
    for choice in ("auto", "sdpa"):
        trainer = CausalLMTrainer(model_of("llama", choice))
        trainer.document_kernel = "auto" if choice == "auto" else None
        output = trainer.train_step(trainer.prepare_micro(micro_of(texts())))
        found.append(gradients(output.loss_sum, trainer.model) | {"loss": output.loss_sum.detach()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_packed_rollouts(calls: list[int]) -> None:
    """Answers that share rows: the lengths that the host knows are those of the position ids."""
    model = model_of("llama")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 32, (4, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]
    lengths = torch.tensor([7, 2, 9, 4, 0, 3, 8, 8])
    tokens = torch.randint(1, 32, (8, 9), generator=generator)
    rows = training_rows(prompts, mask, Samples(tokens, lengths, lengths > 3))
    inputs, scored = packed_answers(rows)
    assert torch.equal(inputs["document_lengths"], document_lengths(inputs["position_ids"]))
    within = Documents(inputs["document_lengths"], "per_document")
    given = (model, inputs, scored.predictors, scored.targets)
    found, expected = score_tokens(*given, documents=within).log_probs, score_tokens(*given).log_probs
    assert calls
    assert torch.allclose(found, expected, atol=1e-5)
    assert_same(gradients(found.sum(), model), gradients(expected.sum(), model))


def test_a_shared_prompt_keeps_its_mask() -> None:
    """The two answers of a preference: the mask of the row is that of `sdpa`, bit for bit."""
    segments = torch.tensor([[0] * 5 + [1] * 4 + [2] * 6 + [-1]])
    ids = torch.randint(1, 32, segments.shape, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(9), *range(5, 11), 0]])
    flat = answers(ids, segments)
    found = []
    for choice in ("auto", "sdpa"):
        inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": shared_prompt_mask(segments)}
        found.append(score_tokens(model_of("llama", choice), inputs, flat.predictors, flat.targets).log_probs)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("accelerator.compile=blocks",), "accelerator.compile=blocks would compile each layout"),
        (("model.config={model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2}",), "model.config.attn_pdrop is 0.1"),
        (("model.config={model_type: gemma2}",), "the attention of the model can't be replaced"),
        (("model.config={model_type: mamba}",), "the attention of the model can't be replaced"),
        (("trainer=dpo", "data.train.format=preference"), "trainer dpo has one example per row"),
        (("trainer=reward", "data.train.format=preference"), "trainer reward has one example per row"),
        (
            ("trainer=grpo", "data.train.format=prompt", "grpo={reward: 'helpers:variety'}", "data.packing=false"),
            "trainer grpo has one example per row",
        ),
        (("model={factory: 'helpers:factory'}",), "a model from model.factory computes its own attention"),
    ],
)
@pytest.mark.parametrize("kernel", ["per_document", "flash2"])
def test_combinations_that_are_refused(
    make_config: MakeConfig, kernel: str, overrides: tuple[str, ...], why: str
) -> None:
    """One line before anything is written; `auto` accepts each of them, and uses a mask."""
    known = Isolation(True, "", boundaries=True) if "factory" in overrides[0] else None
    config = make_config(*overrides)
    found = known or isolation_of(absolute(config))
    assert document_kernel(config, found, torch.device("cpu")) is None
    config = make_config(*overrides, f"model.attention={kernel}")
    with pytest.raises(ConfigError, match=rf"^model\.attention: {kernel} can't be used: ") as refused:
        check_attention(config, known or isolation_of(absolute(config)))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kernel", KERNELS[1:])
def test_kernels_of_gpus_are_refused_elsewhere(make_config: MakeConfig, kernel: str) -> None:
    config = absolute(make_config(f"model.attention={kernel}", "accelerator.device=cpu"))
    with pytest.raises(ConfigError, match=rf"^model\.attention: {kernel} can't be used: it needs a CUDA device; use"):
        prepare_data(config)
    with pytest.raises(ConfigError, match=r"needs a CUDA device, this rank has cpu"):
        document_kernel(config, Isolation(True, "", boundaries=True), torch.device("cpu"))
    on_gpus = make_config(
        f"model.attention={kernel}", "scaling={workers: 2, gpus_per_worker: 1}", "accelerator.name=ddp"
    )
    if kernel != "flex":
        with pytest.raises(ConfigError, match=r"it has no fp32: set accelerator\.precision=bf16"):
            prepare_data(absolute(on_gpus))


@pytest.mark.parametrize("choice", ["auto", "sdpa", "eager", "per_document"])
def test_the_kernel_of_a_config(make_config: MakeConfig, choice: str) -> None:
    assert {*KERNELS, "auto", "sdpa", "eager"} == {*get_args(ModelSection.model_fields["attention"].annotation)}
    config = absolute(make_config(f"model.attention={choice}"))
    kernel = document_kernel(config, prepare_data(config).isolation, torch.device("cpu"))
    assert kernel == (None if choice in ("sdpa", "eager") else choice)
    assert document_kernel(config, None, torch.device("cpu")) is None
    on_gpu = document_kernel(config, isolation_of(config), torch.device("cuda"))
    assert on_gpu == kernel, "fp32 has no FlashAttention"


def test_the_default_is_eager_where_transformers_has_no_sdpa() -> None:
    assert build_model(small_model(ModelSection(config={"model_type": "mamba"})), byte_tokenizer(), 16, 0)
    gemma: Any = build_model(small_model(ModelSection(config={"model_type": "gemma2"})), byte_tokenizer(), 16, 0)
    assert gemma.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"the architecture has no model\.attention: sdpa; use eager"):
        build_model(
            small_model(ModelSection(config={"model_type": "gemma2"}, attention="sdpa")), byte_tokenizer(), 16, 0
        )


def test_the_name_of_the_implementation_is_not_saved() -> None:
    model: Any = build_model(ModelSection(config=LLAMA), byte_tokenizer(), 16, 0)
    assert model.config._attn_implementation == attention.NAME
    assert attention.NAME not in model.config.to_json_string()


def test_a_run_is_the_run_with_a_mask(
    make_config: MakeConfig, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training and evaluation; `auto` chooses the kernel for wide rows."""
    monkeypatch.setattr(documents, "LEAST_WIDTH", 64)
    found = {}
    for choice in ("sdpa", "per_document", "auto"):
        calls.clear()
        run = run_local(make_config(f"model.attention={choice}", f"run.name={choice}", "evaluation.every_steps=3"))
        found[choice] = comparable(run["folder"])
        assert bool(calls) == (choice != "sdpa")
    for choice in ("per_document", "auto"):
        for row, other in zip(found[choice], found["sdpa"], strict=True):
            for name in ("loss", "grad_norm", "validation_loss"):
                assert (name in row) == (name in other)
                assert row.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=1e-4), name
    assert any("validation_loss" in row for row in found["auto"])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_every_backend(make_config: MakeConfig, trainer: str) -> None:
    """Two processes with activation checkpointing have the losses of one process with a mask."""
    overrides = ["run.max_steps=2", "data.validation=null", "batch.micro_size=1"]
    if trainer == "grpo":
        prompts = "data.train={source: brackets, format: prompt, limit: 30}"
        overrides += ["trainer=grpo", "grpo={reward: 'helpers:variety', group_size: 4}", prompts]
        overrides += ["data.sequence_length=32", "rollout.max_new_tokens=8"]

    def config(name: str, backend: str, *more: str) -> Any:
        return make_config(*overrides, *BACKENDS[backend], f"run.name={name}", *more)

    (expected,) = run_all(1, [config("mask", "single", "model.attention=sdpa")])
    more = ("model.attention=per_document", "accelerator.activation_checkpointing=full")
    for run in run_all(2, [config(name, name, *more) for name in BACKENDS if name != "single"]):
        for row, other in zip(comparable(run), comparable(expected), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5), run.name


def test_dropout_of_other_kinds_is_no_obstacle(make_config: MakeConfig) -> None:
    gpt2 = "{model_type: gpt2, n_embd: 32, n_layer: 2, n_head: 2, attn_pdrop: 0.0, resid_pdrop: 0.1}"
    config = absolute(make_config(f"model.config={gpt2}", "model.attention=per_document"))
    assert prepare_data(config).isolation is not None
    assert without_dropout(config.model)[1]
