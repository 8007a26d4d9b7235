"""Makes steps of a run again. Also a script, `python rerun.py JOBS.json`, for another interpreter or several ranks.

As a script it may be run with an older version of this package, so it imports only what older versions have, too.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any


def make_steps(job: dict[str, Any]) -> dict[str, Any]:
    """Trains from a checkpoint or from step 0 to a step, in a temporary folder, without checkpoints and evaluation.

    The schedule is that of the whole run: a callback stops it after the last step.

    Args:
        job: `config` (plain data, with run.storage in a temporary folder), `start` (a checkpoint, or None), `until`
            (the last step), and `interventions` (the file of the original run, or None).

    Returns:
        `rows`: metrics by step, with the hash of the batch as `tokens_hash`; or `error`, one line.
    """
    import torch

    from myllm_ray.common import distributed
    from myllm_ray.common.files import read_jsonl
    from myllm_ray.config.load import validate
    from myllm_ray.engine.callbacks import Callback
    from myllm_ray.engine.run_folder import folder_of
    from myllm_ray.preparation import absolute, prepare_data, prepare_run
    from myllm_ray.worker import run_worker

    rows: dict[int, dict[str, Any]] = {}

    class Recorder(Callback):
        """Records the metrics of each step and stops the run after the last one."""

        def __init__(self) -> None: ...

        def on_log(self, state: Any, metrics: dict[str, float]) -> None:
            rows[state.step] = dict(metrics)

        def on_step_end(self, state: Any) -> None:
            if state.step >= job["until"]:
                state.request("stop", "the last step to make again")

    threads = torch.get_num_threads()
    try:
        config = absolute(validate(job["config"]))
        torch.set_num_threads(max(1, min(int(config.scaling.cpus_per_worker), os.cpu_count() or 1)))
        folder = folder_of(config)
        if distributed.is_main():
            prepared = prepare_run(config, warn=False)
            if job.get("interventions"):
                shutil.copy(job["interventions"], folder / "interventions.jsonl")
        distributed.barrier()
        if not distributed.is_main():
            prepared = prepare_data(config)
        start = job.get("start")
        while True:
            done = run_worker(config, prepared, callbacks=[Recorder()], start=Path(start) if start else None)
            if done["exit"] is None or done["exit"].kind != "amended":
                break
            start = done["checkpoint"]  # of the step at which the amendment takes effect
        for row in read_jsonl(folder / "ledger.jsonl"):
            if row["step"] in rows:
                rows[row["step"]]["tokens_hash"] = row["tokens_hash"]
    except Exception as error:  # a change that can't be made is a result, not a failure of the comparison
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        torch.set_num_threads(threads)
    return {"rows": {str(step): row for step, row in rows.items()}}


def main() -> None:
    """Makes the steps of all jobs of a file and writes their results to another file.

    With WORLD_SIZE in the environment, this process is one rank of a group that meets at a file.
    """
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        import torch.distributed as dist

        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo", init_method=f"file://{jobs['store']}", rank=rank, world_size=world)
    results = [make_steps(job) for job in jobs["jobs"]]
    if int(os.environ.get("RANK", "0")) == 0:
        Path(jobs["results"]).write_text(json.dumps(results), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's shutdown, during which a thread of torch sometimes aborts the process.
    os._exit(0)


if __name__ == "__main__":
    main()
