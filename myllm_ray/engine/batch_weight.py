"""The check of the weight by which the loss of a global batch is divided."""

from __future__ import annotations

import logging

from myllm_ray.common.types import BatchStream, RunState
from myllm_ray.config.errors import TrainingError
from myllm_ray.trainers.base import BaseTrainer

log = logging.getLogger(__name__)


class WeightCheck:
    """Finds batches without target tokens.

    Args:
        trainer: states in `empty_batch_reason` why such a batch can occur, or None.
        stream: describes a batch, if it has the method `describe`.
    """

    def __init__(self, trainer: BaseTrainer, stream: BatchStream):
        self._allowed = trainer.empty_batch_reason
        self._describe = getattr(stream, "describe", lambda _: "the batch")
        self._warned = False

    def check(self, weight: float, state: RunState) -> None:
        """Warns once about a batch of weight 0 that the trainer allows.

        Args:
            weight: weight of the global batch.
            state: state before the step.

        Raises:
            TrainingError: the batch has no target tokens, and the trainer does not allow that.
        """
        if weight:
            return
        position = state.position
        where = f"step {state.step + 1} (epoch {position.epoch}, rows from {position.row})"
        if self._allowed is None:
            raise TrainingError(
                f"{where} has nothing to train on: no token of {self._describe(position)} is trained on; see it with "
                f"`myllm-ray data CONFIG --step {state.step + 1}`. data.sequence_length cuts documents off, "
                "data.*.format says what is trained on"
            )
        if state.is_main and not self._warned:
            text = "%s has nothing to train on: %s. Its gradient is zero. Further such steps are not reported"
            log.warning(text, where, self._allowed)
        self._warned = True
