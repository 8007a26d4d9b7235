"""When and how a run ends before its last step, decided by values that all ranks share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from myllm_ray.common.types import REQUESTS, Exit

AGREED = (*REQUESTS, "amend")
"""What ranks exchange in each step: the requests of callbacks, and that of `myllm-ray amend`."""
_KINDS: dict[str, Literal["preempted", "aborted", "amended"]] = {
    "preempt": "preempted",
    "abort": "aborted",
    "amend": "amended",
}
"""Requests that end a run before its last step, by priority: if several are made, the run saves and loses no work."""
SAVED = ("preempted", "amended")
"""Kinds of an `Exit` before which the run saves its last step, even if the config disables checkpoints."""


def exit_of(
    agreed: Collection[str], reasons: Mapping[str, str], step: int, total_steps: int, boundary: int | None
) -> Exit | None:
    """Returns how a run ends after a batch, or None if it does not.

    Args:
        agreed: the requests that all ranks have received.
        reasons: their reasons.
        step: number of completed steps.
        total_steps: number of steps of the run.
        boundary: the step of the next amendment, or None.
    """
    request = next((name for name in _KINDS if name in agreed), None)
    stops = "stop" in agreed  # the run is complete, so no amendment resumes it
    if request is not None and step < total_steps and not (stops and request == "amend"):
        return Exit(_KINDS[request], reasons[request])
    if boundary is not None and step >= boundary and not stops:  # also at the last step, which it may postpone
        return Exit("amended", f"run.amendments: step {boundary}")
    return None
