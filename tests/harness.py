"""Runs a job as a user does, injects one fault at a seeded moment, and compares the result with an undisturbed run.

A `Place` is a Ray cluster on this machine (separate processes, `ray.cluster_utils`); the job is a driver process that
connects to it. A fault reads what it needs (worker processes, completed steps, running saves) from the run's folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from conftest import LLAMA, ROOT, comparable, instruction_rows, ledger

from myllm_ray.config.load import apply_override
from myllm_ray.engine.checkpointing.manager import CheckpointManager, read_tensors
from myllm_ray.engine.liveness.heartbeat import read_heartbeats

STEPS, SAVE_EVERY = 16, 4
BACKENDS = {
    "ddp": ["accelerator.name=ddp"],
    "fsdp": ["accelerator.name=fsdp"],
    "deepspeed-2": ["accelerator.name=deepspeed", "accelerator.stage=2"],
}
PATIENCE = 120.0
_PATH = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])


@dataclass
class Place:
    """A Ray cluster with a head node and optional further nodes."""

    cluster: Any
    others: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int, slots: int = 0) -> Any:
        node = self.cluster.add_node(num_cpus=cpus, resources={"slot": slots} if slots else None)
        self.others.append(node)
        return node

    def lose(self, node: Any) -> None:
        """Kills the node's raylet with SIGKILL; its workers end with it."""
        self.others.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextmanager
def place(cpus: int, slots: int = 0, dashboard: bool = False) -> Iterator[Place]:
    """Yields a new cluster, which is shut down afterwards."""
    from ray.cluster_utils import Cluster

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _PATH  # for the workers, which inherit it from their raylet
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus,
            "include_dashboard": dashboard,
            "dashboard_port": free_port() if dashboard else None,
            **({"resources": {"slot": slots}} if slots else {}),
        },
    )
    try:
        yield Place(cluster)
    finally:
        cluster.shutdown()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


@dataclass
class Job:
    """One run (or one sweep): its config file, and the driver process while it runs."""

    config: dict[str, Any]
    address: str | None
    command: str = "train"
    process: Any = None
    started: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        return Path(self.config["run"]["storage"]) / str(self.config["run"]["name"])

    def start(self, *overrides: str) -> Job:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        path = self.folder.parent / f"{self.folder.name}.json"
        path.write_text(json.dumps(self.config))
        environment = {**os.environ, "PYTHONPATH": _PATH, "RAY_AUTH_MODE": "disabled"}
        environment.pop("RAY_ADDRESS", None)
        if self.address:
            environment["RAY_ADDRESS"] = self.address
        self.log = open(self.folder.parent / f"{self.folder.name}.log", "a")  # noqa: SIM115 (the process writes to it)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "myllm_ray.cli", self.command, str(path), *overrides],
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        return self

    def end(self, seconds: float = PATIENCE) -> int:
        """Waits for the driver and returns its exit code."""
        code: int = self.process.wait(seconds)
        self.log.close()
        return code

    def said(self) -> str:
        return (self.folder.parent / f"{self.folder.name}.log").read_text()

    def until(self, what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        """Waits until `what` returns a true value and returns it; polls 100 times per second."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            found = what()
            if found:
                return found
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the run ended ({self.process.returncode}) before the fault:\n{self.said()[-3000:]}"
                )
            time.sleep(0.01)
        raise AssertionError(f"nothing to do the fault to within {seconds} s:\n{self.said()[-3000:]}")

    def steps(self) -> int:
        """Returns the last step in the ledger."""
        try:
            return max((row["step"] for row in ledger(self.folder)), default=0)
        except (OSError, ValueError):
            return 0

    def workers(self) -> dict[int, int]:
        """Returns the process ids by rank of the workers that have sent a heartbeat."""
        return {
            rank: int(beat["pid"]) for rank, beat in read_heartbeats(self.folder).items() if alive(int(beat["pid"]))
        }

    def kill_a_worker(self, rng: random.Random, sign: int = signal.SIGKILL) -> int:
        pids = self.until(self.workers)
        pid = pids[rng.choice(sorted(pids))]
        os.kill(pid, sign)
        return int(pid)


def free_port() -> int:
    """Returns a port of this machine that no process listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def killed(config: dict[str, Any]) -> bool:
    """Trains in a forked process, which inherits all imports; returns whether the process was killed."""
    from myllm_ray import train

    child = os.fork()
    if child == 0:
        try:
            train(config)
        finally:
            os._exit(1)  # it should have been killed
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def job_config(folder: Path, name: str, *overrides: str) -> dict[str, Any]:
    """Returns the config of a tiny SFT run of more than two epochs, saved every few steps."""
    data = folder / "rows.json"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data.write_text(json.dumps(instruction_rows(40)))
    raw: dict[str, Any] = {
        "trainer": "sft",
        "model": {"config": dict(LLAMA)},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "train": {"path": str(data), "format": "instruction"},
            "sequence_length": 160,
            "packing": False,
            "cache": str(folder / "cache"),
        },
        "batch": {"global_size": 4, "micro_size": 1},
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1},
        "scheduler": {"name": "cosine", "warmup_steps": 2},
        "scaling": {"workers": 2, "max_failures": 4},
        "run": {"name": name, "storage": str(folder / "runs"), "max_steps": STEPS},
        "callbacks": ["console", "jsonl"],
        "checkpoint": {"every_steps": SAVE_EVERY, "resume": "auto"},
        "stability": {"hang_seconds": 60},
    }
    for override in overrides:
        apply_override(raw, override)
    return raw


