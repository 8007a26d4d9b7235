"""Every combination of settings that the schema allows trains what its plain form trains, or is refused before anything is written.

The values come from the schema itself: a loss or a reference that is added there is enumerated here without a change.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import pytest
import torch
import torch.distributed as dist
from conftest import MakeConfig, comparable
from spawned import BACKENDS, leave, start_processes
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from myllm_ray.config import validate
from myllm_ray.config.errors import UserError
from myllm_ray.config.resolve import SHORT_NAMES
from myllm_ray.config.schema import AcceleratorSection, Section
from myllm_ray.config.trainers import DPOKnobs, GRPOKnobs, PPOKnobs, RewardKnobs
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.data.tokenizer import byte_tokenizer
from myllm_ray.engine.run_folder import claim, folder_of
from myllm_ray.worker import absolute, check_model, check_names, run_worker

TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": True}
TOLERANCE = 1e-5
Job = tuple[dict[str, Any], PreparedData]


def values(section: type[Section], name: str) -> list[Any]:
    """The values of a field of a section that has finitely many."""
    annotation = section.model_fields[name].annotation
    if annotation is bool:
        return [False, True]
    parts = [annotation] if get_origin(annotation) is Literal else get_args(annotation)
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


def test_every_backend_of_the_schema_is_enumerated() -> None:
    assert {overrides[0].partition("=")[2] for overrides in BACKENDS.values()} == set(SHORT_NAMES["accelerators"])
    assert {f"deepspeed-{stage}" for stage in values(AcceleratorSection, "stage")} <= BACKENDS.keys()


class Combination(NamedTuple):
    loss: str
    reference: str
    shared_prompt: str
    backend: str
    packing: bool

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)

    @property
    def plain(self) -> Combination:
        """What it must equal: one process, a copy of the reference as a model, each answer in a row of its own."""
        reference = {"precomputed": "copy", "precomputed, reference_model": "copy, reference_model", "adapter_off": "copy, lora"}.get(self.reference, self.reference)
        return Combination(self.loss, reference, "never", "single", True)

    def overrides(self, other: Path) -> list[str]:
        reference, _, extra = self.reference.partition(", ")
        if self.loss == "reward":
            return [*PREFERENCES, "trainer=reward", f"run.name={self.name}", f"reward={{shared_prompt: {self.shared_prompt}, centering: 0.01}}",
                    "data.train.format=preference", "data.validation.format=preference", f"data.packing={str(self.packing).lower()}", *BACKENDS[self.backend]]
        lora = reference == "adapter_off" or extra == "lora"
        return [*PREFERENCES, f"run.name={self.name.replace(', ', '-')}", f"dpo={{loss: {self.loss}, reference: {reference}, shared_prompt: {self.shared_prompt}, beta: 0.5}}",
                f"data.train.format={'unpaired' if self.loss == 'kto' else 'preference'}", f"data.validation.format={'unpaired' if self.loss == 'kto' else 'preference'}",
                f"data.packing={str(self.packing).lower()}", *BACKENDS[self.backend],
                *([f"dpo.reference_model={other}"] if extra == "reference_model" else []), *(["model.lora={rank: 2, alpha: 4}"] if lora else [])]


REFERENCES = [*values(DPOKnobs, "reference"), *(f"{value}, reference_model" for value in values(DPOKnobs, "reference"))]
COMBINATIONS = [Combination(*parts) for parts in itertools.product(
    values(DPOKnobs, "loss"), REFERENCES, values(DPOKnobs, "shared_prompt"), BACKENDS, (True, False))]
COMBINATIONS += [Combination("reward", "none", *parts) for parts in itertools.product(values(RewardKnobs, "shared_prompt"), BACKENDS, (True, False))]
"""`reward`: the loss of the reward trainer, which has no reference."""
PREFERENCES = ["trainer=dpo", "data.sequence_length=48", "batch={global_size: 4, micro_size: 1}", "run.max_steps=3", "optimizer={name: sgd, lr: 0.05}",
               "scheduler={name: constant}", "checkpoint.at_end=false", "gradient_clip=null"]


@pytest.fixture(scope="session")
def preference_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Training rows, which do not fill the last batch of an epoch; held-out rows; a reference model of its own."""
    folder = tmp_path_factory.mktemp("preferences")

    def rows(first: int, count: int) -> list[dict[str, Any]]:
        return [{"prompt": "say " + "abc"[i % 3] * (1 + i % 5), "chosen": "yes" * (1 + i % 3), "rejected": "n" * (1 + i % 4),
                 "completion": "yes no"[: 2 + i % 5], "label": bool(i % 3)} for i in range(first, first + count)]

    (folder / "train.json").write_text(json.dumps(rows(0, 7)))
    (folder / "held_out.json").write_text(json.dumps(rows(20, 5)))
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=260)).save_pretrained(folder / "other")
    return folder / "train.json", folder / "held_out.json", folder / "other"


