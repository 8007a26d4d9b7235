"""Commands on the folders of runs: runs ls, runs show, runs diff, runs rm, explain."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from myllm_ray.cli.app import app
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError

runs = typer.Typer(no_args_is_help=True, help="List, show, compare and remove runs.")
app.add_typer(runs, name="runs")

Run = Annotated[Path, typer.Argument(help="the folder of a run")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@runs.command("ls")
def ls(
    storage: Annotated[Path, typer.Argument(help="folder that contains runs (run.storage)")] = Path("runs"),
    sort: Annotated[str, typer.Option(help="age, name, trainer, status, step, best or size")] = "age",
    reverse: Annotated[bool, typer.Option("--reverse", help="reverse the order")] = False,
    status: Annotated[list[str] | None, typer.Option(help="only runs with this status; repeatable")] = None,
    trainer: Annotated[str | None, typer.Option(help="only runs of this trainer")] = None,
    name: Annotated[str | None, typer.Option(help="only names that match this pattern, such as 'lr-*'")] = None,
    metric: Annotated[str | None, typer.Option(help="metric whose best value is shown")] = None,
    trials: Annotated[bool, typer.Option("--trials", help="also list the trials of sweeps")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="refresh the table until Ctrl-C")] = False,
    every: Annotated[float, typer.Option(min=0.5, help="seconds between two refreshes")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object per run")] = False,
) -> None:
    """List the runs and sweeps in a storage path, with their status, step, best metric, age and size."""
    from myllm_ray.cli.run_tables import run_table
    from myllm_ray.runs.listing import Activity, Summary, list_runs, select

    if watch and as_json:
        raise ConfigError("--watch refreshes a table: leave out --json")
    activity = Activity()

    def found() -> list[Summary]:
        return select(list_runs(storage, metric, activity, trials), sort, reverse, status or [], trainer, name)

    if as_json:
        for summary in found():
            print(json.dumps(summary.as_json(), ensure_ascii=False))
        return
    if not watch:
        out.print(run_table(found(), storage))
        return
    from rich.live import Live

    try:
        with Live(run_table(found(), storage), console=out, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(run_table(found(), storage), refresh=True)
    except KeyboardInterrupt:
        return


@runs.command("show")
def show(run: Run, as_json: Json = False) -> None:
    """Show one run: status, config, environment, attempts, checkpoints and metrics."""
    from myllm_ray.cli.run_tables import print_run
    from myllm_ray.runs.folder import RunFolder
    from myllm_ray.runs.overview import overview

    found = overview(RunFolder(run))
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        print_run(found)


@runs.command("diff")
def diff(a: Run, b: Run, as_json: Json = False) -> None:
    """Show the differences of two runs: config, packages, hardware, code, data, and the first differing step.

    Exit code 0: equal, 1: different.
    """
    from myllm_ray.cli.run_tables import print_differences
    from myllm_ray.runs.difference import compare
    from myllm_ray.runs.folder import RunFolder

    found = compare(RunFolder(a), RunFolder(b))
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        print_differences(found, a, b)
    sys.exit(0 if found.equal else 1)


@app.command()
def explain(
    a: Run,
    b: Run,
    rerun: Annotated[bool, typer.Option("--rerun/--no-rerun", help="make the differing steps again")] = True,
    steps: Annotated[int, typer.Option(min=1, help="largest number of steps of one rerun")] = 200,
    as_json: Json = False,
) -> None:
    """Explain why two runs differ: the first differing step, and the change that is the cause.

    The steps around the difference are made again on this machine, without Ray, under run A with each change to run B.
    Exit code 0: equal, 1: different.
    """
    from myllm_ray.cli.run_tables import print_explanation
    from myllm_ray.runs.explain import explain as run
    from myllm_ray.runs.folder import RunFolder

    first, second = RunFolder(a), RunFolder(b)
    with Console(stderr=True).status("comparing") as status:
        found = run(first, second, rerun, steps, tell=lambda line: status.update(f"explaining: {line}"))
    if as_json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False, default=str))
    else:
        print_explanation(found)
    sys.exit(0 if found.equal else 1)


@runs.command("rm")
def rm(
    run: Annotated[list[Path], typer.Argument(help="folders of runs or sweeps")],
    checkpoints_only: Annotated[
        bool, typer.Option("--checkpoints-only", help="remove the checkpoints and keep the records")
    ] = False,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, help="with --checkpoints-only: keep this number of the newest, and the best one"),
    ] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="also remove the copies in the remote checkpoint store")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
) -> None:
    """Remove runs, or only their checkpoints. Refuses active runs and folders that are not runs."""
    from myllm_ray.cli.run_tables import size
    from myllm_ray.runs.removal import plan_removal, refuse_bases, remove

    if keep_last is not None and not checkpoints_only:
        raise ConfigError("--keep-last is the number of checkpoints to keep: add --checkpoints-only")
    # All of them are checked before the first is removed.
    plans = [plan_removal(path, checkpoints_only, keep_last or 0) for path in dict.fromkeys(run)]
    refuse_bases(plans)
    for plan in plans:
        what = "the run" if plan.whole else f"{len(plan.paths)} checkpoint{'s' * (len(plan.paths) != 1)}"
        out.print(f"{plan.run}: {what}, {size(plan.bytes)}", markup=False)
        if plan.remote:
            done = "are removed, too" if remote else "are kept (--remote removes them)"
            out.print(f"  {len(plan.remote)} copies in {plan.remote_url} {done}", markup=False)
        if plan.remote_problem:
            out.print(f"  copies are not removed: {plan.remote_problem}", markup=False)
    if not any(plan.paths for plan in plans):
        out.print("nothing to remove")
        return
    if not yes and not _confirmed():
        out.print("nothing was removed")
        sys.exit(1)
    for plan in plans:
        remove(plan, remote)
    out.print(f"removed {size(sum(plan.bytes for plan in plans))}")


def _confirmed() -> bool:
    """Asks on the terminal. Without a terminal, nothing is removed."""
    if not sys.stdin.isatty():
        raise ConfigError("runs rm asks before it removes, and standard input is not a terminal: add --yes")
    return typer.confirm("remove?")
