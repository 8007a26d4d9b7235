"""`accelerator.gradient_dtype`: which backends sum gradients in bf16, and that the sums are rounded."""

from __future__ import annotations

import pytest
from conftest import MakeConfig, comparable
from spawned import BACKENDS, run_all

from myllm_ray.config import ConfigError, TrainerConfig
from myllm_ray.config.resolve import resolve

FOUR = ("run.max_steps=4", "data.validation=null", "batch.micro_size=1", "data.sequence_length=96")
GRADIENTS = {"fsdp", "deepspeed-1", "deepspeed-2", "deepspeed-3"}
"""The backends whose parameters are in bf16 while gradients are computed."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_which_backends_sum_gradients_in_bf16(make_config: MakeConfig, backend: str, precision: str) -> None:
    given = (*BACKENDS[backend], "accelerator.gradient_dtype=bf16", f"accelerator.precision={precision}")
    if precision != "bf16":
        with pytest.raises(ConfigError, match=f"gradient_dtype: bf16 needs .* precision is {precision}"):
            make_config(*given)
        return
    config = make_config(*given)
    cls = resolve("accelerators", config.accelerator.name, "accelerator.name")
    if backend in GRADIENTS:
        cls(config)
        return
    with pytest.raises(ConfigError, match=r"accelerator.gradient_dtype=bf16: .* holds fp32 parameters") as caught:
        cls(config)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_gradients_in_bf16_are_rounded_sums(make_config: MakeConfig) -> None:
    """The curve is that of sums in fp32 up to the rounding, and not the same."""

    def config(backend: str, gradients: str) -> TrainerConfig:
        given = ("accelerator.precision=bf16", f"accelerator.gradient_dtype={gradients}")
        name = f"run.name={backend}-{gradients}"
        return make_config(*FOUR, *BACKENDS[backend], *given, "batch.global_size=8", name)

    names = [(backend, gradients) for backend in sorted(GRADIENTS) for gradients in ("fp32", "bf16")]
    folders = run_all(2, [config(*name) for name in names])
    losses = {name: [row["loss"] for row in comparable(f)] for name, f in zip(names, folders, strict=True)}
    for backend in GRADIENTS:
        exact, rounded = losses[backend, "fp32"], losses[backend, "bf16"]
        assert exact[0] == rounded[0]
        assert exact != rounded
        assert rounded == pytest.approx(exact, rel=2e-2)
