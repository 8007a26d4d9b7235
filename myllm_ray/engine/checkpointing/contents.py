"""The run's entries in a checkpoint's manifest, and the restoration of a run from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from myllm_ray.accelerators.optimizer_state import group_numbers, load_group_numbers
from myllm_ray.common.types import Position

if TYPE_CHECKING:
    from myllm_ray.engine.loop import TrainerEngine


def manifest_of(engine: TrainerEngine) -> dict[str, Any]:
    """Returns what a resumed run needs in addition to tensors, as JSON: position in the data, states of components."""
    state, base = engine.state, engine.manifest.get("identity", {}).get("base")
    numbers = group_numbers(engine.accelerator.inner_optimizer)
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
        # The origin of the weights that the checkpoint does not hold.
        **({} if engine.saves_frozen else {"base": base}),
    }


def _holds_frozen(manifest: dict[str, Any], module: nn.Module) -> bool:
    """Returns whether a checkpoint holds a parameter that is not trained."""
    return any(f"model.{name}" in manifest["tensors"] for name, p in module.named_parameters() if not p.requires_grad)


def opened(engine: TrainerEngine, folder: Path | None, known: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the manifest of the checkpoint to resume from, verified, and decides whether frozen weights are saved.

    Called on every rank, before the backend places the model: it must keep frozen weights in fp32 if they are saved.
    Without a checkpoint the result is empty.

    Args:
        engine: the engine of this rank.
        folder: the checkpoint, or None.
        known: its manifest, if the checkpoint has been verified; else it is verified now.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    manifest: dict[str, Any] = {}
    if folder is not None:
        assert engine.checkpoints is not None, "a resume needs a checkpoint manager"
        manifest = known or engine.checkpoints.verified(folder)
        # Frozen weights that the checkpoint holds replace those that this run was built with, and are saved again.
        engine.saves_frozen = engine.saves_frozen or _holds_frozen(manifest, engine.trainer.model)
    # Trainers that sample answers call the model outside autocast, in fp32.
    engine.accelerator.keeps_frozen = engine.saves_frozen or "sampler" in engine.trainer.dependencies
    return manifest


def restore(engine: TrainerEngine, folder: Path, manifest: dict[str, Any]) -> None:
    """Loads a checkpoint into an engine whose model and optimizer are in place.

    The learning-rate schedule needs no state but the step. Entries that older versions did not write are optional.

    Args:
        engine: the engine of this rank.
        folder: the checkpoint.
        manifest: the result of `opened`.

    Raises:
        CheckpointError: the checkpoint can't be read, or its tensors differ from those of this run.
    """
    assert engine.checkpoints is not None, "a resume needs a checkpoint manager"
    # Every rank calls this with its own shards: `state` and `fill` use collectives.
    average = engine.average.tensors_to_load(folder)
    frozen = _holds_frozen(manifest, engine.accelerator.module)
    tensors = {**engine.accelerator.state(frozen), **average}
    engine.checkpoints.fill(folder, manifest, tensors)
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
