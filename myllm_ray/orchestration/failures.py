"""Extracts the cause of a failure from Ray's exceptions, and decides whether another attempt can help."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from myllm_ray.common.tracebacks import describe
from myllm_ray.config.errors import TrainingError, UserError


@dataclass(frozen=True)
class Failure:
    """The failure of a worker group.

    Attributes:
        error: the exception to raise if there is no further attempt.
        reason: the cause in one line.
        again: whether another attempt can help.
        charged: whether it counts against `scaling.max_failures` (a planned preemption does not).
        traceback: the traceback of an error in another process.
    """

    error: BaseException
    reason: str
    again: bool = True
    charged: bool = True
    traceback: str | None = None

    def kept(self, run: Path) -> Failure:
        """Writes the traceback to a file in the run's folder and returns the failure with that path in its reason."""
        if self.traceback is None:
            return self
        said = f"{self.reason}; the whole traceback: {keep_traceback(run, self.traceback)}"
        error = TrainingError(said) if isinstance(self.error, TrainingError) else self.error
        return replace(self, error=error, reason=said, traceback=None)


class RemoteError(Exception):
    """An exception of another process, as text, because exceptions lose their traceback when they are pickled.

    Attributes:
        line: the exception in one line.
        traceback: the whole traceback.
    """

    def __init__(self, line: str, traceback: str):
        super().__init__(line, traceback)  # pickle calls the constructor with these arguments again
        self.line, self.traceback = line, traceback

    def __str__(self) -> str:
        return self.line


def portable(error: Exception) -> Exception:
    """Converts an exception to one that can be sent to another process.

    User errors, Ray's errors and errors about a lost peer are returned unchanged, all others as a `RemoteError`.
    """
    from ray.exceptions import RayError

    from myllm_ray.common.distributed import lost_a_peer

    if isinstance(error, (UserError, RayError)) or lost_a_peer(error):
        return error
    return RemoteError(describe(error), "".join(traceback.format_exception(error)))


def keep_traceback(run: Path, text: str) -> Path:
    """Writes a traceback to a new file in `<run>/errors` and returns its path."""
    folder = run / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    path = next(p for n in range(1000) if not (p := folder / f"{name}{f'-{n}' if n else ''}.txt").exists())
    path.write_text(text, encoding="utf-8")
    return path


def explain(error: BaseException) -> Failure:
    """Finds the cause of an error of `TorchTrainer.fit`.

    A `UserError` occurs again on every attempt, so it is final. If a worker has died, the errors of the other workers
    are consequences, also when they are a `UserError`.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import PreemptionError

    from myllm_ray.common.distributed import lost_a_peer

    inside = list(_inside(error))
    if any(isinstance(e, PreemptionError) for e in inside):
        return Failure(error, "a node of the workers was preempted", charged=False)
    if any(isinstance(e, WorkerGroupStartupTimeoutError) for e in inside):
        return Failure(
            error, "the workers did not start in time: the cluster has too few free resources", charged=False
        )
    died = any(isinstance(e, RayActorError) or lost_a_peer(e) for e in inside)
    users = next((e for e in inside if isinstance(e, UserError)), None)
    if users is not None and not died:
        return Failure(_original(users), str(users), again=False)
    failures: dict[int, Any] = getattr(error, "worker_failures", None) or {}
    if not failures:
        text = _last_line(error)
        return Failure(TrainingError(f"Ray Train: {text}"), text)
    dead = {rank: e for rank, e in failures.items() if any(isinstance(i, RayActorError) for i in _inside(e))}
    # Workers that only report a lost peer are not the cause.
    own = {rank: e for rank, e in failures.items() if not any(lost_a_peer(i) for i in _inside(e))}
    # A dead worker is the cause, else a worker with an error that is not about a peer, else any worker.
    rank, first = min((dead or own or failures).items())
    remote = next((e for e in _inside(first) if isinstance(e, RemoteError)), None)
    if dead:
        reason = f"worker {rank} died: its process was killed, or ran out of memory, or its node is gone"
    else:
        reason = f"worker {rank} of {len(failures)} that failed: {remote.line if remote else _last_line(first)}"
    if os.environ.get("MYLLM_RAY_TRACEBACK"):
        return Failure(error, reason)
    trace = remote.traceback if remote else getattr(first, "_traceback_str", None)
    # The traceback of a dead worker's error is from Ray's internals and does not show the cause.
    return Failure(TrainingError(reason), reason, traceback=None if dead else trace)


def clearly(call: Callable[[], Any], run: Path | None = None) -> Any:
    """Calls a function and raises the original error instead of Ray's wrapper around it.

    Args:
        call: a function that may fail in another process.
        run: the run's folder, in which the traceback of an error in another process is saved.

    Raises:
        UserError: one line that names the line of code.
    """
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        remote = next((e for e in _inside(error) if isinstance(e, RemoteError)), None)
        if remote is not None and not os.environ.get("MYLLM_RAY_TRACEBACK"):
            kept = f"; the whole traceback: {keep_traceback(run, remote.traceback)}" if run else ""
            raise TrainingError(f"{remote.line}{kept}") from None
        users = next((e for e in _inside(error) if isinstance(e, UserError)), None)
        if users is not None:
            raise _original(users) from None
        raise


def _inside(error: BaseException | None, depth: int = 0) -> Iterator[BaseException]:
    """Yields an error and all errors that it wraps, up to a fixed depth (causes can form a cycle)."""
    if error is None or depth > 8:
        return
    yield error
    # Ray Train and Ray keep wrapped errors in attributes of their exceptions, not only in `__cause__`.
    wrapped = [
        getattr(error, "cause", None),
        error.__cause__,
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        getattr(error, "health_check_failure", None),
        *(getattr(error, "worker_failures", None) or {}).values(),
    ]
    for inner in wrapped:
        if isinstance(inner, BaseException):
            yield from _inside(inner, depth + 1)


def _original(error: UserError) -> UserError:
    """Returns the error that a task has raised.

    Ray raises an instance of a class that it creates at run time. The class inherits from the original one, and its
    text contains the traceback.
    """
    original = getattr(error, "cause", None)
    return original if isinstance(original, UserError) else error


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
