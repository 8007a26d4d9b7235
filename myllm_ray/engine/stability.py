"""Bad steps: non-finite losses and gradients, and spikes.

The policies `skip`, `rewind` and `stop` detect them before any weight changes. With `ignore`, the default, this module
does nothing, and the engine stops the run after the optimizer step if the norm of the gradient is not finite.

A spike is a loss or a gradient norm more than `zscore` standard deviations above the mean of the last `history` good
steps. `stability.on_spike` selects the action: `ignore`; `skip` the step; `rewind`, which resumes from the last
checkpoint without the window of batches that ends with the bad one (as in PaLM; Chowdhery et al., 2022,
arXiv:2204.02311, §5.1); or `stop`. The actions are recorded in `interventions.jsonl`. They depend only on values that
are equal on all ranks, so all ranks take the same action, and a repeated run repeats it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from myllm_ray.common import distributed
from myllm_ray.common.files import JSONLines, read_jsonl
from myllm_ray.config.errors import TrainingError
from myllm_ray.config.stability_section import StabilitySection

_FLOOR = 0.01
"""Smallest standard deviation, as a share of the mean. Without it, every fluctuation on a plateau would be a spike."""


class SpikeDetector:
    """Compares a step with the means and standard deviations of the last good steps.

    Args:
        zscore, history, min_history: see `StabilitySection`.
    """

    def __init__(self, zscore: float, history: int, min_history: int):
        self.zscore, self.min_history = zscore, min(min_history, history)
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=history) for name in ("loss", "gradient norm")}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Returns why a step is bad, or None for a good step, which is then added to the history."""
        values = {"loss": loss, "gradient norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is not finite ({value})"
            z = self._score(name, value)
            if z > self.zscore:
                return (
                    f"the {name} {value:.4g} is {z:.1f} standard deviations above the last "
                    f"{len(self._seen[name])} steps"
                )
        # Bad steps are not added: they would raise the mean and the deviation, and hide the next spike.
        for name, value in values.items():
            self._seen[name].append(value)
        return None

    def _score(self, name: str, value: float) -> float:
        seen = self._seen[name]
        if len(seen) < self.min_history:
            return 0.0
        # `fsum` rounds once, so a small deviation of large values keeps its digits.
        mean = math.fsum(seen) / len(seen)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in seen) / len(seen))
        return (value - mean) / max(deviation, _FLOOR * abs(mean), 1e-12)

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, saved: Mapping[str, list[float]]) -> None:
        for name, seen in self._seen.items():
            # In place: `deque` keeps its `maxlen`, which may differ from that of the saved run.
            seen.clear()
            seen.extend(saved.get(name, []))


class Stability:
    """The policy of a run for bad steps, and the record of its interventions.

    Args:
        settings: the section `stability` of the config.
        folder: the run's folder, for `interventions.jsonl`; None: the record is kept in memory only.
    """

    def __init__(self, settings: StabilitySection, folder: str | None):
        self.policy: str = settings.on_spike
        self._window, self._most = settings.window, settings.max_interventions
        self._detector = SpikeDetector(settings.zscore, settings.history, settings.min_history)
        self._path = Path(folder) / "interventions.jsonl" if folder else None
        self._done: list[dict[str, Any]] = []
        self.on_intervention: Callable[[dict[str, Any]], None] = lambda row: None
        """Called on rank 0 with each row of `interventions.jsonl` that is written."""

    @property
    def active(self) -> bool:
        return self.policy != "ignore"

    def load_interventions(self) -> None:
        """Reads the record of earlier attempts of the run. Contains a collective."""
        # Rank 0 reads for all ranks: on a shared file system, another rank may see an older version of the file.
        on_main = self._path is not None and distributed.is_main()
        self._done = distributed.from_main(list(read_jsonl(self._path)) if on_main and self._path else [])

    def stepped_over(self, step: int) -> str | None:
        """Returns why the batch of a step is skipped, if it is in the window of an earlier rewind, or None."""
        return next(
            (
                row["reason"]
                for row in self._done
                if row["action"] == "rewind" and row["step"] - row["window"] < step <= row["step"]
            ),
            None,
        )

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Returns why a step is bad, or None; see `SpikeDetector.judge`."""
        return self._detector.judge(loss, grad_norm)

    def intervene(self, step: int, reason: str, is_main: bool) -> str:
        """Records and returns the action for a bad step: `skip` or `rewind`.

        Raises:
            TrainingError: the policy is `stop`, or `max_interventions` is reached.
        """
        if self.policy == "stop":
            raise TrainingError(f"step {step}: {reason}; stability.on_spike=stop. The last checkpoint is kept")
        # A step that is repeated after a restart replaces its own record.
        earlier = [row for row in self._done if row["step"] != step]
        if len(earlier) >= self._most:
            raise TrainingError(
                f"step {step}: {reason}; {len(earlier)} steps were already skipped (stability.max_interventions). "
                "The last checkpoint is kept. Check the data, or try a lower optimizer.lr"
            )
        row = {
            "step": step,
            "action": self.policy,
            "window": self._window if self.policy == "rewind" else 1,
            "reason": reason,
        }
        self._done = [*earlier, row]
        # Every rank keeps the record in memory; only rank 0 writes the file.
        if self._path and is_main:
            file = JSONLines(self._path, keep=lambda old: old.get("step") != step)
            file.write(row)
            file.close()
            self.on_intervention(row)
        return self.policy

    def state_dict(self) -> dict[str, Any]:
        return self._detector.state_dict() if self.active else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._detector.load_state_dict(saved)