def start(make_config: MakeConfig, files: tuple[Path, Path, Path], overrides: list[str]) -> Job | str:
    """A run up to its first step; or the message that refuses it, with nothing written."""
    train, held_out, _ = files
    raw: dict[str, Any] = {"model": {"config": TINY}, "data": {
        "train": {"path": str(train)}, "validation": {"path": str(held_out)}, "cache": str(train.parent / "cache")}}
    config, message = None, ""
    try:
        config = absolute(make_config(*overrides, **raw))
        check_names(config)
        prepared = prepare(config)
        check_model(config, prepared)
        claim(config, prepared.identity)
        return config.model_dump(mode="json"), prepared
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert config is None or not folder_of(config).exists(), "refused after something was written"
    return message


def run(jobs: list[Job]) -> None:
    """Each job in turn; one that fails leaves its error in its folder."""
    for raw, prepared in jobs:
        config = validate(raw)
        try:
            run_worker(config, prepared)
        except Exception as error:
            (folder_of(config) / f"failed-{os.environ.get('RANK', 0)}.txt").write_text(f"{type(error).__name__}: {error}")


def _process(rank: int, world: int, store: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60))
    run(jobs)
    leave()


def failures(folder: Path) -> list[str]:
    return [f"{folder.name}: {failure.read_text()[:300]}" for failure in sorted(folder.glob("failed-*.txt"))]


def compare(folder: Path, plain: Path) -> Iterator[str]:
    """What differs between two runs, in words."""
    if failed := failures(folder):
        yield from failed
        return
    found, wanted = comparable(folder), comparable(plain)
    if len(found) != len(wanted):
        yield f"{folder.name}: {len(found)} steps instead of {len(wanted)}"
    for row, other in zip(found, wanted, strict=False):
        for name in ("loss", "grad_norm", "tokens", *(n for n in other if n.startswith(("validation_", "rewards/")) and "calibration" not in n)):
            # Rewards are differences of large numbers: their own size says nothing about their rounding.
            if row.get(name) != pytest.approx(other[name], rel=TOLERANCE, abs=2e-5 if "rewards/" in name or "log_probs/" in name else 1e-6):
                yield f"{folder.name}: step {row['step']}: {name} {row.get(name)} instead of {other[name]}"


def check(make_config: MakeConfig, files: tuple[Path, Path, Path], combinations: list[Combination], world: int) -> tuple[int, dict[str, str], list[str]]:
    """(combinations trained, the message of each one refused, what is wrong)."""
    plains: dict[Combination, Path] = {}
    local: list[Job] = []
    shared: list[Job] = []
    trained: list[tuple[Combination, Path]] = []
    refused: dict[str, str] = {}
    for combination in combinations:
        job = start(make_config, files, combination.overrides(files[2]))
        if isinstance(job, str):
            refused[combination.name] = job
            continue
        (local if combination.backend == "single" else shared).append(job)
        trained.append((combination, folder_of(validate(job[0]))))
        if combination.plain not in plains:
            plain = start(make_config, files, [*combination.plain.overrides(files[2]), f"run.name=plain-{len(plains)}", "batch.micro_size=4"])
            assert not isinstance(plain, str), plain
            local.append(plain)
            plains[combination.plain] = folder_of(validate(plain[0]))
    run(local)
    if shared:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_process, (world, f"{folder}/store", shared), world)
    return len(trained), refused, [line for combination, folder in trained for line in compare(folder, plains[combination.plain])]


