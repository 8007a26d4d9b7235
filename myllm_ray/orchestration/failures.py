"""What went wrong in a worker group, out of Ray's wrappings, and whether starting again can help."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from myllm_ray.common.distributed import lost_a_peer
from myllm_ray.config.errors import TrainingError, UserError


@dataclass(frozen=True)
class Failure:
    """`error`: what to raise if it is for good. `reason`: one line. `again`: whether another attempt can help.
    `charged`: whether it counts against scaling.max_failures (a planned preemption does not)."""

    error: BaseException
    reason: str
    again: bool = True
    charged: bool = True


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
    rank, first = min((dead or failures).items())
    reason = f"worker {rank} died: its process was killed, or ran out of memory, or its node is gone" if dead else f"worker {rank} of {len(failures)} that failed: {_last_line(first)}"
    if os.environ.get("MYLLM_RAY_TRACEBACK"):
        return Failure(error, reason)
    return Failure(TrainingError(f"{reason} (the whole traceback: MYLLM_RAY_TRACEBACK=1)"), reason)


def clearly(call: Callable[[], Any]) -> Any:
    """Call, and turn what Ray wraps a user's error in back into the error itself."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
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
