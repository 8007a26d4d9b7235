"""Runs the few steps around a difference again, in this process or in subprocesses, without Ray."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myllm_ray.common.types import is_measured
from myllm_ray.config.resolve import SHORT_NAMES
from myllm_ray.runs import rerun
from myllm_ray.runs.places import Place
from myllm_ray.runs.records import Step

_SCRIPT = Path(rerun.__file__).resolve()


@dataclass(frozen=True)
class Spec:
    """One way to make the steps: a config, a place (None: this process), and a number of processes."""

    config: Mapping[str, Any]
    place: Place | None = None
    workers: int = 1


@dataclass
class Outcome:
    """The steps that a spec has made, or why it could not make them."""

    steps: dict[int, Step] = field(default_factory=dict)
    error: str | None = None


class Reruns:
    """Makes steps again. Specs at the same place share one process; equal specs are made once.

    Args:
        folder: an existing temporary folder.
        start: the checkpoint to start from; None: the start of the run.
        until: the last step.
        interventions: the interventions of the original run (`stability.on_spike`), which are repeated; or None.
        tell: called with a line of text before each group of reruns.
    """

    def __init__(
        self,
        folder: Path,
        start: Path | None,
        until: int,
        interventions: Path | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self._folder, self._start, self._until, self._tell = folder, start, until, tell
        self._interventions = interventions
        self._done: dict[str, Outcome] = {}
        self.count = 0
        """Number of reruns so far."""

    def make(self, specs: Sequence[Spec]) -> list[Outcome]:
        """Returns the outcomes of specs, in their order."""
        keys = [_key(spec) for spec in specs]
        groups: dict[tuple[Place | None, int], dict[str, Spec]] = {}
        for key, spec in zip(keys, specs, strict=True):
            if key not in self._done:
                groups.setdefault((spec.place, spec.workers), {})[key] = spec
        for (place, workers), group in groups.items():
            self._tell(f"making {len(group)} × steps to {self._until}" + ("" if place is None else " in a subprocess"))
            jobs = [self._job(spec) for spec in group.values()]
            if place is None and workers == 1:
                with _quiet():
                    results = [rerun.make_steps(job) for job in jobs]
            else:
                results = self._in_processes(place, workers, jobs)
            self._done |= {key: _outcome(result) for key, result in zip(group, results, strict=True)}
        return [self._done[key] for key in keys]

    def _job(self, spec: Spec) -> dict[str, Any]:
        self.count += 1
        raw = copy.deepcopy(dict(spec.config))
        raw.setdefault("run", {}).update(name=f"rerun-{self.count}", storage=str(self._folder / "runs"), overwrite=True)
        return {
            "config": raw,
            "start": str(self._start) if self._start else None,
            "until": self._until,
            "interventions": str(self._interventions) if self._interventions else None,
        }

    def _in_processes(self, place: Place | None, workers: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Makes the steps of all jobs in one process of a place, or in a group of `workers` processes."""
        name = f"jobs-{self.count}"
        results = self._folder / f"{name}-results.json"
        file = self._folder / f"{name}.json"
        file.write_text(
            json.dumps({"jobs": jobs, "results": str(results), "store": str(self._folder / f"{name}-store")}),
            encoding="utf-8",
        )
        environment = dict(os.environ) if place is None else place.environment()
        executable = sys.executable if place is None else place.executable
        processes = []
        log = self._folder / f"{name}.log"
        try:
            with open(log, "w", encoding="utf-8") as output:
                for rank in range(workers):
                    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
                    variables = {k: str(v) for k, v in ranks.items()} if workers > 1 else {}
                    processes.append(
                        subprocess.Popen(
                            # -P: the folder of the script must not be on the import path
                            [executable, "-P", str(_SCRIPT), str(file)],
                            env={**environment, **variables},
                            cwd=place.folder if place is not None else None,
                            stdout=output,
                            stderr=subprocess.STDOUT,
                        )
                    )
                codes = [process.wait() for process in processes]
        except OSError as error:
            return [{"error": f"{executable} can't be started: {error}"}] * len(jobs)
        finally:
            for process in processes:  # after Ctrl-C: no rank must outlive this command
                if process.poll() is None:
                    process.kill()
                    process.wait()
        if any(codes) or not results.exists():
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return [{"error": f"the process failed: {lines[-1][:300] if lines else f'exit code {codes}'}"}] * len(jobs)
        found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))
        return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the package's log lines: they describe the runs, and the runs have logged them before."""
    logger = logging.getLogger("myllm_ray")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _key(spec: Spec) -> str:
    return json.dumps([spec.config, str(spec.place), spec.workers], sort_keys=True, default=str)


def _outcome(result: Mapping[str, Any]) -> Outcome:
    if "error" in result:
        return Outcome(error=str(result["error"]))
    steps = {}
    for step, row in result["rows"].items():
        numbers = {k: float(v) for k, v in row.items() if isinstance(v, (int, float)) and not is_measured(k)}
        steps[int(step)] = Step(row.get("tokens_hash"), numbers)
    return Outcome(steps)


def for_rerun(raw: Mapping[str, Any], alone: bool = True) -> dict[str, Any]:
    """Returns the config of a run for its rerun: without checkpoints, evaluation and callbacks.

    `run.max_steps` stays, because learning rates depend on it.

    Args:
        raw: the content of `config.yaml`.
        alone: whether the rerun has one process, so that a backend for several workers is replaced by `single`.
    """
    found: dict[str, Any] = copy.deepcopy(dict(raw))
    resume = (found.get("checkpoint") or {}).get("resume", "never")
    found["checkpoint"] = {"at_end": False, "resume": "never" if resume in ("auto", "never") else resume}
    found["callbacks"] = found["tracking"] = []
    found["run"] = {**(found.get("run") or {}), "budget": None}
    found["evaluation"] = {"at_end": False}
    found["logging"] = {"every_steps": 1, "samples_every_steps": None}
    found["stability"] = {**(found.get("stability") or {}), "hang_seconds": None}
    cpus = (found.get("scaling") or {}).get("cpus_per_worker", 1)
    workers = (found.get("scaling") or {}).get("workers", 0)
    found["scaling"] = {"workers": 0 if alone else workers, "cpus_per_worker": cpus}
    batch = found.setdefault("batch", {})
    batch["find_micro_size"] = False  # the size is determined; it is recorded as micro_size
    validation = (found.get("data") or {}).get("validation")
    if validation is not None and not validation.get("split"):
        found["data"]["validation"] = None  # its own files are not trained on
    accelerator = found.setdefault("accelerator", {})
    if alone and accelerator.get("name") in SHORT_NAMES["accelerators"]:
        kept = ("precision", "device", "activation_checkpointing", "compile")
        found["accelerator"] = {"name": "single", **{k: accelerator[k] for k in kept if k in accelerator}}
    return found
