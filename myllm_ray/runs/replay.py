"""Makes one step of a run again, in this process, and finds the rows that determine its loss and its gradient.

A run is a function of its config, so the step needs only the nearest checkpoint before it: the steps in between are
trained again in memory. Neither the backend nor the number of workers of the run matters. Nothing is written to the
run's folder.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from myllm_ray.base_weights import check_base
from myllm_ray.common.determinism import determinism
from myllm_ray.common.files import read_jsonl
from myllm_ray.common.types import Batch, Micro, Position, RunState
from myllm_ray.config.amendments import effective, segments
from myllm_ray.config.errors import CheckpointError, ConfigError, DataError, TrainingError
from myllm_ray.config.load import validate
from myllm_ray.config.schema import TrainerConfig
from myllm_ray.data.examples import PROMPTS
from myllm_ray.data.inspect import rows_of_step
from myllm_ray.data.prepare import PreparedData
from myllm_ray.data.stream import LocalStream, StreamSpec
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage, step_of
from myllm_ray.engine.loop import TrainerEngine
from myllm_ray.engine.run_folder import folder_of, resume_source
from myllm_ray.engine.stability import Stability
from myllm_ray.preparation import absolute, of_segment, prepare_data, prepare_run
from myllm_ray.runs.decomposition import Decomposition, decompose
from myllm_ray.worker import build_engine, run_worker, set_up_accelerator

log = logging.getLogger(__name__)
_SAME_LOSS = 1e-5
"""Relative difference of two losses above which a repeated step is reported as different."""


@dataclass
class Replay:
    """A step that was made again.

    Attributes:
        step: the optimizer step, counted from 1.
        epoch, first_row: position of its global batch in the data.
        start: the step from which training was repeated; 0 without a checkpoint.
        tokens_hash: hash of the batch, as in `ledger.jsonl`.
        loss, grad_norm: of the repeated step, over the whole global batch, before clipping.
        logged: the metrics that the run logged for the step; empty if it logged none.
        left_out: why the step changed no weight, or None.
        deviations: (step, loss of the run, loss here) of the steps whose losses differ.
        parts: the shares of the rows and documents, and the norms per layer.
    """

    step: int
    epoch: int
    first_row: int
    start: int
    tokens_hash: str
    loss: float
    grad_norm: float
    logged: dict[str, Any]
    left_out: str | None
    deviations: list[tuple[int, float, float]]
    parts: Decomposition
    prepared: PreparedData = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Returns the replay without the data, as JSON-compatible values: null for numbers that are not finite."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "prepared"}
        return _finite({**values, "parts": asdict(self.parts)})  # type: ignore[no-any-return]


def _finite(value: Any) -> Any:
    """Replaces non-finite numbers by None, because JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replay(
    run: Path,
    step: int,
    drop: Sequence[int] = (),
    device: str = "auto",
    precision: str | None = None,
    gradients: bool = True,
) -> Replay:
    """Makes a step of a run again.

    Args:
        run: the run's folder. It is only read.
        step: the optimizer step, counted from 1, as in the log.
        drop: numbers of rows; the result contains the loss and the gradient norm without them.
        device: `auto`, `cpu` or `cuda`.
        precision: default: the run's.
        gradients: whether to compute the gradient of each row, which needs two more backward passes of the batch and
            memory for another copy of the gradients, or for two with `drop`.

    Raises:
        ConfigError: the folder is not that of a run, the run has no such step or row, or its steps can't be repeated.
        DataError: the data is not that of the run.
    """
    whole = _config_of(run, device, precision)
    recorded = {int(row["step"]): row for row in read_jsonl(run / "ledger.jsonl") if "step" in row}
    if step not in recorded:
        steps = f"1 to {max(recorded)}" if recorded else "none"
        raise ConfigError(f"--step {step}: {run} has no such step; the steps in its ledger.jsonl: {steps}")
    config = _segment_of(whole, step)
    start = _start(run, config, step)
    _check_repeatable(config)
    first = step_of(start) if start else 0
    if step - first > 1:
        where = f"from {start}" if start else "from the first step: no earlier checkpoint exists"
        log.info("training steps %d to %d again, %s", first + 1, step - 1, where)
    losses = _Losses(run)
    with determinism(config.run.determinism), tempfile.TemporaryDirectory() as scratch:
        start = _reach_segment(whole, start, step, run, Path(scratch), losses)
        prepared = of_segment(prepare_data(config), config)
        spec = prepared.train
        sizes = [(at, now.batch.global_size) for at, now in segments(whole)]
        position, _, fingerprint = rows_of_step(spec, step, config.steps_per_batch, sizes)
        rows = range(position.row, position.row + spec.global_size)
        numbered = drop if spec.plan.store.kind != PROMPTS else ()  # answers are numbered within the step
        _check_rows(rows, step, numbered, f"{fingerprint:016x}", recorded[step]["tokens_hash"])
        stream = _FineStream(spec, position)
        engine = build_engine(
            config,
            prepared,
            open_tokenizer(prepared.tokenizer_folder),
            set_up_accelerator(config),
            engine=partial(_ReplayEngine, run=run, scratch=Path(scratch), target=step, drop=drop, gradients=gradients),
            stream=stream,
            callbacks=[losses],
        )
        engine.setup(resume=start)
        try:
            engine.train()
        except TrainingError:
            if engine.parts is None:
                raise  # else the step ended the run, which is why it is replayed
    if engine.parts is None:
        reason = recorded[step].get("left_out", "its batch was not computed")
        raise ConfigError(f"--step {step}: the run left it out: {reason}")
    return Replay(
        step,
        position.epoch,
        position.row,
        first,
        recorded[step]["tokens_hash"],
        engine.parts.loss,
        engine.norm,
        losses.logged.get(step, {}),
        recorded[step].get("left_out"),
        losses.different,
        engine.parts,
        prepared,
    )


