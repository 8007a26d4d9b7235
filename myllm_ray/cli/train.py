"""Commands that train or act on an active run: train, sweep, lr-find, submit, stop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from myllm_ray.cli.app import EXIT_PREEMPTED, Config, LogFormat, Overrides, Plain, app, set_format
from myllm_ray.cli.tables import out
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import load_config


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False,
    profile: Annotated[
        str | None,
        typer.Option(metavar="A:B", help="profile the steps A to B: a trace and the ten most expensive operations"),
    ] = None,
    log_format: LogFormat = None,
    plain: Plain = False,
) -> None:
    """Train a model as the config describes."""
    from myllm_ray.orchestration.launch import train as run

    as_json = set_format(log_format, plain)
    try:
        result = run(config, [*(overrides or []), *_profiled(profile)], verbose)
    except KeyboardInterrupt:
        print("stopped without saving; the newest checkpoint is kept (resume: checkpoint.resume=auto)", file=sys.stderr)
        sys.exit(130)
    if not as_json:  # the event `end` says the same
        out.print(result.summary())
    if result.exit is not None:
        if not as_json:
            out.print(f"stopped early ({result.exit.reason}); to resume: the same command with checkpoint.resume=auto")
        sys.exit(EXIT_PREEMPTED)


def _profiled(steps: str | None) -> list[str]:
    """Returns the override of `--profile`.

    Raises:
        ConfigError: it is not of the form A:B.
    """
    if steps is None:
        return []
    first, mark, last = steps.partition(":")
    if not mark or not first.isdigit() or not last.isdigit():
        raise ConfigError(f"--profile {steps}: give the first and the last step, such as 10:12")
    return [f"logging.profile=[{int(first)}, {int(last)}]"]


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="a sweep's YAML or JSON file")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="resume an interrupted sweep; trials that have ended are kept")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False,
    log_format: LogFormat = None,
    plain: Plain = False,
) -> None:
    """Search for the best values of some keys of a config, with many runs."""
    from myllm_ray.config.sweep import load_sweep
    from myllm_ray.orchestration.sweeps.sweep import sweep as run

    as_json = set_format(log_format, plain)
    try:
        result = run(load_sweep(file, overrides or []), resume=resume, verbose=verbose)
    except KeyboardInterrupt:
        print("stopped; trials that have ended are kept (--resume resumes the sweep)", file=sys.stderr)
        sys.exit(130)
    if not as_json:
        out.print(result.summary())
    if result.best_yaml is not None and not as_json:
        out.print(f"train the best again: myllm-ray train {result.best_yaml}; all trials: {result.folder}/report.html")
    if result.exit_reason is not None:
        if not as_json:
            out.print(f"ended early ({result.exit_reason}); to resume: the same command with --resume")
        sys.exit(0 if result.exit_reason.startswith("budget") else EXIT_PREEMPTED)


@app.command()
def lr_find(
    config: Config,
    overrides: Overrides = None,
    low: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-6,
    high: Annotated[float, typer.Option(help="learning rate of the last step")] = 1.0,
    steps: Annotated[int, typer.Option(help="number of steps")] = 100,
) -> None:
    """Find a learning rate with a range test: one short run in which the learning rate increases."""
    from myllm_ray.orchestration.lr_find import find_lr

    loaded = load_config(config, overrides or [])
    found = find_lr(loaded, low, high, steps)
    out.print(found.summary())
    out.print(
        f"chart: {Path(loaded.run.storage) / loaded.run.name}-lr-find/lr_find.html; "
        "the value is approximate, a sweep refines it"
    )


@app.command()
def submit(
    config: Config,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="address of the cluster's dashboard")
    ] = "http://127.0.0.1:8265",
    working_dir: Annotated[Path, typer.Option(help="folder that is uploaded to the cluster")] = Path(),
) -> None:
    """Run the config as a job on a Ray cluster and follow its output."""
    from myllm_ray.orchestration.submit import submit as run

    load_config(config, overrides or [])  # reports a wrong config before the upload
    sys.exit(run(str(config), overrides or [], address, working_dir))


@app.command()
def stop(
    run: Annotated[Path, typer.Argument(help="the folder of an active run")],
    wait: Annotated[float, typer.Option(min=0, help="seconds to wait until the run ends")] = 600,
) -> None:
    """Stop a run, which saves a checkpoint first. Exit code 1: it has not ended in time."""
    from myllm_ray.engine.liveness.hang_detector import stop as ask

    left = ask(run, wait)
    out.print(f"stopped; newest checkpoint: {left}" if left else f"the run has not ended after {wait:g} s")
    sys.exit(0 if left else 1)
