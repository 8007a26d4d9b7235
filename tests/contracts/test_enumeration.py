"""Every combination of settings in the schema trains the same run as its plain form, or is refused.

A refusal comes before anything is written. The values are read from the schema, so a new loss or reference in the
schema is enumerated here without a change.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig
from enumeration import TINY, Combination, check, compare, report, run, start, values
from spawned import BACKENDS
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config import validate
from myllm_ray.config.resolve import SHORT_NAMES
from myllm_ray.config.sections import AcceleratorSection
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.run_folder import folder_of
from myllm_ray.trainers.dpo import DPOTrainer
from myllm_ray.trainers.reward import RewardTrainer


def test_every_backend_of_the_schema_is_enumerated() -> None:
    assert {overrides[0].partition("=")[2] for overrides in BACKENDS.values()} == set(SHORT_NAMES["accelerators"])
    assert {f"deepspeed-{stage}" for stage in values(AcceleratorSection, "stage")} <= BACKENDS.keys()


REFERENCES = [
    *values(DPOTrainer.Config, "reference"),
    *(f"{value}, reference_model" for value in values(DPOTrainer.Config, "reference")),
]
COMBINATIONS = [
    Combination(*parts)
    for parts in itertools.product(
        values(DPOTrainer.Config, "loss"),
        REFERENCES,
        values(DPOTrainer.Config, "shared_prompt"),
        BACKENDS,
        (True, False),
    )
]
COMBINATIONS += [
    Combination("reward", "none", *parts)
    for parts in itertools.product(values(RewardTrainer.Config, "shared_prompt"), BACKENDS, (True, False))
]
"""Loss `reward` is the loss of the reward trainer, which has no reference."""


def test_preferences_in_one_process(
    make_config: MakeConfig, preference_files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A quick subset: losses of pairs, of single answers and without a reference, with every kind of reference."""
    part = [
        c
        for c in COMBINATIONS
        if c.backend == "single"
        and c.packing
        and c.shared_prompt == "auto"
        and c.loss in ("sigmoid", "kto", "simpo", "reward")
    ]
    trained, refused, wrong = check(make_config, preference_files, part, 1)
    report(capsys, "preferences, one process", trained, refused)
    assert wrong == []


def test_a_table_belongs_to_the_files_of_its_model(
    make_config: MakeConfig, preference_files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Another model in the same folder gets new log-probabilities, not the stored ones of the previous model."""
    folders = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=260)).save_pretrained(
            tmp_path / "reference"
        )
        for reference in ("precomputed", "copy"):
            combination = Combination("sigmoid", f"{reference}, reference_model", "auto", "single", True)
            job = start(
                make_config,
                preference_files,
                [*combination.overrides(tmp_path / "reference"), f"run.name={reference}-{seed}"],
            )
            assert not isinstance(job, str), job
            run([job])
            folders[reference, seed] = folder_of(validate(job[0]))
    for seed in (1, 2):
        assert list(compare(folders["precomputed", seed], folders["copy", seed])) == []
    assert list(compare(folders["copy", 1], folders["copy", 2]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.reference_model=/nowhere"], "dpo.reference_model: no folder '/nowhere'"),
        (
            ["dpo.reference_model=FOLDER/small"],
            "dpo.reference_model: the model has 100 token embeddings, the tokenizer 260 tokens",
        ),
        (
            ["dpo.reference_model=FOLDER/shifted"],
            "dpo.reference_model: FOLDER/shifted has a tokenizer with other ids for 256 tokens",
        ),
        (
            ["data.sequence_length=100", "dpo.reference_model=FOLDER/short"],
            "dpo.reference_model: data.sequence_length=100 exceeds the model's maximum of 64 positions",
        ),
        (
            ["data.validation.format=prompt_completion"],
            "data.validation.format gives tokens, data.train.format pairs: both must give the same",
        ),
        (["dpo.gamma=0.7"], "gamma belongs to the loss simpo; loss is sigmoid"),
        (["dpo.desirable_weight=2"], "desirable_weight belongs to the loss kto; loss is sigmoid"),
        (["dpo.loss=orpo", "dpo.reference=precomputed"], "orpo has no reference: leave reference=precomputed out"),
    ],
)
def test_references_that_do_not_fit_are_refused(
    make_config: MakeConfig, preference_files: tuple[Path, Path, Path], overrides: list[str], message: str
) -> None:
    folder = preference_files[2].parent
    for name, shape in {
        "small": {"vocab_size": 100},
        "shifted": {"vocab_size": 300},
        "short": {"vocab_size": 260, "max_position_embeddings": 64},
    }.items():
        if not (folder / name).exists():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, **shape)).save_pretrained(folder / name)
    if not (folder / "shifted" / "tokenizer.json").exists():
        shifted = byte_tokenizer()
        text = json.loads(shifted.backend_tokenizer.to_str())
        text["model"]["vocab"] = {
            token: (number + 1) % 256 if number < 256 else number for token, number in text["model"]["vocab"].items()
        }
        shifted._tokenizer = Tokenizer.from_str(json.dumps(text))
        shifted.save_pretrained(folder / "shifted")
    found = start(
        make_config,
        preference_files,
        [
            *Combination("sigmoid", "copy", "auto", "single", True).overrides(folder),
            *[o.replace("FOLDER", str(folder)) for o in overrides],
        ],
    )
    assert isinstance(found, str)
    assert message.replace("FOLDER", str(folder)) in found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loss", [*values(DPOTrainer.Config, "loss"), "reward"])
def test_preferences_everywhere(
    make_config: MakeConfig, preference_files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], loss: str
) -> None:
    trained, refused, wrong = check(make_config, preference_files, [c for c in COMBINATIONS if c.loss == loss], 2)
    report(capsys, f"preferences, {loss}", trained, refused)
    assert wrong == []
