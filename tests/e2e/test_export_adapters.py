"""Export of adapters whose base is quantized, or that come with modules trained in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, MakeConfig
from peft import PeftModel
from transformers import AutoModelForCausalLM

from myllm_ray.config import ConfigError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.load import build_model
from myllm_ray.runs.export import ExportOptions, export_run
from myllm_ray.trained_model import open_run
from myllm_ray.worker import run_local

ADAPTER = ExportOptions("adapter")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = {**LLAMA, "tie_word_embeddings": False}
    save_pretrained(build_model(ModelSection(config=model), byte_tokenizer(), 64, 0), byte_tokenizer(), tmp_path / "b")
    return tmp_path / "b"


def trained(make_config: MakeConfig, base: Path, **model: Any) -> Path:
    given = {"name": str(base), **model}
    short = ("run.max_steps=2", "optimizer.lr=1e-2", "data.validation=null")
    return Path(run_local(make_config(*short, model=given, tokenizer={"path": str(base)}))["folder"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # of PEFT
def test_modules_that_are_trained_in_full_are_in_the_adapter(
    make_config: MakeConfig, base: Path, tmp_path: Path
) -> None:
    run = trained(make_config, base, lora={"rank": 2, "modules_to_save": ["lm_head"]})
    assert export_run(run, tmp_path / "out", ADAPTER).verified == "logits"
    ids = torch.arange(12).view(1, 12)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))
    model: Any = open_run(run)[0]
    with torch.no_grad():
        found, expected = again.eval()(input_ids=ids).logits, model.model.eval()(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_quantized_base(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    run = trained(make_config, base, lora={"rank": 2}, quantize="nf4")
    with pytest.raises(ConfigError, match=r"--verify logits: the base of this run is quantized"):
        export_run(run, tmp_path / "out", ExportOptions("adapter", verify="logits"))
    assert export_run(run, tmp_path / "out", ADAPTER).verified == "tensors"
    assert export_run(run, tmp_path / "merged", ExportOptions("merged")).verified == "logits"
    assert export_run(run, tmp_path / "gguf", ExportOptions("gguf")).verified == "logits"


def test_pissa_has_no_adapter_for_its_base(make_config: MakeConfig, base: Path, tmp_path: Path) -> None:
    run = trained(make_config, base, lora={"rank": 2, "initialization": "pissa"})
    with pytest.raises(ConfigError, match=r"--to adapter: initialization: pissa changed the frozen weights too"):
        export_run(run, tmp_path / "out", ADAPTER)
    assert export_run(run, tmp_path / "merged", ExportOptions("merged")).verified == "logits"
    assert not (tmp_path / "out").exists()
