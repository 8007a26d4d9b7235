"""The two feeds of a run on Ray."""

from __future__ import annotations

import pytest
from conftest import MakeConfig, comparable, ledger

from myllm_ray import train


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.timeout(400)
def test_a_run_can_change_its_feed(make_config: MakeConfig) -> None:
    """The run is stopped in its second epoch with one feed and resumed with the other; the curve is the same."""
    common = (
        "accelerator.name=ddp",
        "scaling.workers=2",
        "run.max_steps=20",
        "batch.global_size=4",
        "data.packing=false",
        "checkpoint.resume=auto",
    )
    whole = train(make_config("run.name=whole", *common)).folder
    for first, second in (("ray", "worker"), ("worker", "ray")):
        stop = {"helpers:StopAt": {"step": 13}}
        name = f"run.name={first}"
        cut = train(make_config(name, *common, f"data.feed={first}", callbacks=["jsonl", stop])).folder
        assert (ledger(cut)[-1]["step"], ledger(cut)[-1]["epoch"]) == (13, 1)
        train(make_config(name, *common, f"data.feed={second}"))
        assert ledger(cut) == ledger(whole), (first, second)
        assert comparable(cut) == comparable(whole), (first, second)