def report(capsys: pytest.CaptureFixture[str], what: str, trained: int, refused: dict[str, str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {trained} combinations trained, {len(refused)} refused")
        for message in sorted(set(refused.values())):
            print(f"  {sum(m == message for m in refused.values())}: {message}")


def test_preferences_in_one_process(make_config: MakeConfig, preference_files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A part that is quick: a loss of pairs, one of single answers, and one without a reference, with every reference."""
    part = [c for c in COMBINATIONS if c.backend == "single" and c.packing and c.shared_prompt == "auto" and c.loss in ("sigmoid", "kto", "simpo", "reward")]
    trained, refused, wrong = check(make_config, preference_files, part, 1)
    report(capsys, "preferences, one process", trained, refused)
    assert wrong == []


def test_a_table_belongs_to_the_files_of_its_model(make_config: MakeConfig, preference_files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Another model written to the same folder: its log-probabilities, not those of the one before."""
    folders = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=260)).save_pretrained(tmp_path / "reference")
        for reference in ("precomputed", "copy"):
            combination = Combination("sigmoid", f"{reference}, reference_model", "auto", "single", True)
            job = start(make_config, preference_files, [*combination.overrides(tmp_path / "reference"), f"run.name={reference}-{seed}"])
            assert not isinstance(job, str), job
            run([job])
            folders[reference, seed] = folder_of(validate(job[0]))
    for seed in (1, 2):
        assert list(compare(folders["precomputed", seed], folders["copy", seed])) == []
    assert list(compare(folders["copy", 1], folders["copy", 2]))


@pytest.mark.parametrize(("overrides", "message"), [
    (["dpo.reference_model=/nowhere"], "dpo.reference_model: no folder '/nowhere'"),
    (["dpo.reference_model=FOLDER/small"], "dpo.reference_model: the model has 100 token embeddings, the tokenizer 260 tokens"),
    (["dpo.reference_model=FOLDER/shifted"], "dpo.reference_model: FOLDER/shifted has a tokenizer that numbers 256 tokens in another way"),
    (["data.sequence_length=100", "dpo.reference_model=FOLDER/short"], "dpo.reference_model: data.sequence_length=100 is more than the 64 positions"),
    (["data.validation.format=prompt_completion"], "data.validation.format gives tokens, data.train.format pairs: both must give the same"),
    (["dpo.gamma=0.7"], "gamma belongs to the loss simpo; loss is sigmoid"),
    (["dpo.desirable_weight=2"], "desirable_weight belongs to the loss kto; loss is sigmoid"),
    (["dpo.loss=orpo", "dpo.reference=precomputed"], "orpo has no reference: leave reference=precomputed out")])
def test_references_that_do_not_fit_are_refused(make_config: MakeConfig, preference_files: tuple[Path, Path, Path], overrides: list[str], message: str) -> None:
    folder = preference_files[2].parent
    for name, shape in {"small": {"vocab_size": 100}, "shifted": {"vocab_size": 300}, "short": {"vocab_size": 260, "max_position_embeddings": 64}}.items():
        if not (folder / name).exists():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, **shape)).save_pretrained(folder / name)
    if not (folder / "shifted" / "tokenizer.json").exists():
        shifted = byte_tokenizer()
        text = json.loads(shifted.backend_tokenizer.to_str())
        text["model"]["vocab"] = {token: (number + 1) % 256 if number < 256 else number for token, number in text["model"]["vocab"].items()}
        shifted._tokenizer = Tokenizer.from_str(json.dumps(text))
        shifted.save_pretrained(folder / "shifted")
    found = start(make_config, preference_files, [*Combination("sigmoid", "copy", "auto", "single", True).overrides(folder), *[o.replace("FOLDER", str(folder)) for o in overrides]])
    assert isinstance(found, str)
    assert message.replace("FOLDER", str(folder)) in found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("loss", [*values(DPOKnobs, "loss"), "reward"])
