"""The run's entries in a checkpoint's manifest, and the restoration of a run from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from myllm_ray.accelerators.optimizer_state import group_numbers, load_group_numbers
from myllm_ray.common.types import Position

if TYPE_CHECKING:
    from myllm_ray.engine.loop import TrainerEngine


def manifest_of(engine: TrainerEngine) -> dict[str, Any]:
    """Returns what a resumed run needs in addition to tensors, as JSON: position in the data, states of components."""
    state, numbers = engine.state, group_numbers(engine.accelerator.inner_optimizer)
    return {
        "position": {"epoch": state.position.epoch, "row": state.position.row},
        "callbacks": engine.callbacks.state_dict(),
        "metrics": engine.metrics,
        "skipped_steps": engine.skipped_steps,
        "stability": engine.stability.state_dict(),
        "trainer": engine.trainer.state_dict(),
        "loss_scale": engine.accelerator.loss_scale.state_dict(),
        # The position in the list is the same on every backend; the tensors of the optimizer have names.
        **({"optimizer_groups": numbers} if any(numbers) else {}),
        **engine.manifest,
    }


def restore(engine: TrainerEngine, folder: Path) -> None:
    """Loads a checkpoint into an engine whose model and optimizer are in place.

    The learning-rate schedule needs no state but the step. Entries that older versions did not write are optional.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tensors differ from those of this run.
    """
    assert engine.checkpoints is not None, "a resume needs a checkpoint manager"
    # Every rank calls this with its own shards: `load` uses collectives.
    average = engine.average.tensors_to_load(folder)
    tensors = {**engine.accelerator.state(), **average}
    manifest = engine.checkpoints.load(folder, tensors)
    engine.accelerator.load_state(tensors)
    engine.average.loaded(filled=bool(average))
    engine.state.step = int(manifest["step"])
    engine.state.position = Position(**manifest["position"])
    engine.state.epoch = engine.state.position.epoch
    engine.schedulers.set_step(engine.state.step)
    engine.metrics = manifest.get("metrics", {})
    engine.skipped_steps = manifest.get("skipped_steps", 0)
    engine.stability.load_state_dict(manifest.get("stability", {}))
    engine.accelerator.loss_scale.load_state_dict(manifest.get("loss_scale", {}))
    if saved := manifest.get("optimizer_groups"):
        load_group_numbers(engine.accelerator.inner_optimizer, saved)
    engine.callbacks.load_state_dict(manifest.get("callbacks", {}))
    if manifest.get("trainer"):
        engine.trainer.load_state_dict(manifest["trainer"])
