"""The barrier of a worker group is Ray Train's, and its module does not import Ray Train."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

from conftest import ROOT

from myllm_ray.orchestration.barrier import Barrier


def test_it_waits_for_all_ranks() -> None:
    async def both() -> list[Any]:
        barrier = Barrier(timeout_s=20, warn_interval_s=10)
        await barrier.reset()
        calls = [
            barrier.broadcast_from_rank_zero(
                world_rank=rank, world_size=2, data=data, caller_method_name="report", collective_seq=1
            )
            for rank, data in ((1, None), (0, "data"))
        ]
        found = await asyncio.gather(*calls)
        assert await barrier.set_required_ranks(None)
        await barrier.reset()
        return found

    assert asyncio.run(both()) == ["data", "data"]


def test_its_module_is_light() -> None:
    code = "import sys, myllm_ray.orchestration.barrier\nassert not {'torch', 'ray', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
