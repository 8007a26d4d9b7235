"""Runs of many combinations in a few processes, compared with the plain run (test_enumeration*.py)."""

from __future__ import annotations

import itertools
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

from myllm_ray.config import validate
from myllm_ray.config.errors import UserError
from myllm_ray.config.sections import Section
from myllm_ray.data.prepare import PreparedData, prepare
from myllm_ray.engine.run_folder import claim, folder_of
from myllm_ray.preparation import absolute, check_model, check_names, with_base
from myllm_ray.worker import run_worker

Job = tuple[dict[str, Any], PreparedData]

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}


TOLERANCE = 1e-5


def values(section: type[Section], name: str) -> list[Any]:
    """Returns the values of a section's field; an empty list where they are not finitely many."""
    annotation = section.model_fields[name].annotation
    if annotation is bool:
        return [False, True]
    parts = [annotation] if get_origin(annotation) is Literal else get_args(annotation)
    return [value for part in parts if get_origin(part) is Literal for value in get_args(part)]


def start(make_config: MakeConfig, files: tuple[Path, Path, Path], overrides: list[str]) -> Job | str:
    """Prepares a run up to its first step, or returns the message that rejects it, with nothing written."""
    train, held_out, _ = files
    raw: dict[str, Any] = {
        "model": {"config": TINY},
        "data": {
            "train": {"path": str(train)},
            "validation": {"path": str(held_out)},
            "cache": str(train.parent / "cache"),
        },
    }
    config, message = None, ""
    try:
        config = absolute(make_config(*overrides, **raw))
        check_names(config)
        prepared = prepare(config)
        check_model(config, prepared)
        prepared = with_base(config, prepared)
        claim(config, prepared.identity)
        return config.model_dump(mode="json"), prepared
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert config is None or not folder_of(config).exists(), "refused after something was written"
    return message


def run(jobs: list[Job]) -> None:
    """Runs the jobs one after the other; a job that fails leaves its error in its folder."""
    for raw, prepared in jobs:
        config = validate(raw)
        try:
            run_worker(config, prepared)
        except Exception as error:
            (folder_of(config) / f"failed-{os.environ.get('RANK', 0)}.txt").write_text(
                f"{type(error).__name__}: {error}"
            )


def _process(rank: int, world: int, store: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS="1"
    )
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    run(jobs)
    leave()


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
        """The combination that it must equal: one process, a copy as the reference model, one answer per row."""
        reference = {
            "precomputed": "copy",
            "precomputed, reference_model": "copy, reference_model",
            "adapter_off": "copy, lora",
        }.get(self.reference, self.reference)
        return Combination(self.loss, reference, "never", "single", True)

    def overrides(self, other: Path) -> list[str]:
        reference, _, extra = self.reference.partition(", ")
        if self.loss == "reward":
            return [
                *PREFERENCES,
                "trainer=reward",
                f"run.name={self.name}",
                f"reward={{shared_prompt: {self.shared_prompt}, centering: 0.01}}",
                "data.train.format=preference",
                "data.validation.format=preference",
                f"data.packing={str(self.packing).lower()}",
                *BACKENDS[self.backend],
            ]
        lora = reference == "adapter_off" or extra == "lora"
        return [
            *PREFERENCES,
            f"run.name={self.name.replace(', ', '-')}",
            f"dpo={{loss: {self.loss}, reference: {reference}, shared_prompt: {self.shared_prompt}, beta: 0.5}}",
            f"data.train.format={'unpaired' if self.loss == 'kto' else 'preference'}",
            f"data.validation.format={'unpaired' if self.loss == 'kto' else 'preference'}",
            f"data.packing={str(self.packing).lower()}",
            *BACKENDS[self.backend],
            *([f"dpo.reference_model={other}"] if extra == "reference_model" else []),
            *(["model.lora={rank: 2, alpha: 4}"] if lora else []),
        ]


def failures(folder: Path) -> list[str]:
    return [f"{folder.name}: {failure.read_text()[:300]}" for failure in sorted(folder.glob("failed-*.txt"))]


def compare(folder: Path, plain: Path) -> Iterator[str]:
    """Yields a line of text for each difference between two runs."""
    if failed := failures(folder):
        yield from failed
        return
    found, wanted = comparable(folder), comparable(plain)
    if len(found) != len(wanted):
        yield f"{folder.name}: {len(found)} steps instead of {len(wanted)}"
    for row, other in zip(found, wanted, strict=False):
        for name in (
            "loss",
            "grad_norm",
            "tokens",
            *(n for n in other if n.startswith(("validation_", "rewards/")) and "calibration" not in n),
        ):
            # A step has no loss if no token of it is trained on (mask_truncated, and all answers are truncated).
            value, expected = row.get(name), other.get(name)
            # Rewards are differences of large numbers: their rounding error does not scale with their size.
            absolute = 2e-5 if "rewards/" in name or "log_probs/" in name else 1e-6
            if value != (None if expected is None else pytest.approx(expected, rel=TOLERANCE, abs=absolute)):
                yield f"{folder.name}: step {row['step']}: {name} {value} instead of {expected}"


def check(
    make_config: MakeConfig, files: tuple[Path, Path, Path], combinations: list[Combination], world: int
) -> tuple[int, dict[str, str], list[str]]:
    """Returns (number of combinations trained, the message of each refused one, the differences found)."""
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
            plain = start(
                make_config,
                files,
                [*combination.plain.overrides(files[2]), f"run.name=plain-{len(plains)}", "batch.micro_size=4"],
            )
            assert not isinstance(plain, str), plain
            local.append(plain)
            plains[combination.plain] = folder_of(validate(plain[0]))
    run(local)
    if shared:
        with tempfile.TemporaryDirectory() as folder:
            start_processes(_process, (world, f"{folder}/store", shared), world)
    return (
        len(trained),
        refused,
        [line for combination, folder in trained for line in compare(folder, plains[combination.plain])],
    )


def report(capsys: pytest.CaptureFixture[str], what: str, trained: int, refused: dict[str, str]) -> None:
    with capsys.disabled():
        print(f"\n{what}: {trained} combinations trained, {len(refused)} refused")
        for message in sorted(set(refused.values())):
            print(f"  {sum(m == message for m in refused.values())}: {message}")


def options(section: type[Section]) -> list[dict[str, Any]]:
    """Every combination of the trainer settings with finitely many values, with one or two epochs and minibatches."""
    finite = {name: found for name in section.model_fields if (found := values(section, name))}
    names = [*finite, "epochs", "minibatches"]
    return [dict(zip(names, parts, strict=True)) for parts in itertools.product(*finite.values(), (1, 2), (1, 2))]


PREFERENCES = [
    "trainer=dpo",
    "data.sequence_length=48",
    "batch={global_size: 4, micro_size: 1}",
    "run.max_steps=3",
    "optimizer={name: sgd, lr: 0.05}",
    "scheduler={name: constant}",
    "checkpoint.at_end=false",
    "gradient_clip=null",
]
