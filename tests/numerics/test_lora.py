"""LoRA: trained parameters, initial values, export, and the base model as the reference of DPO."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import LLAMA, MakeConfig, comparable
from spawned import BACKENDS, run_all
from transformers import AutoModelForCausalLM

from myllm_ray.common.modules import adapters_off
from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.checkpointing.manager import read_tensors
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model
from myllm_ray.trained_model import open_run

LORA = "model.lora={rank: 4, alpha: 8}"
DPO = (
    "trainer=dpo",
    "dpo={beta: 0.5, reference: adapter_off}",
    "data.train={source: brackets, format: preference}",
    "data.validation=null",
    "data.sequence_length=32",
    "optimizer.lr=1e-2",
    "run.max_steps=5",
)


def test_adapters_change_nothing_at_first() -> None:
    plain = build_model(ModelSection(config=dict(LLAMA)), byte_tokenizer(), 64, 3)
    adapted = build_model(
        ModelSection.model_validate({"config": dict(LLAMA), "lora": {"rank": 4}}), byte_tokenizer(), 64, 3
    )
    ids = torch.arange(20).view(2, 10)
    assert torch.equal(adapted(input_ids=ids, labels=ids).nll, plain(input_ids=ids, labels=ids).nll)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert len(trained) == 2 * 7 * LLAMA["num_hidden_layers"]
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    assert not torch.equal(adapted(input_ids=ids, labels=ids).nll, plain(input_ids=ids, labels=ids).nll)
    with adapters_off(adapted):
        assert torch.equal(adapted(input_ids=ids, labels=ids).nll, plain(input_ids=ids, labels=ids).nll)


@pytest.mark.promise
def test_the_base_is_the_reference(make_config: MakeConfig) -> None:
    """The run equals one with a frozen copy as reference, also on DDP and FSDP; the base stays unchanged."""
    with_copy, switched = run_all(
        1,
        [make_config("run.name=copy", LORA, *DPO, "dpo.reference=copy"), make_config("run.name=switched", LORA, *DPO)],
    )
    assert comparable(switched) == comparable(with_copy)
    assert comparable(switched)[-1]["loss"] < comparable(switched)[0]["loss"]
    found = read_tensors(switched / "checkpoints" / "step-00000005")
    initial = dict(
        build_model(
            ModelSection.model_validate({"config": dict(LLAMA), "lora": {"rank": 4}}), byte_tokenizer(), 64, 0
        ).named_parameters()
    )
    trained = open_run(switched)[0]
    for name, value in initial.items():
        assert torch.equal(trained.get_parameter(name), value) == (not value.requires_grad), name
    assert {n for n in found if n.startswith("model.")} == {f"model.{n}" for n, p in initial.items() if p.requires_grad}
    for folder in run_all(
        2, [make_config(f"run.name={name}", LORA, *DPO, *BACKENDS[name]) for name in ("ddp", "fsdp")]
    ):
        for row, other in zip(comparable(folder), comparable(switched), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-4), folder.name


def test_export_merges(make_config: MakeConfig, tmp_path: Path) -> None:
    (folder,) = run_all(1, [make_config("run.name=lora", LORA, "run.max_steps=3", "optimizer.lr=1e-2")])
    model, tokenizer = open_run(folder)
    ids = torch.arange(20).view(2, 10)
    model.eval()
    with torch.no_grad():
        before = model.model(input_ids=ids).logits  # type: ignore[union-attr, operator]
        save_pretrained(model, tokenizer, tmp_path / "out")
        after = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_bad_input(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.reference=adapter_off needs adapters"):
        make_config(*DPO)
    section = ModelSection.model_validate({"config": dict(LLAMA), "lora": {"targets": ["nothing_like_it"]}})
    with pytest.raises(ConfigError, match=r"model\.lora\.targets"):
        build_model(section, byte_tokenizer(), 64, 0)
