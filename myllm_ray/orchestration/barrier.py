"""Ray Train's barrier of a worker group, in an actor that imports Ray Train when a worker first uses it.

`ray.train.report` and `ray.train.collective` use it. A run that `train(config)` starts calls them only from user code,
and the import takes seconds of CPU time just when the workers start.
"""

from __future__ import annotations

from typing import Any


class Barrier:
    """The methods of Ray Train's `SynchronizationActor` that workers and controller call; see there for arguments."""

    def __init__(self, **settings: Any):
        self._settings = settings
        self._made: Any = None

    def _barrier(self) -> Any:
        if self._made is None:
            from ray.train.v2._internal.execution.checkpoint import sync_actor

            actor: Any = sync_actor.SynchronizationActor
            self._made = actor.__ray_metadata__.modified_class(**self._settings)
        return self._made

    async def broadcast_from_rank_zero(self, *arguments: Any, **named: Any) -> Any:
        """Waits for all ranks and returns the data of rank 0."""
        return await self._barrier().broadcast_from_rank_zero(*arguments, **named)

    async def set_required_ranks(self, *arguments: Any, **named: Any) -> Any:
        """Sets the ranks that the barrier waits for."""
        return await self._barrier().set_required_ranks(*arguments, **named)

    async def reset(self) -> None:
        """Releases the ranks that wait."""
        if self._made is not None:
            await self._made.reset()
