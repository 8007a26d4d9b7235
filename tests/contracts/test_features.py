"""The tables "what works with what" of docs/models.md: this test makes them, and compares them with the page.

make features    writes the tables
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LLAMA, ROOT, MakeConfig, comparable
from contracts.test_adapters import SHAPES
from spawned import BACKENDS, run_all

from myllm_ray.config import ConfigError, TrainerConfig, UserError
from myllm_ray.config.sections import ModelSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.models.export import save_pretrained
from myllm_ray.models.gguf import file as gguf_file
from myllm_ray.models.load import build_model
from myllm_ray.models.lora import merge_adapters
from myllm_ray.preparation import absolute, check_model, check_names, prepare_data
from myllm_ray.trained_model import open_trained

PAGE = ROOT / "docs" / "models.md"
COMMON = ("data.validation=null", "data.sequence_length=64", "batch.micro_size=1", "run.max_steps=2")
FEATURES: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "`lora`": ("model.lora={rank: 4}",),
    "`lora.rslora`": ("model.lora={rank: 4, rslora: true}",),
    "`lora.dora`": ("model.lora={rank: 4, dora: true}",),
    "`lora.initialization: pissa`": ("model.lora={rank: 4, initialization: pissa}",),
    "`lora.modules_to_save`": ("model.lora={rank: 4, modules_to_save: [embed_tokens, lm_head]}",),
    "`quantize: nf4`": ("model.lora={rank: 4}", "model.quantize=nf4"),
    "`quantize: nf4`, bf16": ("model.lora={rank: 4}", "model.quantize=nf4", "accelerator.precision=bf16"),
    "`freeze`": ("model.freeze=[embed_tokens]",),
    "`resize_vocabulary`": ("model.resize_vocabulary=true", "tokenizer.add_special_tokens=['<a>']"),
    "`optimizer.name: muon`": ("optimizer={name: muon, lr: 1e-3}",),
    "`optimizer.name: lion`": ("optimizer={name: lion, lr: 1e-4}",),
    "`optimizer.name: ademamix`": ("optimizer={name: ademamix, lr: 1e-3}",),
    "`ema`": ("ema={decay: 0.9}",),
    "`precision: bf16`": ("accelerator.precision=bf16",),
}
COLUMNS = list(BACKENDS)
LOOSE = {"`precision: bf16`": 2e-2, "`quantize: nf4`, bf16": 2e-2, "`optimizer.name: muon`": 1e-3}
"""Relative differences of losses that are rounding; others: 1e-4."""


def base(folder: Path, config: dict[str, Any]) -> Path:
    save_pretrained(build_model(ModelSection(config=config), byte_tokenizer(), 64, 0), byte_tokenizer(), folder)
    return folder


def refusal(config: TrainerConfig) -> str | None:
    """Returns why a config is refused before anything is written, or None."""
    try:
        config = absolute(config)
        check_names(config)
        check_model(config, prepare_data(config))
    except UserError as error:
        return str(error)
    return None


def table_of_backends(make_config: MakeConfig, folder: Path) -> list[str]:
    name = str(base(folder / "base", dict(LLAMA)))
    rows = []
    for number, (feature, overrides) in enumerate(FEATURES.items()):

        def config(backend: str, number: int = number, overrides: tuple[str, ...] = overrides) -> TrainerConfig:
            given = (*COMMON, *overrides, *BACKENDS[backend], f"run.name=f{number}-{backend}")
            return make_config(*given, model={"name": name}, tokenizer={"path": name})

        refused = {backend: refusal(config(backend)) for backend in COLUMNS}
        assert not any("\n" in line for line in refused.values() if line)
        accepted = [backend for backend in COLUMNS if refused[backend] is None]
        assert "single" in accepted, feature
        (single,) = run_all(1, [config("single")])
        expected = [row["loss"] for row in comparable(single)]
        for run in run_all(2, [config(backend) for backend in accepted if backend != "single"]):
            found = [row["loss"] for row in comparable(run)]
            assert found == pytest.approx(expected, rel=LOOSE.get(feature, 1e-4)), (feature, run.name)
        rows.append([feature, *("yes" if backend in accepted else "refused" for backend in COLUMNS)])
    return markdown(["", *COLUMNS], rows)


def table_of_architectures(make_config: MakeConfig, folder: Path) -> list[str]:
    """Trains two steps of each; the export of what was trained has the same logits."""
    rows = []
    kinds = {
        "`lora`": ("model.lora={rank: 4}",),
        "`quantize: nf4`": ("model.lora={rank: 4}", "model.quantize=nf4"),
        "`resize_vocabulary`": ("model.resize_vocabulary=true", "tokenizer.add_special_tokens=['<a>']"),
    }
    for shape, architecture in SHAPES.items():
        name = str(base(folder / shape, architecture))
        row = [f"`{architecture['model_type']}`"]
        for number, overrides in enumerate(kinds.values()):
            given = (*COMMON, *overrides, f"run.name={shape}-{number}")
            config = make_config(*given, model={"name": name}, tokenizer={"path": name})
            if refusal(config) is not None:
                row.append("refused")
                continue
            (run,) = run_all(1, [config])
            row.append("yes")
        opened = open_trained(run)
        inner: Any = opened.model.model
        merge_adapters(inner)
        try:
            gguf_file.check_gguf(opened.model, opened.tokenizer, opened.generation)
            path = folder / f"{shape}.gguf"
            gguf_file.write_gguf(inner, opened.tokenizer, path, opened.generation, torch.float32, shape)
            gguf_file.verify_gguf_logits(inner, path)
            row.append("yes")
        except ConfigError:
            row.append("refused")
        rows.append(row)
    return markdown(["`model_type`", *kinds, "`export --to gguf`"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["backends", "architectures"])
def test_the_tables_are_what_works(
    make_config: MakeConfig, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    made = {"backends": table_of_backends, "architectures": table_of_architectures}[kind](make_config, tmp_path)
    begin, end = f"<!-- table of {kind}: make features -->\n", f"<!-- end of {kind} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    shown, _, after = rest.partition(end)
    text = "\n".join(["", *made, "", ""])
    if request.config.getoption("--update-golden"):
        PAGE.write_text(before + begin + text + end + after)
    else:
        assert shown == text