class Server:
    """A real `ray start --head` on free ports of this machine, with a separate temp folder."""

    def __init__(self, folder: Path, mode: str, dashboard: bool = True):
        self.folder = folder
        ports = [29000 + os.getpid() % 500 * 4 + i for i in range(3)]
        self.port, self.dashboard, agent = ports
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": mode,
            "HOME": str(folder),
            "RAY_TMPDIR": f"/tmp/r{os.getpid()}",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        if mode == "token":
            (folder / ".ray").mkdir()
            (folder / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef0123456789abcdef")
        command = [
            "ray",
            "start",
            "--head",
            "--block",
            f"--port={self.port}",
            f"--dashboard-port={self.dashboard}",
            "--num-cpus=4",
            f"--dashboard-agent-listen-port={agent}",
            f"--include-dashboard={dashboard}".lower(),
            "--disable-usage-stats",
            f"--temp-dir=/tmp/r{os.getpid()}-{mode}",
            "--node-ip-address=127.0.0.1",
        ]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def cluster(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def wait(self) -> None:
        """Waits until the job server answers (any HTTP answer, with or without a token)."""
        import urllib.error
        import urllib.request

        for _ in range(120):
            try:
                urllib.request.urlopen(self.address + "/api/version", timeout=2)
                return
            except urllib.error.HTTPError:
                return
            except OSError:
                assert self.process.poll() is None, self.process.stdout.read().decode()  # type: ignore[union-attr]
                time.sleep(0.5)
        raise AssertionError("the dashboard did not come up")

    def wait_for_node(self) -> None:
        """Waits until the head node listens and has registered itself."""
        for _ in range(120):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                time.sleep(3)
                return
            assert self.process.poll() is None, self.process.stdout.read().decode()  # type: ignore[union-attr]
            time.sleep(0.5)
        raise AssertionError("the head did not come up")

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(5)  # if the raylet ends first, `ray start --block` waits much longer
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


EPOCH = 10
"""Steps per epoch of `job_config`: 40 rows, 4 per step."""


def weights(folder: Path, steps: int) -> dict[str, torch.Tensor]:
    newest = CheckpointManager(folder=folder / "checkpoints").latest()
    assert newest == folder / "checkpoints" / f"step-{steps:08d}", newest
    return read_tensors(newest)


@dataclass
class Comparison:
    """The differences between a disturbed run and the undisturbed one."""

    weights: float
    """Largest difference of a weight, relative to the largest value of its tensor. 0: bitwise equal."""
    moments: float
    """Largest difference of an Adam moment, relative to the largest value of its tensor."""
    losses: float
    """Largest relative difference of a loss."""
    same_metrics: bool
    """Whether the metrics files are equal, apart from values that depend on a clock."""
    lost_or_repeated: int
    """Steps with another batch than in the undisturbed run (by the hash of its tokens), repeated or missing steps."""
    attempts: int
    retrained: int
    """Steps that were trained again, summed over all restarts by the supervisor."""

    @property
    def identical(self) -> bool:
        return self.weights == self.moments == self.lost_or_repeated == 0 and self.same_metrics


def compare(folder: Path, reference: Path, steps: int = STEPS) -> Comparison:
    ours, theirs = weights(folder, steps), weights(reference, steps)
    assert ours.keys() == theirs.keys()

    def apart(kind: str) -> float:
        different = [k for k in ours if k.startswith(kind) and not torch.equal(ours[k], theirs[k])]
        return max(
            (
                float((ours[k].double() - theirs[k].double()).abs().max() / max(float(theirs[k].abs().max()), 1e-12))
                for k in different
            ),
            default=0.0,
        )

    rows, expected = comparable(folder), comparable(reference)
    assert [r["step"] for r in rows] == [r["step"] for r in expected]
    losses = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(rows, expected, strict=True))
    found, wanted = ledger(folder), ledger(reference)
    wrong = sum(a != b for a, b in zip(found, wanted, strict=False)) + abs(len(found) - len(wanted))
    attempts = attempts_of(folder)
    retrained = sum(max(0, before["to_step"] - after["from_step"]) for before, after in pairwise(attempts))
    return Comparison(apart("model."), apart("optimizer."), losses, rows == expected, wrong, len(attempts), retrained)


def attempts_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "attempts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
