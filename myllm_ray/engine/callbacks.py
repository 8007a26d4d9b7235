"""Callbacks observe a run and can request actions of the engine. They never change a loss or a gradient.

Events are called in the following order, on every rank unless the class sets `main_only`:

    on_train_start(state)
    for each global batch:
        on_epoch_start(state)                      # before the first step of an epoch
        for each optimizer step of the batch:
            on_step_start(state)
            ...forward, backward, optimizer...
            on_step_end(state)
            on_evaluate(state, metrics)            # every evaluation.every_steps, or on request
            on_log(state, metrics)                 # every logging.every_steps; reduced over ranks, evaluation included
        on_checkpoint(state, folder)               # every checkpoint.every_steps, or on request
        on_epoch_end(state)
        on_batch_end(state)                        # everything of the batch is logged and saved
    on_train_end(state)  or  on_exception(state, error)
    close()                                        # always

`state.request(what, reason)` requests an action of the engine. A request of one rank applies to all ranks. The ranks
exchange requests in each step, after on_step_end and after on_evaluate. A request that is made later is exchanged in
the next step, or after on_batch_end if `decides` has returned true. The action follows the exchange:

    evaluate    in the same step if it is requested in on_step_end, else in the next step
    save        after the last step of the batch (PPO and GRPO make several steps per batch)
    stop        after the last step of the batch, as if it were the last step of the run
    preempt     after the last step of the batch: saves a checkpoint and ends the training process. Without Ray the run
                ends and can be resumed. On Ray the supervisor resumes it at once with new workers, unless a stop of the
                run was requested (`myllm-ray stop`, Ctrl-C).
    abort       after the last step of the batch: ends the run without saving
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.sections import Section
from myllm_ray.config.validation import typed
from myllm_ray.engine.reporting.events import listening

if TYPE_CHECKING:  # a tracker's delivery process imports this module and does not need torch
    from myllm_ray.common.types import RunState


class Callback:
    """Base class of callbacks; its events do nothing.

    A subclass overrides the events that it needs. State that must survive a resume is returned by `state_dict`.
    """

    class Config(Section):
        """Settings of the callback; empty by default. A callback with settings declares its own `Config`."""

    def __init__(self, config: Any = None, **options: Any):
        """Sets `self.config`.

        Args:
            config: an instance of `Config`; default: constructed from `options`.
        """
        self.config: Any = typed(self.Config, options, type(self).__name__) if config is None else config

    main_only = False
    """Whether the callback runs on rank 0 only, because it writes files or shows output."""
    on_driver = False
    """Whether the callback runs in the driver process when training runs in Ray workers, because it shows output."""

    kept_open = False
    """Whether the callback shows several attempts of a run, so that the engine does not close it after the first."""

    def on_train_start(self, state: RunState) -> None: ...

    def on_epoch_start(self, state: RunState) -> None: ...

    def on_step_start(self, state: RunState) -> None: ...

    def on_step_end(self, state: RunState) -> None: ...

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None: ...

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, state: RunState, folder: str) -> None: ...

    def on_epoch_end(self, state: RunState) -> None: ...

    def decides(self, state: RunState) -> bool:
        """Returns whether the following on_batch_end may make a request that all ranks must act on immediately.

        Must return the same value on every rank: if it is true, the engine exchanges requests in one more collective.
        """
        return False

    def on_batch_end(self, state: RunState) -> None: ...

    def on_train_end(self, state: RunState) -> None: ...

    def on_exception(self, state: RunState, error: BaseException) -> None: ...

    def close(self) -> None: ...

    def on_event(self, event: dict[str, Any]) -> None:
        """Receives an event of the run (`engine/reporting/events.py`), from before the data is prepared to the end.

        Only callbacks with `on_driver` of a run that `train` has started receive events, in the process that started
        it. The calls come from several threads, one at a time.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the JSON-like state that is saved in every checkpoint."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


class CallbackList:
    """Calls the events of several callbacks, in the given order.

    Args:
        callbacks: the callbacks of all ranks.
        is_main: whether this process is rank 0; other ranks drop the callbacks with `main_only`.

    Raises:
        ConfigError: a callback with `main_only` overrides `decides`.
    """

    def __init__(self, callbacks: Iterable[Callback], is_main: bool = True):
        callbacks = list(callbacks)
        for callback in callbacks:
            # Other ranks do not have the callback: rank 0 alone would enter the collective that follows.
            if callback.main_only and type(callback).decides is not Callback.decides:
                raise ConfigError(
                    f"callbacks: {type(callback).__name__} overrides `decides`, which must return the same value on "
                    "every rank, and is main_only: remove main_only"
                )
        self.callbacks = [c for c in callbacks if is_main or not c.main_only]

    def emit(self, event: str, state: RunState, *payload: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(state, *payload)

    def decide(self, state: RunState) -> bool:
        return any(callback.decides(state) for callback in self.callbacks)

    def close(self) -> None:
        for callback in self.callbacks:
            if not callback.kept_open:
                callback.close()

    def state_dict(self) -> dict[str, Any]:
        """Returns the non-empty states, by class name and number within the class (`EarlyStoppingCallback-1`)."""
        # By class, not by position in the list: a resumed run may have additional callbacks.
        return {key: saved for key, callback in self._keyed() if (saved := callback.state_dict())}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for key, callback in self._keyed():
            if key in saved:
                callback.load_state_dict(saved[key])

    def _keyed(self) -> list[tuple[str, Callback]]:
        counts: dict[str, int] = {}
        keyed = []
        for callback in self.callbacks:
            name = type(callback).__name__
            counts[name] = counts.get(name, 0) + 1
            keyed.append((f"{name}-{counts[name]}", callback))
        return keyed


@contextmanager
def observing(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Passes the events of this process to the callbacks while the block runs, and closes them at its end."""
    with ExitStack() as stack:
        for callback in callbacks:
            callback.kept_open = True
            stack.callback(setattr, callback, "kept_open", False)
            stack.callback(callback.close)
        stack.enter_context(listening(*(callback.on_event for callback in callbacks)))
        yield


class EarlyStoppingCallback(Callback):
    """Stops a run when a metric of the evaluation has not improved for some evaluations."""

    class Config(Section):
        """Settings of early stopping."""

        metric: str = Field("validation_loss", description="name of the metric, as in the log")
        patience: NonNegativeInt = Field(3, description="evaluations without an improvement before the run stops")
        min_delta: float = Field(0.0, description="smallest change that counts as an improvement")
        mode: Literal["min", "max"] = "min"

    config: Config

    def __init__(self, config: Config | None = None, **options: Any):
        super().__init__(config, **options)
        self.sign = 1 if self.config.mode == "min" else -1
        self.best, self.waited = math.inf, 0

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        if self.config.metric not in metrics:
            raise ConfigError(
                f"early_stopping: no metric {self.config.metric!r}; available: {', '.join(sorted(metrics))}"
            )
        value = self.sign * metrics[self.config.metric]
        if not math.isfinite(value):  # a non-finite value does not show whether the model improves
            return
        if value < self.best - self.config.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.config.patience:
            state.request("stop", f"{self.config.metric} has not improved in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.best = math.inf if saved["best"] is None else saved["best"]
        self.waited = saved["waited"]