def _config_of(run: Path, device: str, precision: str | None) -> TrainerConfig:
    """Returns the run's config for one process: other backends make the same step."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not the folder of a run: it has no config.yaml")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    then = raw.get("accelerator") or {}
    raw["accelerator"] = {
        "name": "single",
        "device": device,
        "precision": precision or then.get("precision", "fp32"),
        "activation_checkpointing": then.get("activation_checkpointing", "none"),
    }
    raw["scaling"] = {}
    raw["checkpoint"] = {"resume": (raw.get("checkpoint") or {}).get("resume", "never"), "at_end": False}
    raw["callbacks"] = raw["tracking"] = []
    return absolute(validate(raw, where=str(path)))


def _segment_of(config: TrainerConfig, step: int) -> TrainerConfig:
    """Returns the config of a step, as that of a run without amendments."""
    now = effective(config, step - 1).model_copy(deep=True)
    now.run.amendments = []
    return now


def _reach_segment(
    config: TrainerConfig, start: Path | None, step: int, run: Path, scratch: Path, losses: Callback
) -> Path | None:
    """Trains to the last amendment before a step again, if the checkpoint is older.

    Args:
        config: the config of the whole run.
        start: the checkpoint to begin with.
        step: the step that is replayed.
        run: the run's folder, which is only read.
        scratch: a temporary folder, which gets the checkpoint of the amendment.
        losses: observes the repeated steps.

    Returns:
        A checkpoint from which no amendment lies between it and the step, or None for the start of the run.
    """
    amended = max((amendment.at for amendment in config.run.amendments if amendment.at < step), default=0)
    if amended == 0 or (start is not None and step_of(start) >= amended):
        return start
    config = config.model_copy(deep=True)
    config.run.storage = str(scratch)
    prepared = prepare_run(config, warn=False)
    _copy_interventions(run, folder_of(config))
    while start is None or step_of(start) < amended:
        start = Path(run_worker(config, prepared, callbacks=[losses], start=start)["checkpoint"])
    return start


def _copy_interventions(run: Path, folder: Path) -> None:
    """Makes a repeated run leave out the steps that the run left out. Its own interventions go into the copy."""
    if (run / "interventions.jsonl").exists():
        shutil.copy(run / "interventions.jsonl", folder)


def _check_repeatable(config: TrainerConfig) -> None:
    # Off-policy answers come from weights that no checkpoint contains.
    if getattr(getattr(config, "rollout", None), "placement", "colocated") == "actors":
        raise ConfigError(
            "replay: the answers of this run come from actors with older weights (rollout.placement=actors): "
            "its steps can't be repeated"
        )


def _start(run: Path, config: TrainerConfig, step: int) -> Path | None:
    """Returns the checkpoint to begin with: the newest complete one before the step's batch, or the run's first one."""
    before = (step - 1) // config.steps_per_batch * config.steps_per_batch
    for path in reversed(CheckpointManager(folder=run / "checkpoints").all()):
        if step_of(path) <= before:
            damage = find_damage(path)
            if damage is None:
                check_base(path, "replay: ")
                return path
            log.warning("checkpoint skipped: %s", damage)
    resume = config.checkpoint.resume
    if resume in ("auto", "never"):
        return None
    try:
        return resume_source(resume)
    except CheckpointError as error:
        raise ConfigError(f"replay: the checkpoint that the run began with can't be read: {error}") from None


def _check_rows(rows: range, step: int, drop: Sequence[int], found: str, recorded: str) -> None:
    if found != recorded:
        raise DataError(
            f"step {step}: its batch is not that of the run (hash {found}, in ledger.jsonl {recorded}): "
            "the data has changed"
        )
    wrong = next((row for row in drop if row not in rows), None)
    if wrong is not None:
        raise ConfigError(f"--drop {wrong}: step {step} has rows {rows.start} to {rows.stop - 1}")


class _FineStream:
    """The stream of a run whose last global batch is cut into micro-batches of one row.

    Args:
        spec: the stream of the run.
        last: position of the global batch that is cut.
    """

    def __init__(self, spec: StreamSpec, last: Position):
        self.spec = spec
        self._coarse, self._fine = LocalStream(spec), LocalStream(replace(spec, micro_size=1))
        self._last = last
        self.sources, self.describe = self._coarse.sources, self._coarse.describe

    def steps_in_epoch(self, epoch: int) -> int:
        return self._coarse.steps_in_epoch(epoch)

    def batches(self, start: Position, steps: int) -> Iterator[Batch]:
        """Yields the batches from `start` to the last one, and ends the run with it."""
        for batch in self._coarse.batches(start, steps):
            if batch.position == self._last:
                yield from self._fine.batches(self._last, 1)
                return
            yield batch


class _Losses(Callback):
    """Compares the losses of repeated steps with those of the run."""

    def __init__(self, run: Path):
        super().__init__()
        self.logged = {int(row["step"]): row for row in read_jsonl(run / "metrics.jsonl") if "step" in row}
        self.different: list[tuple[int, float, float]] = []

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None:
        there, here = self.logged.get(state.step, {}).get("loss"), metrics.get("loss")
        if there is not None and here is not None and not math.isclose(there, here, rel_tol=_SAME_LOSS):
            self.different.append((state.step, there, here))


class _ReplayEngine(TrainerEngine):
    """An engine that decomposes the loss and the gradient of one step before it makes the step.

    Args:
        run: the run's folder, which is only read.
        scratch: an empty folder.
        target: the step.
        drop, gradients: see `replay`.
        arguments, options: the arguments of `TrainerEngine`.
    """

    def __init__(
        self,
        *arguments: Any,
        run: Path,
        scratch: Path,
        target: int,
        drop: Sequence[int],
        gradients: bool,
        **options: Any,
    ):
        super().__init__(*arguments, **{**options, "validation": None})
        self._target, self._drop, self._gradients = target, frozenset(drop), gradients
        self.parts: Decomposition | None = None
        self.norm = math.nan
        _copy_interventions(run, scratch)
        self.stability = Stability(self.settings.stability, str(scratch))

    def training_step(self, micros: list[Micro]) -> Any:
        if self.state.step + 1 != self._target:
            return super().training_step(micros)
        self.parts = decompose(self, micros, self._drop, self._gradients)
        result, sums = super().training_step(micros)
        self.norm = float(result.grad_norm)
        return result, sums
