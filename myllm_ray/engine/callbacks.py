"""Callbacks: they watch a run, and may ask it to save, to evaluate or to stop. They never touch a loss or a gradient.

The order of events, every one on every rank unless the class says `main_only`:

    on_train_start(state)
    for each global batch:
        on_epoch_start(state)                      # in front of the first step of an epoch
        for each optimizer step of the batch:
            on_step_start(state)
            ...forward, backward, optimizer...
            on_step_end(state)
            on_evaluate(state, metrics)            # every evaluation.every_steps, or on request
            on_log(state, metrics)                 # every logging.every_steps; reduced over ranks, evaluation included
        on_checkpoint(state, folder)               # every checkpoint.every_steps, or on request
        on_epoch_end(state)
        on_batch_end(state)                        # all that belongs to the batch is logged and saved
    on_train_end(state)  or  on_exception(state, error)
    close()                                        # always

`state.request("save" | "evaluate" | "stop", reason)` is followed by all ranks when one rank asks: before the step ends if it
asks in on_step_end or on_evaluate, at the end of the next one if it asks in on_log. `abandon` ends the run without a checkpoint, `leave` with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from myllm_ray.common.types import RunState
from myllm_ray.config.errors import ConfigError


class Callback:
    """Override what you want to see. State that must survive a resume goes through `state_dict`."""

    main_only = False
    """Called on rank 0 only (it writes or shows something)."""
    on_driver = False
    """When training runs in Ray workers, called in the process that the user started: it shows something."""

    def on_train_start(self, state: RunState) -> None: ...

    def on_epoch_start(self, state: RunState) -> None: ...

    def on_step_start(self, state: RunState) -> None: ...

    def on_step_end(self, state: RunState) -> None: ...

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None: ...

    def on_log(self, state: RunState, metrics: dict[str, float]) -> None: ...

    def on_checkpoint(self, state: RunState, folder: str) -> None: ...

    def on_epoch_end(self, state: RunState) -> None: ...

    def decides(self, state: RunState) -> bool:
        """Whether on_batch_end, which follows at once, may ask for something that all ranks shall follow at once. Every rank must
        give the same answer."""
        return False

    def on_batch_end(self, state: RunState) -> None: ...

    def on_train_end(self, state: RunState) -> None: ...

    def on_exception(self, state: RunState, error: BaseException) -> None: ...

    def close(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """JSON-like state, saved in every checkpoint."""
        return {}

    def load_state_dict(self, saved: dict[str, Any]) -> None: ...


class CallbackList:
    """Hands events to callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Callback], is_main: bool = True):
        callbacks = list(callbacks)
        for callback in callbacks:
            if callback.main_only and type(callback).decides is not Callback.decides:
                raise ConfigError(f"callbacks: {type(callback).__name__} overrides `decides`, to which every rank must give the same "
                                  "answer, and is main_only: remove main_only")
        self.callbacks = [c for c in callbacks if is_main or not c.main_only]

    def emit(self, event: str, state: RunState, *payload: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(state, *payload)

    def decide(self, state: RunState) -> bool:
        return any(callback.decides(state) for callback in self.callbacks)

    def close(self) -> None:
        for callback in self.callbacks:
            callback.close()

    def state_dict(self) -> dict[str, Any]:
        """States by class name, those of the same class numbered."""
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


class EarlyStoppingCallback(Callback):
    """Stops when a metric of the evaluation has not improved for some evaluations.

    Args:
        metric: as in the log; `validation_loss` by default.
        patience: evaluations without an improvement that are tolerated.
        min_delta: how much counts as an improvement.
        mode: `min` or `max`.
    """

    def __init__(self, metric: str = "validation_loss", patience: int = 3, min_delta: float = 0.0, mode: str = "min"):
        if mode not in ("min", "max"):
            raise ValueError(f"mode is min or max, not {mode!r}")
        self.metric, self.patience, self.min_delta, self.sign = metric, patience, min_delta, 1 if mode == "min" else -1
        self.best, self.waited = math.inf, 0

    def on_evaluate(self, state: RunState, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ConfigError(f"early_stopping: no metric {self.metric!r}; there are {', '.join(sorted(metrics))}")
        value = self.sign * metrics[self.metric]
        if not math.isfinite(value):  # it says nothing about whether the model improves
            return
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            state.request("stop", f"{self.metric} has not improved in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.best = math.inf if saved["best"] is None else saved["best"]
        self.waited = saved["waited"]
