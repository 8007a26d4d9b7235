"""Commands about the speed, the memory and the price of a config: bench, estimate."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer
from rich.table import Table

from myllm_ray.cli.app import Config, Overrides, app
from myllm_ray.cli.tables import out
from myllm_ray.config.load import load_config
from myllm_ray.engine.reporting.terminal import memory

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


@app.command()
def bench(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="number of steps that are measured")] = 10,
    as_json: AsJson = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="show Ray's own logs")] = False,
) -> None:
    """Train a few steps of a config and print its speed, MFU, time per phase and memory."""
    from myllm_ray.orchestration.bench import bench as run

    result = run(load_config(config, overrides or []), steps, verbose)
    if as_json:
        print(json.dumps(result.as_json()))
        return
    table = Table(title=f"medians of {result.steps} steps", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("tokens per second", f"{result.tokens_per_second:,.0f}")
    table.add_row("seconds per step", f"{result.step_seconds:.4g}")
    if result.tflops_per_second is not None:
        table.add_row("model TFLOP/s per worker", f"{result.tflops_per_second:.4g}")
    if result.mfu is not None:
        table.add_row("MFU", f"{result.mfu:.1%} of {result.peak_tflops:.4g} TFLOP/s")
    for name, seconds in sorted(result.seconds.items(), key=lambda pair: -pair[1]):
        table.add_row(f"  {name}", f"{seconds:.4f} s  {_share(seconds, result.step_seconds)}")
    table.add_row("peak memory of the process", memory(result.host_memory))
    if result.device_memory is not None:
        table.add_row("peak memory of the device", memory(result.device_memory))
    out.print(table)
    if result.mfu is not None:
        out.print(f"peak: {result.peak_source}")


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="the accelerators, such as h100x8; here: measure some steps on this machine")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="assumed MFU")] = 0.4,
    usd_per_hour: Annotated[float | None, typer.Option(min=0, help="price of all hardware per hour")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate tokens, operations, memory, communication, time and price of a config before it is trained."""
    from myllm_ray.common.hardware import hardware_of
    from myllm_ray.verify.estimate import estimate as run

    loaded = load_config(config, overrides or [])
    here = hardware == "here"
    found = run(loaded, None if hardware is None or here else hardware_of(hardware), mfu, usd_per_hour)
    if here:
        # Imports Ray, which would count as memory of the run.
        from myllm_ray.orchestration.bench import bench as measure

        found = replace(found, step_seconds=measure(loaded, 5).step_seconds)
    if as_json:
        print(json.dumps(found.as_json()))
        return
    data, steps = found.data, max(1, found.data.steps)
    table = Table(
        title=f"{found.workers} worker{'s' * (found.workers > 1)}, {found.hardware}",
        title_justify="left",
        show_header=False,
    )
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("parameters", f"{found.parameters:,}")
    table.add_row("  trained", f"{found.trained_parameters:,}")
    table.add_row("steps", f"{data.steps:,}")
    table.add_row("tokens", f"{data.tokens:,}")
    for source, count in data.by_source.items() if len(data.by_source) > 1 else ():
        table.add_row(f"  of {source}", f"{count:,}  {_share(count, data.tokens)}")
    table.add_row("  with a loss", f"{data.trained:,}")
    table.add_row("  per step", f"{data.tokens / steps:,.0f}")
    table.add_row("padding", f"{1 - data.tokens / max(1, data.positions):.1%}")
    table.add_row("model FLOPs per step", f"{data.flops / steps:.3g}")
    table.add_row("memory per worker", memory(found.total_memory))
    for name, size in found.memory.items():
        table.add_row(f"  {name}", memory(size))
    for name, size in found.communication.items():
        table.add_row(f"sent per step and worker: {name}", memory(size))
    if found.step_seconds is not None and found.hours is not None:
        table.add_row("seconds per step", f"{found.step_seconds:.3g}")
        table.add_row("hours", f"{found.hours:.3g}")
    if found.usd is not None:
        table.add_row("USD", f"{found.usd:,.2f}")
    out.print(table)
    for note in found.notes:
        out.print(note)


def _share(part: float, whole: float) -> Any:
    return f"{part / whole:>6.1%}" if whole else ""
