"""Gauges of a run on Ray, as Prometheus reads them, the dashboard of them, and the trackers of a sweep's trials."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from conftest import ROOT, MakeConfig

from myllm_ray.orchestration.ray_metrics import RayMetrics, gauge_name

DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "myllm_ray.json").read_text())


@pytest.mark.slow
def test_prometheus_reads_the_metrics_of_a_run(ray_cluster: None, make_config: MakeConfig) -> None:
    from myllm_ray.common.types import RunState

    config = make_config("run.name=seen")

    @ray.remote(num_cpus=0)
    class Rank0:
        def log(self) -> None:
            self.callback = RayMetrics(config)
            metrics = {"loss": 1.5, "loss/books": 2.5, "grad_norm": float("nan"), "time": 1.0}
            self.callback.on_log(RunState(step=3, total_steps=6), metrics)

    actor = Rank0.remote()
    ray.get(actor.log.remote())
    node = next(n for n in ray.nodes() if n["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(60):  # Ray exports every 10 seconds
        text = urllib.request.urlopen(address, timeout=10).read().decode()
        found = dict(re.findall(r'^ray_(myllm_ray_\w+){[^}]*run="seen"[^}]*} ([\d.]+)$', text, re.M))
        if "myllm_ray_total_steps" in found:
            break
        time.sleep(1)
    assert {name: float(value) for name, value in found.items()} == {
        "myllm_ray_loss": 1.5,
        "myllm_ray_loss_books": 2.5,
        "myllm_ray_step": 3.0,
        "myllm_ray_total_steps": 6.0,
        "myllm_ray_epoch": 0.0,
    }
    assert 'trainer="sft"' in text


def test_the_dashboard_shows_metrics_that_trainers_log() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "myllm_ray").rglob("*.py"))
    logged = {gauge_name(name) for name in re.findall(r'"([\w/]+)"', source)}
    shown = re.findall(r"ray_(myllm_ray_\w+){", json.dumps(DASHBOARD["panels"]))
    assert len(shown) >= 12
    assert {name.replace("_validation_", "_") for name in shown} <= logged
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


@pytest.mark.parametrize("own", [{}, {"group": "mine"}])
def test_a_trial_is_a_run_in_the_group_of_the_sweep(own: dict, tmp_path: Path, make_config: MakeConfig) -> None:
    from myllm_ray.config.sweep import validate_sweep
    from myllm_ray.orchestration.sweeps.trial import Shared, config_of

    base = make_config(tracking=["tensorboard", {"name": "wandb", "mode": "offline", **own}]).model_dump(mode="json")
    sweep = validate_sweep({"base": base, "space": {"optimizer.lr": {"choice": [1e-3]}}, "run": {"name": "lrs"}})
    config = config_of(Shared(sweep, str(tmp_path), 1, False), 3, {"optimizer.lr": 1e-3})
    first, second = config.tracking
    assert first == {"name": "tensorboard", "group": "lrs", "run_name": "lrs-0003"}
    assert (second["group"], second["run_name"]) == (own.get("group", "lrs"), "lrs-0003")
