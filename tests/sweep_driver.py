"""A Python session that runs a sweep, stays alive, and measures which resources of its trials remain.

Call: `python sweep_driver.py <address> <sweep.json>`. It prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from myllm_ray.orchestration import session  # noqa: F401  (sets what Ray reads at import)

# isort: split
import contextlib

import psutil
import ray
from harness import alive

from myllm_ray.common.files import read_jsonl
from myllm_ray.config.sweep import validate_sweep
from myllm_ray.engine.liveness.heartbeat import read_heartbeats
from myllm_ray.orchestration.sweeps.sweep import sweep
from myllm_ray.orchestration.sweeps.trial_channel import PLACEMENT_GROUP


class Watcher(threading.Thread):
    """Measures how long after the end of a trial its processes and placement groups are gone."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.over = folder, False
        self.pids: dict[str, set[int]] = {}
        self.groups: dict[str, set[str]] = {}
        self.ended: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        """Seconds from the recorded end of a trial until none of its processes and placement groups existed."""

    def run(self) -> None:
        while not self.over or (self.ended.keys() - self.seconds.keys() and time.monotonic() < self.limit):
            for trial in (self.folder / "trials").glob("*"):
                beats = read_heartbeats(trial) if trial.name not in self.ended else {}
                self.pids.setdefault(trial.name, set()).update(int(b["pid"]) for b in beats.values())
                with contextlib.suppress(OSError):
                    self.groups.setdefault(trial.name, set()).add((trial / PLACEMENT_GROUP).read_text())
            for row in read_jsonl(self.folder / "results.jsonl"):
                self.ended.setdefault(row["trial"], time.monotonic())
            states = {key: group["state"] for key, group in ray.util.placement_group_table().items()}
            for name in self.ended.keys() - self.seconds.keys():
                gone = not any(alive(pid) for pid in self.pids.get(name, ()))
                if gone and all(states.get(group, "REMOVED") == "REMOVED" for group in self.groups.get(name, ())):
                    self.seconds[name] = time.monotonic() - self.ended[name]
            if not self.over:
                self.limit = time.monotonic() + 20
            time.sleep(0.1)


def memory() -> float:
    """Returns the MiB of unshared memory of this process and of the processes of actors and running tasks.

    Idle processes, which Ray keeps for the next task, do not count: their number is not under the sweep's control.
    """
    mine = psutil.Process()
    raylets = [
        p
        for p in psutil.process_iter(["name", "cmdline"])
        if p.info["name"] == "raylet"
        and any(ray.get_runtime_context().gcs_address in part for part in p.info["cmdline"] or [])
    ]
    total = 0
    for process in [mine, *(child for raylet in raylets for child in raylet.children(recursive=True))]:
        try:
            if "IDLE" not in "".join(process.cmdline()):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


_DATAS = {"_StatsActor", "_AutoscalingCoordinatorActor", "_UsageCollectionActor"}
"""Actors of Ray Data, one of each per session; they belong to no trial."""


def left() -> dict[str, list[str]]:
    """Returns the placement groups and actors that exist."""
    groups = [key for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]
    actors = [
        str(a.get("ActorClassName") or a.get("Name") or key)
        for key, a in ray._private.state.actors().items()
        if a["State"] != "DEAD"
    ]
    actors = [name for name in actors if name not in _DATAS]
    return {"groups": groups, "actors": actors}


def main(address: str, path: str) -> dict[str, Any]:
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    raw = json.loads(Path(path).read_text())
    sweep(validate_sweep({**raw, "trials": 2, "run": {**raw["run"], "name": "warm-up"}}))  # one-time costs
    time.sleep(5)
    before = memory()
    watcher = Watcher(Path(raw["run"]["storage"]) / raw["run"]["name"])
    watcher.start()
    result = sweep(validate_sweep(raw))
    done = time.monotonic()
    while any(left().values()) and time.monotonic() - done < 20:
        time.sleep(0.1)
    until_empty = time.monotonic() - done
    watcher.over = True
    watcher.join()
    time.sleep(max(0.0, 5 - (time.monotonic() - done)))
    return {
        "statuses": [row["status"] for row in result.trials],
        "left": left(),
        "until_empty": until_empty,
        "memory": [before, memory()],
        "seconds": watcher.seconds,
        "processes": {name: len(pids) for name, pids in watcher.pids.items()},
        "groups": {name: len(groups) for name, groups in watcher.groups.items()},
        "cpus": [ray.cluster_resources().get("CPU"), ray.available_resources().get("CPU")],
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
