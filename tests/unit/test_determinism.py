"""`run.determinism: strict`.

The settings apply only while a run trains, losses on a CPU are unchanged, and unsupported operations give a one-line
error.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeConfig, comparable
from spawned import run_all

from myllm_ray import worker
from myllm_ray.common.types import RunState
from myllm_ray.config import ConfigError, TrainingError
from myllm_ray.engine.callbacks import Callback
from myllm_ray.preparation import check_names
from myllm_ray.worker import run_local

STRICT = "run.determinism=strict"
SHORT = ("run.max_steps=2", "data.validation=null", "checkpoint.at_end=false")


def settings() -> dict[str, Any]:
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


class Look(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, state: RunState) -> None:
        self.seen.append(settings())


def test_strict_is_set_during_a_run_and_undone_after_it(make_config: MakeConfig) -> None:
    before, found = settings(), {}
    for policy in ("default", "strict"):
        look = Look()
        run_local(make_config(f"run.name={policy}", f"run.determinism={policy}", *SHORT), callbacks=[look])
        found[policy] = look.seen
        assert settings() == before
    assert found["default"] == [before] * 2
    assert (
        found["strict"]
        == [
            {
                "algorithms": True,
                "warn_only": False,
                "cudnn": True,
                "benchmark": False,
                "fill": False,
                "cublas": ":4096:8",
            }
        ]
        * 2
    )


def test_losses_are_those_of_default_on_a_cpu(make_config: MakeConfig) -> None:
    plain, strict = run_all(
        1, [make_config(f"run.name={policy}", f"run.determinism={policy}", *SHORT) for policy in ("default", "strict")]
    )
    assert comparable(strict) == comparable(plain)


def test_an_operation_without_a_deterministic_form_is_one_line(make_config: MakeConfig) -> None:
    before = settings()
    run_local(make_config("run.name=default", *SHORT, trainer="helpers:Putting"))
    with pytest.raises(
        TrainingError,
        match=r"^run.determinism=strict: put_ has no deterministic implementation .* or run.determinism=default$",
    ):
        run_local(make_config("run.name=strict", STRICT, *SHORT, trainer="helpers:Putting"))
    assert settings() == before, "undone after an error too"


def test_a_compiled_model_is_refused_before_anything_is_written(make_config: MakeConfig) -> None:
    config = make_config(STRICT, "accelerator.compile=blocks")
    with pytest.raises(ConfigError, match=r"run.determinism=strict: accelerator.compile=blocks chooses kernels"):
        run_local(config)
    assert not (Path(config.run.storage) / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "environment", "message"),
    [
        ((), ":0:0", r"the environment has CUBLAS_WORKSPACE_CONFIG=:0:0, with which cuBLAS is not deterministic"),
        ((), None, r"this process uses CUDA already.*set CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        ((), ":16:8", None),
        (("accelerator.device=cpu",), ":0:0", None),
        (("run.determinism=default",), ":0:0", None),
    ],
)
def test_cuda_requirements_are_checked_first(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    environment: str | None,
    message: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(worker, "build_callbacks", lambda config: [])
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if environment is not None:
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", environment)
    config = make_config(STRICT, *overrides)
    config.accelerator.name = "helpers:AnyDevice"
    if message is None:
        check_names(config)
    else:
        with pytest.raises(ConfigError, match=message):
            check_names(config)


def test_sampling_on_cuda_is_refused(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler sums probabilities with torch.cumsum, which has no deterministic CUDA implementation."""
    from myllm_ray.common.determinism import check_determinism

    raw = make_config(STRICT, "scaling.gpus_per_worker=1", "scaling.workers=1").model_dump(mode="json")
    check_determinism(raw, samples=False)
    with pytest.raises(ConfigError, match=r"sampled with torch.cumsum, which has no deterministic form on CUDA"):
        check_determinism(raw, samples=True)
