"""The figures of a run: workloads, device data, time per phase, MFU, and the profile of some steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import MakeConfig, comparable, read_jsonl

from myllm_ray.common.hardware import DEVICES, find_device, hardware_of
from myllm_ray.common.types import IGNORE, is_measured
from myllm_ray.config.errors import ConfigError
from myllm_ray.engine.liveness.heartbeat import Heartbeat
from myllm_ray.engine.reporting.chart_groups import charts_of
from myllm_ray.models.flops import model_flops
from myllm_ray.ops.workload import answer_work, document_work, pair_work
from myllm_ray.worker import run_local

TIMES = ("time/data", "time/forward", "time/backward", "time/optimizer", "time/checkpoint", "time/communication")


def test_packed_documents_are_counted_without_padding() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]])
    sources = torch.tensor([[0, 0, 0, 0, 0, -1, -1, -1], [1] * 8])
    labels = torch.full((2, 8), IGNORE)
    labels[0, [1, 4]], labels[1, 1:] = 5, 5
    micro = {"input_ids": labels, "labels": labels, "position_ids": positions, "source_ids": sources}
    work = document_work(micro)
    assert work.lengths.tolist() == [3, 2, 8]
    assert work.contexts is None
    assert (work.tokens, work.predicted) == (13, 9)
    del micro["source_ids"]
    assert document_work(micro).lengths.tolist() == [3, 2, 3, 8]
    del micro["position_ids"]
    assert document_work(micro).lengths.tolist() == [8, 8]


def test_answers_are_counted_with_their_prompts() -> None:
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [-1] * 8])
    micro = {"segment_ids": segments}
    shared = pair_work(micro, shared_prompt=True)
    assert shared.contexts is not None
    assert (shared.tokens, shared.predicted) == (6, 3)
    assert sorted(zip(shared.contexts.tolist(), shared.lengths.tolist(), strict=True))[-2:] == [(3, 1), (3, 2)]
    assert pair_work(micro, shared_prompt=False).lengths.tolist() == [5, 4, 0, 0]
    assert pair_work(micro, shared_prompt=False, answers=1).lengths.tolist() == [5, 0]
    rollouts = answer_work({"prompt_lengths": torch.tensor([[3], [2]]), "lengths": torch.tensor([[4], [0]])})
    assert (rollouts.lengths.tolist(), rollouts.predicted) == ([7, 2], 4)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Radeon", None),
    ],
)
def test_devices_are_found_by_the_name_that_torch_reports(name: str, found: str | None) -> None:
    device = find_device(name)
    assert (device and device.name) == found


def test_peaks_are_those_of_the_precision() -> None:
    h100, v100 = find_device("NVIDIA H100 80GB HBM3"), find_device("Tesla V100-SXM2-16GB")
    assert h100 is not None
    assert v100 is not None
    assert h100.peak("bf16") == h100.peak("fp16") == 989e12
    assert (h100.peak("fp32"), h100.peak("fp32", tf32=True)) == (67e12, 495e12)
    assert v100.peak("bf16") is None
    assert v100.peak("fp32", tf32=True) == 15.7e12


def test_hardware_descriptions() -> None:
    assert (hardware_of("h100x8").device.name, hardware_of("h100x8").count) == ("H100", 8)
    for device in DEVICES:
        written = device.name.lower().replace(" ", "-")
        assert hardware_of(written).device == hardware_of(f"{written}x4").device == device
    for wrong in ("h1000x8", "h100x0", "", "x8"):
        with pytest.raises(ConfigError, match=r"known names: .*h100"):
            hardware_of(wrong)


def test_every_line_has_the_figures(make_config: MakeConfig) -> None:
    config = make_config("accelerator.peak_tflops=0.5", "logging.every_steps=2", "checkpoint.every_steps=3")
    folder = Path(str(run_local(config)["folder"]))
    rows = read_jsonl(folder / "metrics.jsonl")
    names = set(rows[-1])
    assert {*TIMES, "tflops_per_second", "mfu", "memory/host_peak", "tokens_per_second"} <= names
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 0.5)
        assert row["tflops_per_second"] > 0
        assert row["time/forward"] > 0
        assert row["time/backward"] > 0
        assert row["time/optimizer"] > 0
        assert row["memory/host_peak"] > 1e8
    assert any(row["time/checkpoint"] > 0 for row in rows)
    assert not any(is_measured(name) for row in comparable(folder) for name in row)
    charts = {chart.title: chart for group in charts_of(names) for chart in group.charts}
    assert {trace.metric for trace in charts["seconds per step"].traces} == set(TIMES)


def test_without_a_known_peak_there_is_no_mfu(make_config: MakeConfig) -> None:
    row = read_jsonl(Path(str(run_local(make_config("run.max_steps=1"))["folder"])) / "metrics.jsonl")[-1]
    assert "mfu" not in row
    assert row["tflops_per_second"] > 0


def test_the_operations_of_a_run_are_those_of_its_documents(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed and unpacked rows have the same operations."""
    from myllm_ray import worker

    counted: list[list[float]] = []

    def recording(model: torch.nn.Module) -> object:
        of, here = model_flops(model).of, []
        counted.append(here)

        class Recorded:
            @staticmethod
            def of(work: object) -> float:
                here.append(of(work))  # type: ignore[arg-type]
                return here[-1]

        return Recorded

    monkeypatch.setattr(worker, "model_flops", recording)
    common = ("run.max_steps=null", "run.epochs=1", "data.validation=null", "checkpoint.at_end=false")
    run_local(make_config(*common, "run.name=packed"))
    run_local(make_config(*common, "run.name=alone", "data.packing=false", "batch.micro_size=1"))
    assert len(counted[0]) < len(counted[1])
    assert sum(counted[0]) == pytest.approx(sum(counted[1]), rel=1e-9)


def test_phases_are_passed_on() -> None:
    heartbeat, entered = Heartbeat(), []
    heartbeat.on_enter = entered.append
    heartbeat.enter("forward", 1)
    heartbeat.enter("backward", 1)
    assert entered == ["forward", "backward"]


def test_the_profile_of_some_steps(make_config: MakeConfig) -> None:
    plain = run_local(make_config("run.name=plain"))
    profiled = run_local(make_config("run.name=profiled", "logging.profile=[2, 3]"))
    assert comparable(str(plain["folder"])) == comparable(str(profiled["folder"]))
    folder = Path(str(profiled["folder"])) / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-2-3.json", "steps-2-3.txt"]
    trace = json.loads((folder / "steps-2-3.json").read_text())
    assert any("mm" in str(event.get("name")) for event in trace["traceEvents"])
    lines = (folder / "steps-2-3.txt").read_text().splitlines()
    assert lines[0].startswith("steps 2 to 3: CPU time")
    assert 3 <= len(lines) <= 12


def test_a_run_that_ends_earlier_writes_its_profile(make_config: MakeConfig) -> None:
    folder = Path(str(run_local(make_config("run.max_steps=2", "logging.profile=[2, 9]"))["folder"]))
    assert (folder / "profile" / "steps-2-2.txt").exists()
    with pytest.raises(ConfigError, match=r"the first step 3 is after"):
        make_config("logging.profile=[3, 2]")
