"""The training loop: optimizer steps, evaluation, checkpoints and callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from myllm_ray.accelerators.base import Accelerator, StepResult
from myllm_ray.common import distributed
from myllm_ray.common.seeds import seed_all
from myllm_ray.common.types import Batch, BatchStream, Exit, Micro, RunState, as_mapping
from myllm_ray.config.amendments import next_boundary
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.engine.batch_weight import WeightCheck
from myllm_ray.engine.callbacks import Callback, CallbackList
from myllm_ray.engine.checkpointing.contents import manifest_of, opened, restore
from myllm_ray.engine.checkpointing.manager import CheckpointManager
from myllm_ray.engine.checkpointing.writer import WAIT_SECONDS
from myllm_ray.engine.ema import WeightAverage
from myllm_ray.engine.evaluation import EvaluationTasks, evaluate_all
from myllm_ray.engine.exits import AGREED, SAVED, exit_of
from myllm_ray.engine.liveness.heartbeat import Heartbeat
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.prefetch import PrefetchedBatches
from myllm_ray.engine.reporting.figures import Figures
from myllm_ray.engine.reporting.jsonl import Ledger, SampleTable
from myllm_ray.engine.reporting.metrics import MetricSum
from myllm_ray.engine.reporting.step_report import StepReports
from myllm_ray.engine.scheduler import SchedulerManager
from myllm_ray.engine.settings import EngineSettings
from myllm_ray.engine.stability import Stability
from myllm_ray.engine.stream import InMemoryStream
from myllm_ray.ops.dropout import StepDropout
from myllm_ray.ops.workload import Workload
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)


class TrainerEngine:
    """Runs a trainer on a stream of batches: optimizer steps, callbacks, evaluation, checkpoints.

    Args:
        trainer: the algorithm: losses of micro-batches, and the weights by which they are averaged.
        accelerator: the backend: devices, precision, sharding, gradient exchange.
        optimizer_manager, scheduler_manager, checkpoint_manager: the scheduler defaults to the one of `config`.
        callbacks: called in this order.
        config: a run's config, as a `TrainerConfig` or a plain dict.
        stream: global batches; default: the rows of the trainer's `dataset`.
        validation: held-out global batches.
        tasks: evaluated together with the held-out batches.
        folder: the run's folder; None writes nothing but checkpoints.
        manifest: entries (JSON) that every checkpoint's manifest contains in addition.
        constants: metrics that do not change and are repeated in every line of the log (skipped rows).
        heartbeat: reports the phase of this rank, and receives requests from other processes.
        flops: the operations of the forward and backward pass of a workload; None: they are not logged.
    """

    def __init__(
        self,
        trainer: BaseTrainer,
        accelerator: Accelerator,
        optimizer_manager: OptimizerManager,
        scheduler_manager: SchedulerManager | None = None,
        checkpoint_manager: CheckpointManager | None = None,
        callbacks: Iterable[Callback] = (),
        config: Any = None,
        stream: BatchStream | None = None,
        validation: BatchStream | None = None,
        folder: str | None = None,
        manifest: dict[str, Any] | None = None,
        constants: dict[str, float] | None = None,
        heartbeat: Heartbeat | None = None,
        tasks: EvaluationTasks | None = None,
        flops: Callable[[Workload], float] | None = None,
    ):
        self.trainer, self.accelerator = trainer, accelerator
        self.optimizers, self.schedulers = optimizer_manager, scheduler_manager or SchedulerManager(config=config)
        self.checkpoints = checkpoint_manager
        self.settings = EngineSettings.from_config(config)
        on_request = checkpoint_manager is not None and checkpoint_manager.on_request
        if on_request and not as_mapping(config).get("checkpoint"):
            self.settings.checkpoint.at_end = False
        self.stream, self.validation, self.tasks, self._flops = stream, validation, tasks, flops
        self.evaluates = validation is not None or tasks is not None
        self.manifest, self.constants = manifest or {}, constants or {}
        self.heartbeat, self.average = heartbeat or Heartbeat(), WeightAverage(config)
        self.stability = Stability(self.settings.stability, folder)
        self.state = RunState(folder=folder)
        self.metrics: dict[str, float] = {}
        self.reports = StepReports(self)
        self.batches: PrefetchedBatches | None = None
        self._callbacks = tuple(callbacks)
        self._saved_step = -1
        # The weights of a model that is not trained completely are saved, unless they can be built again.
        self.saves_frozen = not self.manifest.get("identity", {}).get("base")
        self.skipped_steps = 0
        self._agreed: set[str] = set()
        """Requests that all ranks have received. If one rank acted alone, the others would wait in a collective."""

    def setup(self, resume: Path | None = None, manifest: dict[str, Any] | None = None) -> None:
        """Prepares everything for the first step.

        Args:
            resume: folder of the checkpoint to resume from.
            manifest: its manifest, if the checkpoint has been verified.
        """
        self.accelerator.setup()  # first: the stream depends on the rank and the world size
        if self.stream is None:
            self.stream = InMemoryStream(
                self.trainer.dataset, self.settings.batch.global_size, self.settings.micro_size, self.settings.run.seed
            )
        self.state.is_main = distributed.is_main()
        for note in self.accelerator.notes() if self.state.is_main else ():
            log.warning("%s", note)
        steps_per_batch, run = self.trainer.steps_per_batch, self.settings.run
        self.state.total_steps = run.total_steps(steps_per_batch, self.stream.steps_in_epoch)
        if self.state.total_steps % steps_per_batch:
            raise ConfigError(
                f"run.max_steps={self.state.total_steps} is not a multiple of the {steps_per_batch} "
                "optimizer steps per batch (epochs × minibatches)"
            )
        self._weights = WeightCheck(self.trainer, self.stream)
        self.callbacks = CallbackList(self._callbacks, self.state.is_main)
        self.figures = Figures(self.trainer, self.accelerator, self.heartbeat, self._flops)
        self.stability.load_interventions()
        self.schedulers.total_steps = self.state.total_steps
        manifest = opened(self, resume, manifest)
        # The backend calls `build` after it has sharded the model, because the optimizer must refer to the shards.
        self.optimizers.check(self.accelerator.optimizer_layout)
        self.average.check(self.accelerator)
        self.trainer.model = self.accelerator.prepare(self.trainer.model, self.optimizers.build, self.schedulers.build)
        self.average.prepare(self.accelerator)
        self.dropout = StepDropout(self.trainer.model, self.settings.run.seed)
        for name, model in self.trainer.frozen_models.items():
            setattr(self.trainer, name, self.accelerator.prepare_frozen(model))
        if self.trainer.bytes_per_token is not None:
            self.trainer.bytes_per_token = self.trainer.bytes_per_token.to(self.accelerator.device)
        self.trainer.autocast, self.trainer.generation = self.accelerator.autocast, self.accelerator.generation
        if resume is not None:  # after `prepare`: the tensors are loaded into the shards of this backend
            restore(self, resume, manifest)
            self._saved_step = self.state.step
        # Allocates the buffers of background checkpoints now, so that the first checkpoint does not take longer.
        if self.checkpoints and self.checkpoints.background and not self.accelerator.state_is_a_copy:
            self.checkpoints.make_ready({**self.accelerator.state(self.saves_frozen), **self.average.tensors()})

    def train(self) -> RunState:
        """Trains to the last step, or until a request ends the run, and returns the final state."""
        assert self.stream is not None, "call setup() before train()"
        folder = self.state.folder if self.state.is_main else None
        self.ledger = Ledger(folder, self.state.step)
        self.samples = SampleTable(folder, self.state.step, self.settings.logging.samples_every_steps)
        self._boundary = next_boundary(self.settings.run.amendments, self.state.step)
        try:
            self.callbacks.emit("on_train_start", self.state)
            if self.settings.evaluation.at_start and self.state.step == 0 and self.evaluates:
                self.callbacks.emit("on_log", self.state, self.evaluate())
            self.heartbeat.enter("data", self.state.step + 1)
            self.batches = self._prefetch(self.stream)
            for batch in self.trainer.prefetch_rollouts(self.batches):
                if self.state.step == 0:
                    self.trainer.check(batch)
                self._train_batch(batch)
                if self.state.exit is not None or "stop" in self._agreed:
                    break
                self.heartbeat.enter("data", self.state.step + 1)
            self.reports.finish()
            # A run that rewinds or is aborted must not save.
            exit = self.state.exit
            wanted = self.settings.checkpoint.at_end if exit is None else exit.kind in SAVED
            if self.checkpoints and wanted and self._saved_step != self.state.step:
                self.save()
            self.heartbeat.enter("end", self.state.step)
            self._wait_for_checkpoint()
            self.callbacks.emit("on_train_end", self.state)
        except BaseException as error:
            self.callbacks.emit("on_exception", self.state, error)
            raise
        finally:
            if self.batches is not None:
                self.batches.close()
            if self.checkpoints:  # completes a checkpoint that is being written, also after a failure of the run
                with suppress(CheckpointError, RuntimeError):
                    self.checkpoints.wait(WAIT_SECONDS)
            self.callbacks.close()
            self.ledger.close()
            self.samples.close()
            self.accelerator.close()
        return self.state

    def _prefetch(self, stream: BatchStream) -> PrefetchedBatches:
        left = (self.state.total_steps - self.state.step) // self.trainer.steps_per_batch
        depth = self.settings.prefetch_batches
        return PrefetchedBatches(stream.batches(self.state.position, left), self.trainer, self.accelerator, depth)

    def _train_batch(self, batch: Batch) -> None:
        """Runs all optimizer steps of one global batch."""
        self.state.epoch, self.state.position = batch.position.epoch, batch.position
        if batch.position.row == 0:
            self.callbacks.emit("on_epoch_start", self.state)
        first, started = self.state.step, time.perf_counter()
        self.heartbeat.enter("rollout", self.state.step + 1)
        for micros in self.trainer.optimizer_steps(batch):
            self.callbacks.emit("on_step_start", self.state)
            skipped = self.stability.stepped_over(self.state.step + 1)
            result, sums = self.training_step(micros) if skipped is None else self._step_over()
            # The reason depends only on values that were reduced over ranks, so all ranks take the same action.
            if result.reason is not None:
                skipped = result.reason
                if self.stability.intervene(self.state.step + 1, result.reason, self.state.is_main) == "rewind":
                    self.state.exit = Exit("rewind", f"step {self.state.step + 1}: {result.reason}: rewinding")
                    return
            self.reports.finish()  # the previous one: the device is busy with this one while the host reads
            self.state.step += 1
            self.skipped_steps += result.skipped
            self.average.update(self.state.step, result.skipped)
            self.callbacks.emit("on_step_end", self.state)
            fingerprint = self.agree(batch.fingerprint, sums)
            self._tell_checkpoints()
            self.ledger.write(self.state.step, batch.position, self._rows(batch), fingerprint, skipped)
            self.reports.add(result, sums, batch.position, started)
            started = time.perf_counter()
        self.samples.write(first, self.state.step, self.trainer.samples)
        self.state.position = batch.next
        if self.due(self.settings.checkpoint.every_steps, "save", first) and self.checkpoints:
            self.save()
        if batch.next.epoch != batch.position.epoch:
            self.reports.finish()
            self.callbacks.emit("on_epoch_end", self.state)
        decided = self.callbacks.decide(self.state)
        self.callbacks.emit("on_batch_end", self.state)
        if decided:  # the same on every rank, so every rank enters this additional collective
            self.agree(0)
        state = self.state
        state.exit = exit_of(self._agreed, state.requests, state.step, state.total_steps, self._boundary)

    def training_step(self, micros: list[Micro]) -> tuple[StepResult, MetricSum]:
        """Runs one optimizer step and returns its result and the sums of its metrics.

        The loss is summed over micro-batches and ranks and divided once, by the weight of the global batch. It does not
        depend on how the batch is split into micro-batches and ranks.
        """
        micros = [self.trainer.prepare_micro(micro) for micro in micros]
        self.figures.count(micros)
        # Before the all-reduce: a rank that hangs there must not be reported in phase rollout.
        self.heartbeat.enter("forward", self.state.step + 1)
        # On the host: the first backward pass needs the global weight.
        (weight,) = self.accelerator.all_reduce_on_host([sum(self.trainer.batch_weight(m) for m in micros)])
        self._weights.check(weight, self.state)
        sums = MetricSum(weight)
        step = self.state.step + 1
        for i, micro in enumerate(micros):
            # Gradients are accumulated locally and exchanged in the backward pass of the last micro-batch only.
            with self.accelerator.microbatch(last=i == len(micros) - 1):
                self.heartbeat.enter("forward", step)
                micro = self.accelerator.move(micro)
                with self.forward_pass(micro, i):
                    output = self.trainer.train_step(micro)
                self.heartbeat.enter("backward", step)
                # Outside autocast. A batch of weight 0 has a loss of 0, which must not become NaN.
                self.accelerator.backward(output.loss_sum / max(weight, 1e-9))
            sums.add(output)
        self.heartbeat.enter("optimizer", step)
        if not self.stability.active:
            return self.accelerator.optimizer_step(self.settings.gradient_clip), sums
        # `sums.loss` is a collective, which every rank enters before those of the optimizer step.
        judge = partial(self._judge, sums.loss(self.accelerator))
        return self.accelerator.optimizer_step(self.settings.gradient_clip, judge), sums

    @contextmanager
    def forward_pass(self, micro: Micro, index: int) -> Iterator[None]:
        """The context of a forward pass of a training step: random numbers, dropout and precision.

        Args:
            micro: the micro-batch, on the accelerator's device.
            index: index of the micro-batch among those of this rank.
        """
        self._seed_micro(index)
        rows = self.trainer.row_places(micro)
        dropout = self.dropout.microbatch(self.state.step, rows, micro.get("input_ids"))
        with self.accelerator.autocast(), dropout:
            yield

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        """Returns why the step must be skipped, or None. The accelerator calls this before it changes a weight."""
        # The mean over ranks: different kernels or thread counts may round the norm differently on each rank.
        norm = float(self.accelerator.all_reduce([grad_norm])[0]) / distributed.world_size()
        return self.stability.judge(loss, norm)

    def _step_over(self) -> tuple[StepResult, None]:
        """Skips a step without computing anything. Only the learning-rate schedule advances."""
        self.last_rate = self.schedulers.learning_rate
        self.schedulers.step()
        return StepResult(0.0, skipped=True), None

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Evaluates on the held-out data and on the tasks; see `evaluation.evaluate_all`."""
        enter, most = partial(self.heartbeat.enter, "evaluation", self.state.step), self.settings.evaluation.max_batches
        data, tasks, step = self.validation, self.tasks, self.state.step
        metrics = evaluate_all(self.trainer, self.accelerator, data, tasks, self.average, step, most, enter)
        if metrics:
            self.callbacks.emit("on_evaluate", self.state, metrics)
            self.metrics = {**self.metrics, **metrics}
        return metrics

    def save(self) -> Path:
        """Saves a checkpoint of the current step and returns its folder."""
        assert self.checkpoints is not None
        self.reports.finish()  # a checkpoint never contains the result of a non-finite gradient
        self.heartbeat.enter("checkpoint", self.state.step)
        copied = self.accelerator.state_is_a_copy
        tensors = {**self.accelerator.state(self.saves_frozen), **self.average.tensors()}
        folder = self.checkpoints.save(self.state.step, tensors, manifest_of(self), copied=copied)
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

    def due(self, every: int | None, request: str, since: int | None = None) -> bool:
        """Returns whether a multiple of `every` was reached after step `since` (default: now), or on request."""
        requested = request in self._agreed
        if requested:
            self._agreed.discard(request)
            self.state.requests.pop(request, None)
        since = self.state.step - 1 if since is None else since
        return requested or bool(every and self.state.step // every > since // every)

    def agree(self, fingerprint: int, sums: MetricSum | None = None) -> int:
        """Returns the sum of the fingerprint over ranks, and exchanges requests and failures in the same all-reduce.

        If a rank failed to write a background checkpoint, or if the names of metrics differ between ranks, all ranks
        end at the same step: `MetricSum.reduce` adds by position, and no rank may wait for another in a collective.
        """
        if self.heartbeat.preempt is not None:
            self.state.requests["preempt"] = self.heartbeat.preempt
        if self.heartbeat.amend is not None:
            self.state.requests["amend"] = self.heartbeat.amend
        failed = self.checkpoints is not None and self.checkpoints.failed
        total, failures, checksums, *requested = self.accelerator.all_reduce_ints(
            [fingerprint, failed, sums.checksum if sums else 0, *(name in self.state.requests for name in AGREED)]
        )
        if sums:
            sums.check_names(checksums)
        if failures:
            self._wait_for_checkpoint(WAIT_SECONDS)
            raise CheckpointError("another rank could not write its part of the checkpoint; its message says why")
        self._agreed.update(name for name, count in zip(AGREED, requested, strict=True) if count)
        if any(0 < count < distributed.world_size() for count in requested):  # equal on all ranks, so all gather
            for reasons in distributed.gather_objects(
                {name: self.state.requests[name] for name in AGREED if name in self.state.requests}
            ):
                self.state.requests = {**reasons, **self.state.requests}
        return total

    def _seed_micro(self, index: int) -> None:
        """Seeds torch's generators by (seed, step, index of the micro-batch in the global batch).

        Random numbers of a model therefore do not change after a restart. Dropout does not use them (`ops/dropout.py`).
        """
        self.last_rate = self.schedulers.learning_rate  # read before the optimizer step, which advances the schedule
        place = index * distributed.world_size() + distributed.rank()
        seed_all("micro", self.settings.run.seed, self.state.step, place)

    @staticmethod
    def _rows(batch: Batch) -> int:
        return sum(len(next(iter(m.values()))) for m in batch.micros) * distributed.world_size()
