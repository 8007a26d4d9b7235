"""What went wrong in a worker group, out of Ray's wrappings, and whether starting again can help."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from myllm_ray.common.distributed import lost_a_peer
from myllm_ray.common.tracebacks import describe
from myllm_ray.config.errors import TrainingError, UserError


@dataclass(frozen=True)
class Failure:
    """`error`: what to raise if it is for good. `reason`: one line. `again`: whether another attempt can help.
    `charged`: whether it counts against scaling.max_failures (a planned preemption does not). `traceback`: of a remote error."""

    error: BaseException
    reason: str
    again: bool = True
    charged: bool = True
    traceback: str | None = None

    def kept(self, run: Path) -> Failure:
        """With its traceback in a file of the run's folder, which its line names."""
        if self.traceback is None:
            return self
        said = f"{self.reason}; the whole traceback: {keep_traceback(run, self.traceback)}"
        error = TrainingError(said) if isinstance(self.error, TrainingError) else self.error
        return replace(self, error=error, reason=said, traceback=None)


class RemoteError(Exception):
    """An exception in another process, in one line. Exceptions lose their traceback when they are pickled.

    Attributes:
        traceback: the whole one, as text.
    """

    def __init__(self, line: str, traceback: str):
        super().__init__(line, traceback)
        self.line, self.traceback = line, traceback

    def __str__(self) -> str:
        return self.line


def portable(error: Exception) -> Exception:
    """An exception as another process should get it: what only says that a peer is gone as it is, others as a `RemoteError`."""
    from ray.exceptions import RayError

    if isinstance(error, (UserError, RayError)) or lost_a_peer(error):
        return error
    return RemoteError(describe(error), "".join(traceback.format_exception(error)))


def keep_traceback(run: Path, text: str) -> Path:
    """Write a traceback to a new file below `<run>/errors`."""
    folder = run / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y%m%d-%H%M%S")
    path = next(p for n in range(1000) if not (p := folder / f"{name}{f'-{n}' if n else ''}.txt").exists())
    path.write_text(text, encoding="utf-8")
    return path


def explain(error: BaseException) -> Failure:
    """Say what an error of `TorchTrainer.fit` means.

    An error that is the user's to fix would only come again. But where a worker has died, what the others say is a
    consequence, also when it is such an error.
    """
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
    from ray.train.v2.api.exceptions import PreemptionError

    inside = list(_inside(error))
    if any(isinstance(e, PreemptionError) for e in inside):
        return Failure(error, "a node of the workers was taken away", charged=False)
    if any(isinstance(e, WorkerGroupStartupTimeoutError) for e in inside):
        return Failure(error, "the workers did not start in time, for want of room", charged=False)
    died = any(isinstance(e, RayActorError) or lost_a_peer(e) for e in inside)
    users = next((e for e in inside if isinstance(e, UserError)), None)
    if users is not None and not died:
        return Failure(_original(users), str(users), again=False)
    failures: dict[int, Any] = getattr(error, "worker_failures", None) or {}
    if not failures:
        text = _last_line(error)
        return Failure(TrainingError(f"Ray Train: {text}"), text)
    dead = {rank: e for rank, e in failures.items() if any(isinstance(i, RayActorError) for i in _inside(e))}
    own = {rank: e for rank, e in failures.items() if not any(lost_a_peer(i) for i in _inside(e))}  # the others only lost this one
    rank, first = min((dead or own or failures).items())
    remote = next((e for e in _inside(first) if isinstance(e, RemoteError)), None)
    if dead:
        reason = f"worker {rank} died: its process was killed, or ran out of memory, or its node is gone"
    else:
        reason = f"worker {rank} of {len(failures)} that failed: {remote.line if remote else _last_line(first)}"
    if os.environ.get("MYLLM_RAY_TRACEBACK"):
        return Failure(error, reason)
    trace = remote.traceback if remote else getattr(first, "_traceback_str", None)
    return Failure(TrainingError(reason), reason, traceback=None if dead else trace)


def clearly(call: Callable[[], Any], run: Path | None = None) -> Any:
    """Call, and turn what Ray wraps a user's error in back into the error itself.

    Args:
        call: what may fail in another process.
        run: the run's folder, where the traceback of an error in another process is kept.

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
    """An error and all that it wraps."""
    if error is None or depth > 8:
        return
    yield error
    wrapped = [getattr(error, "cause", None), error.__cause__, getattr(error, "controller_failure", None),
               getattr(error, "_base_exc", None), getattr(error, "health_check_failure", None), *(getattr(error, "worker_failures", None) or {}).values()]
    for inner in wrapped:
        if isinstance(inner, BaseException):
            yield from _inside(inner, depth + 1)


def _original(error: UserError) -> UserError:
    """Ray raises a class made on the spot that inherits from the original one and prints its traceback."""
    original = getattr(error, "cause", None)
    return original if isinstance(original, UserError) else error


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
