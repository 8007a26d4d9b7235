"""The chaos table: each fault at five seeded moments, for ddp, fsdp and deepspeed-2.

Run with `make test-chaos`; the results are in docs/reliability.md. Most faults occur five times in one run, each time
in the worker group that has just recovered; CHAOS_MOMENTS=1 runs each once. With CHAOS_OUT=FILE one line of JSON is
written per fault and backend, from which `python tests/chaos/table.py FILE` makes the table.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from harness import BACKENDS, EPOCH, SAVE_EVERY, STEPS, Comparison, Job, Place, compare, job_config, place
from spawned import run_all

from myllm_ray.config import TrainerConfig, validate
from myllm_ray.engine.checkpointing.manager import CheckpointManager

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
MOMENTS = int(os.environ.get("CHAOS_MOMENTS", "5"))


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with place(cpus=4) as made:
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


_undisturbed: dict[tuple[str, ...], Path] = {}


def undisturbed(runs: Path, where: Place, backend: str, *overrides: str) -> Path:
    """Returns the folder of the same job without a fault; each job runs only once."""
    key = (backend, *overrides)
    if key not in _undisturbed:
        job = Job(
            job_config(runs, f"undisturbed-{len(_undisturbed)}", *BACKENDS[backend], *overrides), where.address
        ).start()
        assert job.end() == 0, job.said()
        _undisturbed[key] = job.folder
    return _undisturbed[key]


def record(fault: str, backend: str, moments: int, found: Comparison, seconds: float) -> None:
    out = os.environ.get("CHAOS_OUT")
    if out:
        with open(out, "a") as file:
            file.write(
                json.dumps(
                    {
                        "fault": fault,
                        "backend": backend,
                        "times": moments,
                        **asdict(found),
                        "seconds": round(seconds, 1),
                    }
                )
                + "\n"
            )


Disturb = Callable[[Job, random.Random], None]


def next_group(job: Job, before: dict[int, int]) -> dict[int, int]:
    """Waits for a group of two workers that has no process of `before`; returns its process ids by rank."""

    def look() -> dict[int, int]:
        now = job.workers()
        return now if len(now) == 2 and not set(now.values()) & set(before.values()) else {}

    found: dict[int, int] = job.until(look)
    return found


def mid_step(job: Job, rng: random.Random) -> None:
    for step in sorted(rng.sample(range(1, STEPS - 2), MOMENTS)):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        job.until(lambda step=step: job.steps() >= step)
        time.sleep(rng.uniform(0, 0.1))
        job.kill_a_worker(rng)
        next_group(job, before)


def mid_checkpoint(job: Job, rng: random.Random) -> None:
    for _ in range(MOMENTS):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        job.until(lambda: list((job.folder / "checkpoints").glob(".step-*.tmp")))
        time.sleep(rng.uniform(0, 0.03))
        job.kill_a_worker(rng)
        next_group(job, before)


def epoch_boundary(job: Job, rng: random.Random) -> None:
    """Kills a worker in the last step of an epoch, or in the first step of the next one."""
    for _ in range(MOMENTS):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        step = rng.choice([EPOCH, EPOCH + 1])
        job.until(lambda: job.steps() <= EPOCH - 1)  # the previous group's later steps are gone
        job.until(lambda step=step: job.steps() >= step)
        job.kill_a_worker(rng)
        next_group(job, before)


def start_up(job: Job, rng: random.Random) -> None:
    before: dict[int, int] = {}
    for _ in range(MOMENTS):
        before = next_group(job, before)
        time.sleep(rng.uniform(0, 1.0))
        job.kill_a_worker(rng)


def two_in_a_row(job: Job, rng: random.Random) -> None:
    """Kills a worker, then a worker of the recovered group in its first step."""
    for step in sorted(rng.sample(range(1, STEPS - 3), MOMENTS)):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        job.until(lambda step=step: job.steps() >= step)
        job.kill_a_worker(rng)
        before = next_group(job, before)
        job.until(lambda step=step: 0 < job.steps() < step or job.steps() > step)
        job.kill_a_worker(rng)
        next_group(job, before)


def during_recovery(job: Job, rng: random.Random) -> None:
    for step in sorted(rng.sample(range(1, STEPS - 2), MOMENTS)):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        job.until(lambda step=step: job.steps() >= step)
        job.kill_a_worker(rng)
        before = next_group(job, before)
        time.sleep(rng.uniform(0, 0.5))
        job.kill_a_worker(rng)
        next_group(job, before)


def stopped(job: Job, rng: random.Random) -> None:
    """Sends SIGSTOP to a worker: its process exists but makes no progress."""
    for step in sorted(rng.sample(range(1, STEPS - 2), MOMENTS)):
        before = job.until(lambda: len(w := job.workers()) == 2 and w)
        job.until(lambda step=step: job.steps() >= step)
        job.kill_a_worker(rng, signal.SIGSTOP)
        next_group(job, before)


WORKER_FAULTS: dict[str, tuple[Disturb, int, list[str]]] = {
    "SIGKILL of a worker in a step": (mid_step, MOMENTS, []),
    "SIGKILL of a worker while it saves": (mid_checkpoint, MOMENTS, []),
    "SIGKILL of a worker at an epoch's boundary": (epoch_boundary, MOMENTS, []),
    "SIGKILL of a worker during start-up": (start_up, MOMENTS, []),
    "two kills in a row": (two_in_a_row, 2 * MOMENTS, []),
    "a kill during recovery": (during_recovery, 2 * MOMENTS, []),
    "SIGSTOP of a worker past the time-out": (stopped, MOMENTS, ["stability.hang_seconds=12"]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fault", WORKER_FAULTS)
def test_workers(runs: Path, here: Place, fault: str, backend: str) -> None:
    disturb, moments, options = WORKER_FAULTS[fault]
    reference = undisturbed(runs, here, backend)
    name = f"{backend}-{disturb.__name__}"
    started = time.monotonic()
    job = Job(job_config(runs, name, *BACKENDS[backend], "scaling.max_failures=-1", *options), here.address).start()
    disturb(job, random.Random(name))
    assert job.end() == 0, job.said()
    found = compare(job.folder, reference)
    record(fault, backend, moments, found, time.monotonic() - started)
    assert found.identical, found
    assert found.attempts == moments + 1
    if disturb is stopped:
        assert job.said().count("has sent no heartbeat") == moments


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_driver(runs: Path, here: Place, backend: str) -> None:
    """SIGKILL of the driver; the same command resumes the run."""
    reference = undisturbed(runs, here, backend)
    rng, started = random.Random(backend), time.monotonic()
    job = Job(job_config(runs, f"{backend}-driver", *BACKENDS[backend]), here.address)
    before: dict[int, int] = {}
    for step in sorted(rng.sample(range(1, STEPS - 2), MOMENTS)):
        job.start()
        before = next_group(job, before)
        job.until(lambda step=step: job.steps() >= step)
        job.process.kill()
        job.end()
    assert job.start().end() == 0, job.said()
    found = compare(job.folder, reference)
    record("SIGKILL of the driver, then the same command again", backend, MOMENTS, found, time.monotonic() - started)
    assert found.identical, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_node_is_lost_and_another_joins(runs: Path, backend: str) -> None:
    """SIGKILL of the raylet of the second node; a new node joins, the run grows again, and loses it again."""
    steps = (
        "run.max_steps=60",
        "checkpoint.every_steps=10",
        "scaling.workers=[1,2]",
        "scaling.resources_per_worker={slot: 1}",
        "callbacks=[jsonl, {helpers:Slow: {seconds: 0.4}}]",
    )
    with place(cpus=3, slots=1) as where:
        started, rng = time.monotonic(), random.Random(backend)
        where.add(cpus=1, slots=1)
        reference = undisturbed(runs, where, backend, *steps[:2], *steps[3:])
        job = Job(
            job_config(runs, f"{backend}-node", *BACKENDS[backend], *steps, "scaling.max_failures=-1"), where.address
        ).start()
        for _ in range(MOMENTS):
            job.until(lambda: len(job.workers()) == 2)
            now = job.steps()
            job.until(lambda now=now: job.steps() > now)
            time.sleep(rng.uniform(0, 1.5))
            where.lose(where.others[0])
            job.until(lambda: len(job.workers()) == 1)
            where.add(cpus=1, slots=1)
        assert job.end() == 0, job.said()
        found = compare(job.folder, reference, 60)
        record(
            "SIGKILL of the raylet of the second node; a new one joins",
            backend,
            MOMENTS,
            found,
            time.monotonic() - started,
        )
    assert found.lost_or_repeated == 0
    assert found.losses < 1e-5


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def spawned(runs: Path, name: str, backend: str, *overrides: str) -> TrainerConfig:
    """Returns the config of a job for two processes without Ray, where storage faults have the same effect."""
    return validate(job_config(runs, name, *BACKENDS[backend], "callbacks=[jsonl]", *overrides))


def spawned_reference(runs: Path, backend: str) -> Path:
    key = (backend, "spawned")
    if key not in _undisturbed:
        _undisturbed[key] = run_all(2, [spawned(runs, f"{backend}-spawned", backend)])[0]
    return _undisturbed[key]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_disk_is_full(runs: Path, small_disk: Path, backend: str) -> None:
    """The disk fills while a checkpoint is written.

    The error is clear, the partial checkpoint is removed, and the last complete one is kept. With free space, the
    run resumes.
    """
    reference = spawned_reference(runs, backend)
    started, rng, refused = time.monotonic(), random.Random(backend), 0
    config = spawned(runs, f"{backend}-disk", backend, f"run.storage={small_disk}", "checkpoint.every_steps=2")
    folder, filler = small_disk / config.run.name, small_disk / "filler"
    for step in sorted(rng.sample(range(2, STEPS), MOMENTS)):
        fill = {"helpers:FillDisk": {"step": step, "path": str(filler), "leave": rng.randrange(100_000, 700_000)}}
        config.callbacks = ["jsonl", fill]
        with pytest.raises(Exception, match=r"can't be written: .*No space left on device"):
            run_all(2, [config])
        refused += 1
        assert not list((folder / "checkpoints").glob(".*")), "the incomplete checkpoint is removed"
        whole = CheckpointManager(folder=folder / "checkpoints")
        assert whole.latest() == (whole.all() or [None])[-1]
        filler.unlink()
    config.callbacks = ["jsonl"]
    run_all(2, [config])
    found = compare(folder, reference)
    record("disk full while a checkpoint is written", backend, refused, found, time.monotonic() - started)
    assert found.identical, found


def truncate(file: Path, rng: random.Random) -> None:
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_a_bit(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def delete(file: Path, rng: random.Random) -> None:
    file.unlink()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete])
def test_a_file_of_the_newest_checkpoint_is_damaged(
    runs: Path, damage: Callable[[Path, random.Random], None], backend: str
) -> None:
    """Any file, including the manifest: the damaged checkpoint is skipped, and the previous one is used."""
    reference = spawned_reference(runs, backend)
    started, rng = time.monotonic(), random.Random(damage.__name__ + backend)
    stops = rng.sample(range(2 * SAVE_EVERY, STEPS), MOMENTS)
    configs = [
        spawned(runs, f"{backend}-{damage.__name__}-{step}", backend, "checkpoint.at_end=false") for step in stops
    ]
    for config, step in zip(configs, stops, strict=True):
        config.callbacks = ["jsonl", {"helpers:StopAt": {"step": step}}]
    for folder in run_all(2, configs):
        newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
        damage(rng.choice(sorted(newest.iterdir())), rng)
        manager = CheckpointManager(folder=folder / "checkpoints")
        before = manager.latest()
        assert before is not None
        assert before.name < newest.name
    for config in configs:
        config.callbacks, config.checkpoint.at_end = ["jsonl"], True
    found = [compare(folder, reference) for folder in run_all(2, configs)]
    worst = max(found, key=lambda c: (not c.identical, c.weights))
    names = {"truncate": "truncated", "flip_a_bit": "bit-flipped", "delete": "deleted"}
    record(
        f"a file of the newest checkpoint {names[damage.__name__]}", backend, MOMENTS, worst, time.monotonic() - started
    )
    assert worst.identical, worst
