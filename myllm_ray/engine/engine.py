"""The training loop, whole. One optimizer step, from batch to weights, can be read here from top to bottom."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from myllm_ray.accelerators.base import Accelerator, StepResult
from myllm_ray.common import distributed
from myllm_ray.common.seeds import seed_all
from myllm_ray.common.types import Batch, BatchStream, Micro, Position, RunState, as_mapping, steps_of_run
from myllm_ray.config.errors import CheckpointError, ConfigError, TrainingError
from myllm_ray.engine.callbacks import Callback, CallbackList
from myllm_ray.engine.checkpoint import CheckpointManager
from myllm_ray.engine.checkpoint_writer import WAIT_SECONDS
from myllm_ray.engine.metrics import MetricSum
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.pulse import Pulse
from myllm_ray.engine.records import Ledger, SampleTable
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.engine.settings import EngineSettings
from myllm_ray.engine.stability import Stability
from myllm_ray.engine.stream import InMemoryStream
from myllm_ray.ops.dropout import StepDropout
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)
_ENDINGS = ("leave", "abandon")
"""Requests that end a run before its last step, in order of priority: where both are made, the run saves and loses no work."""


class TrainerEngine:
    """Conducts a run: stream -> trainer -> accelerator -> callbacks, evaluation, checkpoints.

    Args:
        trainer: the algorithm.
        accelerator: where the tensors live.
        optimizer_manager, scheduler_manager, checkpoint_manager: what they say; the scheduler defaults to the config's.
        callbacks: in the order in which they are called.
        config: a run's config, as a model or a plain dict.
        stream: global batches; default: the trainer's `dataset`, from memory.
        validation: held-out global batches.
        folder: the run's folder; without one nothing but checkpoints is written.
        manifest: what every checkpoint shall say of the run besides (JSON).
        constants: metrics that do not change, repeated in every line of the log (rows that were skipped).
        pulse: tells which phase this rank is in, and what is asked of it from outside.
    """

    def __init__(self, trainer: BaseTrainer, accelerator: Accelerator, optimizer_manager: OptimizerManager,
                 scheduler_manager: SchedulerManager | None = None, checkpoint_manager: CheckpointManager | None = None,
                 callbacks: Iterable[Callback] = (), config: Any = None, stream: BatchStream | None = None,
                 validation: BatchStream | None = None, folder: str | None = None, manifest: dict[str, Any] | None = None,
                 constants: dict[str, float] | None = None, pulse: Pulse | None = None):
        self.trainer, self.accelerator = trainer, accelerator
        self.optimizers, self.schedulers = optimizer_manager, scheduler_manager or SchedulerManager(config=config)
        self.checkpoints = checkpoint_manager
        self.settings = EngineSettings.from_config(config)
        if checkpoint_manager is not None and checkpoint_manager.on_request and not as_mapping(config).get("checkpoint"):
            self.settings.save_at_end = False
        self.stream, self.validation = stream, validation
        self.manifest, self.constants = manifest or {}, constants or {}
        self.pulse = pulse or Pulse()
        self.stability = Stability(self.settings.stability, folder)
        self.state = RunState(folder=folder)
        self.metrics: dict[str, float] = {}
        self._callbacks = tuple(callbacks)
        self._saved_step = -1
        self._skipped_steps = 0
        self._heard: set[str] = set()
        """Requests that all ranks know of: what only one of them has asked for is not followed yet."""
        self._warned_of_empty_batch = False
        self._bad: str | None = None
        """What was wrong with the last step, so that it was left out."""

    def setup(self, resume: Path | None = None) -> None:
        """Prepare everything for the first step; with `resume`, go on from a checkpoint."""
        self.accelerator.setup()
        if self.stream is None:
            self.stream = InMemoryStream(self.trainer.dataset, self.settings.batch_size, self.settings.micro_size,
                                         self.settings.seed)
        self.state.is_main = distributed.is_main()
        self.state.total_steps = steps_of_run(
            self.settings.max_steps, self.settings.epochs, self.trainer.steps_per_batch, self.stream.steps_in_epoch)
        if self.state.total_steps % self.trainer.steps_per_batch:
            raise ConfigError(f"run.max_steps={self.state.total_steps} is not a multiple of the {self.trainer.steps_per_batch} optimizer "
                              "steps that are made of each batch (epochs × minibatches)")
        self.callbacks = CallbackList(self._callbacks, self.state.is_main)
        self.stability.load_interventions()
        self.schedulers.total_steps = self.state.total_steps
        self.trainer.model = self.accelerator.prepare(self.trainer.model, self.optimizers.build, self.schedulers.build)
        self.dropout = StepDropout(self.trainer.model, self.settings.seed)
        for name, model in self.trainer.frozen_models.items():
            setattr(self.trainer, name, self.accelerator.prepare_frozen(model))
        if self.trainer.bytes_per_token is not None:
            self.trainer.bytes_per_token = self.trainer.bytes_per_token.to(self.accelerator.device)
        self.trainer.autocast, self.trainer.generation = self.accelerator.autocast, self.accelerator.generation
        if resume is not None:
            self._restore(resume)
        if self.checkpoints and self.checkpoints.background and not self.accelerator.state_is_a_copy:
            self.checkpoints.make_ready(self.accelerator.state())

    def train(self) -> RunState:
        """Run to the last step. The run's folder then holds all that the config asked for."""
        assert self.stream is not None, "call setup() before train()"
        folder = self.state.folder if self.state.is_main else None
        self.ledger = Ledger(folder, self.state.step)
        self.samples = SampleTable(folder, self.state.step, self.settings.samples_every)
        try:
            self.callbacks.emit("on_train_start", self.state)
            if self.settings.evaluate_at_start and self.state.step == 0 and self.validation is not None:
                self.callbacks.emit("on_log", self.state, self.evaluate())
            self.pulse.enter("data", self.state.step + 1)
            left = (self.state.total_steps - self.state.step) // self.trainer.steps_per_batch
            for batch in self.trainer.ahead(self.stream.batches(self.state.position, left)):
                if self.state.step == 0:
                    self.trainer.check(batch)
                self._train_batch(batch)
                if self.state.left is not None or "stop" in self._heard:
                    break
                self.pulse.enter("data", self.state.step + 1)
            # A run that is left saves where it stands; one that goes back to an earlier checkpoint, or is given up, must not.
            wanted = self.settings.save_at_end if self.state.left is None else not (self.state.rewound or self.state.abandoned)
            if self.checkpoints and wanted and self._saved_step != self.state.step:
                self.save()
            self.pulse.enter("end", self.state.step)
            self._wait_for_checkpoint()
            self.callbacks.emit("on_train_end", self.state)
        except BaseException as error:
            self.callbacks.emit("on_exception", self.state, error)
            raise
        finally:
            if self.checkpoints:  # what is being written is not lost when the run fails
                with suppress(CheckpointError, RuntimeError):
                    self.checkpoints.wait(WAIT_SECONDS)
            self.callbacks.close()
            self.ledger.close()
            self.samples.close()
            self.accelerator.close()
        return self.state

    def _train_batch(self, batch: Batch) -> None:
        """All optimizer steps that the trainer makes of one global batch."""
        self.state.epoch, self.state.position = batch.position.epoch, batch.position
        if batch.position.row == 0:
            self.callbacks.emit("on_epoch_start", self.state)
        first, started = self.state.step, time.perf_counter()
        self.pulse.enter("rollout", self.state.step + 1)
        for micros in self.trainer.expand(batch):
            self.callbacks.emit("on_step_start", self.state)
            left_out = self.stability.stepped_over(self.state.step + 1)
            result, sums = self.training_step(micros) if left_out is None else self._step_over()
            if self._bad is not None:
                left_out = self._bad
                if self.stability.intervene(self.state.step + 1, self._bad, self.state.is_main) == "rewind":
                    self.state.left, self.state.rewound = f"step {self.state.step + 1}: {self._bad}: going back", True
                    return
            self.state.step += 1
            self._skipped_steps += result.skipped
            self.callbacks.emit("on_step_end", self.state)
            fingerprint = self._agree(batch.fingerprint, sums)
            self._tell_checkpoints()
            self.ledger.write(self.state.step, batch.position, self._rows(batch), fingerprint, left_out)
            self._report(result, sums, time.perf_counter() - started, batch.position)
            started = time.perf_counter()
        self.samples.write(first, self.state.step, self.trainer.samples)
        self.state.position = batch.next
        if self._due(self.settings.save_every, "save", first) and self.checkpoints:
            self.save()
        if batch.next.epoch != batch.position.epoch:
            self.callbacks.emit("on_epoch_end", self.state)
        decided = self.callbacks.decide(self.state)
        self.callbacks.emit("on_batch_end", self.state)
        if decided:
            self._agree(0)
        ending = next((name for name in _ENDINGS if name in self._heard), None)
        if ending is not None and self.state.step < self.state.total_steps:
            self.state.left, self.state.abandoned = self.state.requests[ending], ending == "abandon"

    def training_step(self, micros: list[Micro]) -> tuple[StepResult, MetricSum]:
        """One optimizer step: the loss is summed over micro-batches and ranks and divided once, by the global weight."""
        self.pulse.enter("forward", self.state.step + 1)  # else a rank that hangs in the next line is named in phase rollout
        weight = self.accelerator.all_reduce([sum(self.trainer.batch_weight(m) for m in micros)])[0]
        self._check_weight(float(weight))
        sums = MetricSum(weight)
        step, self._bad = self.state.step + 1, None
        for i, micro in enumerate(micros):
            self._seed_micro(i)
            with self.accelerator.microbatch(last=i == len(micros) - 1):
                self.pulse.enter("forward", step)
                micro = self.accelerator.move(micro)
                rows = self.trainer.row_places(micro)
                with self.accelerator.autocast(), self.dropout.microbatch(self.state.step, rows, micro.get("input_ids")):
                    output = self.trainer.train_step(micro)
                self.pulse.enter("backward", step)
                self.accelerator.backward(output.loss_sum / max(float(weight), 1e-9))
            sums.add(output)
        self.pulse.enter("optimizer", step)
        if self.stability.active:
            self.accelerator.veto = partial(self._judge, sums.loss(self.accelerator))
        result = self.accelerator.optimizer_step(self.settings.gradient_clip)
        return result, sums

    def _check_weight(self, weight: float) -> None:
        """A batch without a target: an error, unless the trainer says why it may come.

        Raises:
            TrainingError: names the documents of the batch.
        """
        if weight:
            return
        position, allowed, describe = self.state.position, self.trainer.empty_batch_reason, getattr(self.stream, "describe", lambda _: "the batch")
        where = f"step {self.state.step + 1} (epoch {position.epoch}, rows from {position.row} on)"
        if allowed is None:
            raise TrainingError(f"{where} has nothing to train on: no token of {describe(position)} is trained on; see it with "
                                f"`myllm-ray data CONFIG --step {self.state.step + 1}`. data.sequence_length cuts documents off, data.*.format "
                                "says what is trained on")
        if self.state.is_main and not self._warned_of_empty_batch:
            log.warning("%s has nothing to train on: %s. Its gradient is zero. Further steps of this kind are not reported", where, allowed)
        self._warned_of_empty_batch = True

    def _judge(self, loss: float, grad_norm: float) -> bool:
        """The accelerator's question, before it changes a weight: whether to leave the step out."""
        # Each rank computes the norm; kernels or thread counts that differ between ranks may round it differently.
        norm = float(self.accelerator.all_reduce([grad_norm])[0]) / distributed.world_size()
        self._bad = self.stability.judge(loss, norm)
        return self._bad is not None

    def _step_over(self) -> tuple[StepResult, None]:
        """A step without training: only the schedule goes on."""
        self.last_rate, self._bad = self.schedulers.learning_rate, None
        self.schedulers.step()
        return StepResult(0.0, skipped=True), None

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metrics on the held-out data, each named `validation_…`, averaged over all of it as one batch.

        Nothing where the data has no target: a mean over nothing is no metric.
        """
        assert self.validation is not None
        model = self.trainer.model
        model.eval()
        steps = min(self.validation.steps_in_epoch(0), self.settings.evaluate_batches or 2**62)
        total = MetricSum(torch.tensor(0.0, dtype=torch.float64))
        for batch in self.validation.batches(Position(), steps):
            self.pulse.enter("evaluation", self.state.step)
            for micro in self.trainer.evaluation_micros(batch):
                micro = self.accelerator.move(micro)
                total.weight += self.trainer.evaluation_weight(micro).double().cpu()
                with self.accelerator.autocast():
                    total.add(self.trainer.evaluation_step(micro))
        model.train()
        total.weight, checksums = self.accelerator.all_reduce([total.weight, total.checksum])
        total.check_names(int(checksums))
        values = total.reduce(self.accelerator)
        if "loss" not in values:
            if self.state.is_main:
                log.warning("step %d: the held-out data has nothing to evaluate: no validation metrics", self.state.step)
            return {}
        metrics = {**values, **self.trainer.derive(values)}
        metrics = {f"validation_{name}": value for name, value in metrics.items() if name != "tokens" and name[0] != "_"}
        self.callbacks.emit("on_evaluate", self.state, metrics)
        self.metrics = {**self.metrics, **metrics}
        return metrics

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        assert self.checkpoints is not None
        self.pulse.enter("checkpoint", self.state.step)
        folder = self.checkpoints.save(self.state.step, self.accelerator.state(), {
            "position": {"epoch": self.state.position.epoch, "row": self.state.position.row},
            "callbacks": self.callbacks.state_dict(), "metrics": self.metrics, "skipped_steps": self._skipped_steps,
            "stability": self.stability.state_dict(), "trainer": self.trainer.state_dict(),
            "loss_scale": self.accelerator.loss_scale.state_dict(), **self.manifest}, copied=self.accelerator.state_is_a_copy)
        self._saved_step = self.state.step
        self._tell_checkpoints()
        return folder

    def _tell_checkpoints(self) -> None:
        for folder in self.checkpoints.committed() if self.checkpoints else ():
            self.callbacks.emit("on_checkpoint", self.state, str(folder))

    def _wait_for_checkpoint(self, seconds: float | None = None) -> None:
        if self.checkpoints:
            self.checkpoints.wait(seconds)
        self._tell_checkpoints()

    def _restore(self, folder: Path) -> None:
        assert self.checkpoints is not None, "a resume needs a checkpoint manager"
        tensors = self.accelerator.state()
        manifest = self.checkpoints.load(folder, tensors)
        self.accelerator.load_state(tensors)
        self.state.step = self._saved_step = int(manifest["step"])
        self.state.position = Position(**manifest["position"])
        self.state.epoch = self.state.position.epoch
        self.schedulers.set_step(self.state.step)
        self.metrics = manifest.get("metrics", {})
        self._skipped_steps = manifest.get("skipped_steps", 0)
        self.stability.load_state_dict(manifest.get("stability", {}))
        self.accelerator.loss_scale.load_state_dict(manifest.get("loss_scale", {}))
        self.callbacks.load_state_dict(manifest.get("callbacks", {}))
        if manifest.get("trainer"):
            self.trainer.load_state_dict(manifest["trainer"])

    def _report(self, result: StepResult, sums: MetricSum | None, seconds: float, position: Position) -> None:
        """Stop on numbers that are none; evaluate and log when it is time."""
        if not math.isfinite(result.grad_norm) and not result.skipped:
            raise TrainingError(
                f"step {self.state.step}: the gradient is not finite (norm {result.grad_norm}), in the batch at epoch "
                f"{position.epoch}, row {position.row}; see it with `myllm-ray data CONFIG --step {self.state.step}`. "
                "The last checkpoint is kept. Try a lower optimizer.lr, a longer warm-up, or accelerator.precision=fp32")
        evaluated: dict[str, float] = {}
        if self.validation is not None and (self._due(self.settings.evaluate_every, "evaluate") or (
                self.settings.evaluate_at_end and self.state.step == self.state.total_steps)):
            evaluated = self.evaluate()
            self._agree(0)
        if evaluated or self.state.step % self.settings.log_every == 0 or self.state.step == self.state.total_steps:
            self._log(result, sums, evaluated, seconds)

    def _log(self, result: StepResult, sums: MetricSum | None, evaluated: dict[str, float], seconds: float) -> None:
        values = sums.reduce(self.accelerator) if sums else {}  # nothing was computed in a step that was stepped over
        self.metrics = {**values, **(self.trainer.derive(values) if values else {}), "learning_rate": self.last_rate}
        self.metrics = {name: value for name, value in self.metrics.items() if name[0] != "_"}
        if not result.skipped:  # an overflowing gradient has no norm
            self.metrics["grad_norm"] = result.grad_norm
        if self.accelerator.loss_scale.enabled:
            self.metrics["loss_scale"] = self.accelerator.loss_scale.value
        if self.accelerator.loss_scale.enabled or self.stability.active:
            self.metrics["skipped_steps"] = float(self._skipped_steps)
            self.metrics = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        self.metrics.update({**evaluated, **self.constants, "time": time.time(),
                             "tokens_per_second": values.get("tokens", 0.0) / seconds})
        self.callbacks.emit("on_log", self.state, self.metrics)

    def _due(self, every: int | None, request: str, since: int | None = None) -> bool:
        """Whether a multiple of `every` steps was reached, in this step or in one after `since`; or it was asked for."""
        asked = request in self._heard
        if asked:
            self._heard.discard(request)
            self.state.requests.pop(request, None)
        since = self.state.step - 1 if since is None else since
        return asked or bool(every and self.state.step // every > since // every)

    def _agree(self, fingerprint: int, sums: MetricSum | None = None) -> int:
        """Sum the fingerprint over ranks, and let every rank have the requests that any rank has.

        A checkpoint that failed in the background of one rank ends the run on all, at the same step. So do metrics that differ
        between ranks: they are reduced by position, in `sums.reduce`.
        """
        names = ("save", "evaluate", "stop", "leave", "abandon")
        if self.pulse.leave is not None:
            self.state.requests["leave"] = self.pulse.leave
        failed = self.checkpoints is not None and self.checkpoints.failed
        total, failures, checksums, *asked = self.accelerator.all_reduce_ints(
            [fingerprint, failed, sums.checksum if sums else 0, *(n in self.state.requests for n in names)])
        if sums:
            sums.check_names(checksums)
        if failures:
            self._wait_for_checkpoint(WAIT_SECONDS)
            raise CheckpointError("another rank could not write its part of the checkpoint; its own message says why")
        self._heard.update(name for name, count in zip(names, asked, strict=True) if count)
        if any(0 < count < distributed.world_size() for count in asked):  # rare, and seen on every rank alike
            for reasons in distributed.gather_objects({name: self.state.requests[name] for name in names if name in self.state.requests}):
                self.state.requests = {**reasons, **self.state.requests}
        return total

    def _seed_micro(self, index: int) -> None:
        """What a model draws from torch's generators depends on (seed, step, place of the micro-batch), not on restarts.

        Dropout does not draw from them (`ops/dropout.py`).
        """
        self.last_rate = self.schedulers.learning_rate
        place = index * distributed.world_size() + distributed.rank()
        seed_all("micro", self.settings.seed, self.state.step, place)

    @staticmethod
    def _rows(batch: Batch) -> int:
        return sum(len(next(iter(m.values()))) for m in batch.micros) * distributed.world_size()
