"""Steps that would do harm: losses and gradients that are no numbers, and spikes. Noticed before any weight changes.

A spike is a loss or a gradient norm more than `zscore` standard deviations above the mean of the last `history` good
steps. What is done about it is `stability.on_spike`: nothing, leave the step out (`skip`), go back to the last checkpoint
and step over the window of batches that ends with the bad one (`rewind`, as in PaLM; Chowdhery et al., 2022,
arXiv:2204.02311, §5.1), or `stop`. What was done stands in `interventions.jsonl`; since it is decided by values that all
ranks share, a repeated run decides the same.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from myllm_ray.common import distributed
from myllm_ray.common.files import JSONLines, read_jsonl
from myllm_ray.config.errors import TrainingError

_FLOOR = 0.01
"""Least standard deviation, as a share of the mean: on a plateau every wiggle would be a spike."""


class SpikeDetector:
    """Means and deviations of the last good steps.

    Args:
        zscore, history, min_history: see `stability` in the config.
    """

    def __init__(self, zscore: float = 6.0, history: int = 128, min_history: int = 16):
        self.zscore, self.min_history = zscore, min(min_history, history)
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=history) for name in ("loss", "gradient norm")}

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, in words, or None; then it counts among the good ones."""
        values = {"loss": loss, "gradient norm": grad_norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return f"the {name} is not finite ({value})"
            z = self._score(name, value)
            if z > self.zscore:
                return f"the {name} {value:.4g} is {z:.1f} standard deviations above the last {len(self._seen[name])} steps"
        for name, value in values.items():
            self._seen[name].append(value)
        return None

    def _score(self, name: str, value: float) -> float:
        seen = self._seen[name]
        if len(seen) < self.min_history:
            return 0.0
        mean = math.fsum(seen) / len(seen)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in seen) / len(seen))
        return (value - mean) / max(deviation, _FLOOR * abs(mean), 1e-12)

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, saved: Mapping[str, list[float]]) -> None:
        for name, seen in self._seen.items():
            seen.clear()
            seen.extend(saved.get(name, []))


class Stability:
    """The policy of a run, and the record of what it did.

    Args:
        settings: the config's section `stability`.
        folder: the run's, for `interventions.jsonl`; None: nothing is remembered beyond this process.
    """

    def __init__(self, settings: Mapping[str, Any], folder: str | None):
        self.policy: str = settings.get("on_spike", "ignore")
        self._window, self._most = settings.get("window", 1), settings.get("max_interventions", 10)
        self._detector = SpikeDetector(*(settings.get(n, d) for n, d in (("zscore", 6.0), ("history", 128), ("min_history", 16))))
        self._path = Path(folder) / "interventions.jsonl" if folder else None
        self._done: list[dict[str, Any]] = []

    @property
    def active(self) -> bool:
        return self.policy != "ignore"

    def load_interventions(self) -> None:
        """Read what earlier attempts did, on rank 0 for all ranks: the folder as another rank sees it may be older."""
        on_main = self._path is not None and distributed.is_main()
        self._done = distributed.from_main(list(read_jsonl(self._path)) if on_main and self._path else [])

    def stepped_over(self, step: int) -> str | None:
        """Why the batch of a step is not trained on: it lies in the window of an earlier rewind."""
        return next((row["reason"] for row in self._done
                     if row["action"] == "rewind" and row["step"] - row["window"] < step <= row["step"]), None)

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """See `SpikeDetector.judge`."""
        return self._detector.judge(loss, grad_norm)

    def intervene(self, step: int, reason: str, is_main: bool) -> str:
        """What is done about a bad step: `skip` or `rewind`; remembered.

        Raises:
            TrainingError: the policy is to stop, or too much was done already.
        """
        if self.policy == "stop":
            raise TrainingError(f"step {step}: {reason}; stability.on_spike=stop. The last checkpoint is kept")
        earlier = [row for row in self._done if row["step"] != step]
        if len(earlier) >= self._most:
            raise TrainingError(f"step {step}: {reason}; {len(earlier)} steps were left out before it (stability.max_interventions). "
                                "The last checkpoint is kept. Look at the data, or try a lower optimizer.lr")
        row = {"step": step, "action": self.policy, "window": self._window if self.policy == "rewind" else 1, "reason": reason}
        self._done = [*earlier, row]
        if self._path and is_main:
            file = JSONLines(self._path, keep=lambda old: old.get("step") != step)
            file.write(row)
            file.close()
        return self.policy

    def state_dict(self) -> dict[str, Any]:
        return self._detector.state_dict() if self.active else {}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._detector.load_state_dict(saved)