def test_preferences_everywhere(make_config: MakeConfig, preference_files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], loss: str) -> None:
    trained, refused, wrong = check(make_config, preference_files, [c for c in COMBINATIONS if c.loss == loss], 2)
    report(capsys, f"preferences, {loss}", trained, refused)
    assert wrong == []


def options(section: type[Section]) -> list[dict[str, Any]]:
    """Every combination of the values of a trainer's settings that have finitely many, with one or two epochs and minibatches."""
    finite = {name: found for name in section.model_fields if (found := values(section, name))}
    names = [*finite, "epochs", "minibatches"]
    return [dict(zip(names, parts, strict=True)) for parts in itertools.product(*finite.values(), (1, 2), (1, 2))]


ROLLOUTS = ["data.sequence_length=32", "data.train.format=prompt", "data.validation.format=prompt", "batch={global_size: 4, micro_size: 1}", "optimizer={name: sgd, lr: 0.1}",
            "scheduler={name: constant}", "checkpoint.at_end=false", "gradient_clip=null", f"rollout={{max_new_tokens: 5, stop: {json.dumps(list('aeinorst'))}}}"]


def rollout_overrides(trainer: str, knobs: dict[str, Any], *further: str) -> list[str]:
    given = {"reward": ["helpers:variety"], "kl_weight": 0.05, **knobs, **({"group_size": 3} if trainer == "grpo" else {})}
    return [*ROLLOUTS, f"trainer={trainer}", f"{trainer}={json.dumps(given)}", f"run.max_steps={2 * knobs['epochs'] * knobs['minibatches']}", *further]


def check_rollouts(make_config: MakeConfig, files: tuple[Path, Path, Path], trainer: str, combinations: list[tuple[dict[str, Any], str]]) -> tuple[int, dict[str, str], list[str]]:
    """Each combination in one process, and on a backend with answers in forward passes of their own: the same run."""
    local: list[Job] = []
    shared: list[Job] = []
    pairs: list[tuple[Path, Path]] = []
    refused: dict[str, str] = {}
    for number, (knobs, backend) in enumerate(combinations):
        plain = start(make_config, files, rollout_overrides(trainer, knobs, f"run.name={trainer}-{number}-plain"))
        other = start(make_config, files, rollout_overrides(trainer, knobs, f"run.name={trainer}-{number}-{backend}", "rollout.micro_size=1", *BACKENDS[backend]))
        if isinstance(plain, str) or isinstance(other, str):
            refused[f"{knobs}"] = plain if isinstance(plain, str) else str(other)
            continue
        local.append(plain)
        (local if backend == "single" else shared).append(other)
        pairs.append((folder_of(validate(other[0])), folder_of(validate(plain[0]))))
    run(local)
    if shared:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_process, (2, f"{folder}/store", shared), 2)
    return len(pairs), refused, [line for other, plain in pairs for line in (*failures(plain), *compare(other, plain))]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize(("trainer", "section"), [("ppo", PPOKnobs), ("grpo", GRPOKnobs)])
def test_rollouts_everywhere(make_config: MakeConfig, preference_files: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str], trainer: str,
                             section: type[Section], part: int) -> None:
    """Backends take turns: each value of each setting meets each of them."""
    names = list(BACKENDS)
    chosen = [(knobs, names[(i + i // 8 + i // 64) % len(names)]) for i, knobs in enumerate(options(section))]
    trained, refused, wrong = check_rollouts(make_config, preference_files, trainer, chosen[part::4])
    report(capsys, trainer, trained, refused)
    assert wrong == []


def test_rollouts_in_one_process(make_config: MakeConfig, preference_files: tuple[Path, Path, Path]) -> None:
    """A part that is quick: the last combination of each trainer."""
    for trainer, section in (("ppo", PPOKnobs), ("grpo", GRPOKnobs)):
        trained, _, wrong = check_rollouts(make_config, preference_files, trainer, [(options(section)[-1], "single")])
        assert (trained, wrong) == (1, [])
    rows = comparable(Path(make_config().run.storage) / "grpo-0-plain")
    assert 0 < sum(row["ended"] for row in rows) < len(rows), "some answers end and some do not"
