"""Optimizer, scheduler, callbacks, checkpoints and files, each tested separately."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from myllm_ray.common.files import JSONLines, read_jsonl
from myllm_ray.common.host_copy import HostCopy
from myllm_ray.common.types import RunState, StepOutput
from myllm_ray.config.errors import CheckpointError, ConfigError
from myllm_ray.engine.callbacks import Callback, CallbackList, EarlyStoppingCallback
from myllm_ray.engine.checkpointing.manager import CheckpointManager, find_damage
from myllm_ray.engine.optimizer import OptimizerManager
from myllm_ray.engine.reporting.metrics import MetricSum
from myllm_ray.engine.scheduler import SchedulerManager, multiplier


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", torch.optim.AdamW),
        ("ADAM", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("adafactor", torch.optim.Adafactor),
        ("RMSprop", torch.optim.RMSprop),
        ("torch.optim:NAdam", torch.optim.NAdam),
    ],
)
def test_optimizers_by_name(name: str, cls: type) -> None:
    optimizer = OptimizerManager(small(), {"optimizer": {"name": name, "lr": 0.5}}).optimizer
    assert type(optimizer) is cls
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_weight_decay_is_for_matrices() -> None:
    optimizer = OptimizerManager(small(), {"optimizer": {"weight_decay": 0.1}}).optimizer
    decay = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 5


def test_parameter_groups_by_pattern() -> None:
    config = {
        "optimizer": {"lr": 1.0, "weight_decay": 0.1, "groups": [{"pattern": r"^2\.", "lr": 0.1, "weight_decay": 0.0}]}
    }
    groups = OptimizerManager(small(), config).optimizer.param_groups
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (0.1, 0.0, 1),
        (1.0, 0.1, 1),
        (1.0, 0.0, 3),
    ]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"name": "adamm"}, "did you mean adam"),
        ({"groups": [{"pattern": "nothing"}]}, "matches no parameter"),
        ({"name": "sgd", "betas": [0.9, 0.99]}, "SGD has no such option"),
        ({"name": "rmsprop", "fused": True}, "no fused kernel"),
        ({"options": {"nonsense": 1}}, "AdamW does not accept its options"),
        ({"betas": [2.0, 0.9]}, "AdamW does not accept its options"),
    ],
)
def test_optimizer_mistakes(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        OptimizerManager(small(), {"optimizer": section}).build(small())


def rates(section: dict[str, Any], steps: int = 10) -> list[float]:
    manager = SchedulerManager(config={"scheduler": section}, total_steps=steps)
    return [multiplier(step, steps, manager.section) for step in range(steps)]


def test_schedules_equal_values_computed_by_hand() -> None:
    assert rates({"name": "constant", "warmup_steps": 4})[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates({"name": "constant", "warmup_ratio": 0.2})[:3] == [0.5, 1.0, 1.0]
    assert rates({"name": "linear"}) == pytest.approx([1 - s / 10 for s in range(10)])
    assert rates({"name": "cosine", "min_lr_ratio": 0.1}) == pytest.approx(
        [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)]
    )
    assert rates({"name": "polynomial", "power": 2.0}) == pytest.approx([(1 - s / 10) ** 2 for s in range(10)])
    assert rates({"name": "wsd", "warmup_steps": 2, "decay_ratio": 0.4}) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert rates({"name": "inverse_sqrt", "warmup_steps": 4}) == pytest.approx(
        [0.25, 0.5, 0.75, 1.0, *(math.sqrt(4 / (s + 1)) for s in range(4, 10))]
    )
    restarts = rates({"name": "cosine_with_restarts", "cycles": 2})
    assert restarts[0] == restarts[5] == 1.0
    assert restarts[:5] == pytest.approx(restarts[5:])


@pytest.mark.parametrize(
    "name", ["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "wsd", "inverse_sqrt"]
)
def test_every_schedule_stays_within_bounds(name: str) -> None:
    for warmup in (0, 3):
        values = rates({"name": name, "warmup_steps": warmup, "min_lr_ratio": 0.05}, 50)
        assert all(0 < v <= 1 for v in values)
        manager = SchedulerManager(config={"scheduler": {"name": name, "warmup_steps": warmup}}, total_steps=50)
        assert multiplier(500, 50, manager.section) <= 1, "beyond the end it holds, it does not come back"


def test_a_custom_schedule() -> None:
    assert rates({"name": "helpers:half"}, 4) == [1.0, 1.0, 0.5, 0.5]


def test_scheduler_sets_each_group_from_its_own_base() -> None:
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.1}]
    )
    manager = SchedulerManager(optimizer, {"scheduler": {"name": "linear"}}, total_steps=4)
    manager.step()
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.75, 0.075])
    manager.set_step(0)
    assert manager.learning_rate == 1.0
    with pytest.raises(ConfigError, match="did you mean cosine"):
        SchedulerManager(config={"scheduler": {"name": "cosin"}})


def test_non_finite_values_are_ignored(tmp_path: Path) -> None:
    """Non-finite values affect neither the best checkpoint nor early stopping."""
    callback, state = EarlyStoppingCallback(patience=2), RunState()
    for value in (math.nan, math.inf, -math.inf, math.nan):
        callback.on_evaluate(state, {"validation_loss": value})
    assert not state.requests
    callback.on_evaluate(state, {"validation_loss": 5.0})
    assert callback.best == 5.0
    manager = CheckpointManager(folder=tmp_path, keep_last=9, keep_best="validation_loss")
    for step, value in ((1, -math.inf), (2, 3.0), (3, math.nan), (4, 2.0)):
        manager.save(step, {"model.w": torch.ones(1)}, {"metrics": {"validation_loss": value}})
    assert manager.best() == tmp_path / "step-00000004"


def test_a_mean_over_nothing_is_no_metric() -> None:
    total = MetricSum(0.0)
    total.add(StepOutput(torch.tensor(0.0), {"token_accuracy": (0.0, 0.0), "tokens": (torch.tensor(0), 1.0)}))
    assert total.reduce(AcceleratorStub()) == {"tokens": 0.0}


class AcceleratorStub:
    def all_reduce(self, values: list[torch.Tensor | float]) -> torch.Tensor:
        return torch.tensor([float(v) for v in values], dtype=torch.float64)

    def start_all_reduce(self, values: list[torch.Tensor | float]) -> HostCopy:
        return HostCopy(self.all_reduce(values))


def test_early_stopping_counts_and_survives_a_resume() -> None:
    callback, state = EarlyStoppingCallback(patience=2), RunState()
    for value in (3.0, 2.0, 2.5):
        callback.on_evaluate(state, {"validation_loss": value})
    assert "stop" not in state.requests
    other = EarlyStoppingCallback(patience=2)
    other.load_state_dict(json.loads(json.dumps(callback.state_dict())))
    other.on_evaluate(state, {"validation_loss": 2.1})
    assert "not improved in 2" in state.requests["stop"]


def test_callbacks_keep_their_states_apart() -> None:
    first, second = EarlyStoppingCallback(), EarlyStoppingCallback()
    second.best = 1.0
    saved = CallbackList([first, second]).state_dict()
    again = CallbackList([EarlyStoppingCallback(), EarlyStoppingCallback()])
    again.load_state_dict(saved)
    assert [c.best for c in again.callbacks] == [math.inf, 1.0]  # type: ignore[attr-defined]


def test_main_only_callbacks_are_not_called_elsewhere() -> None:
    class Display(Callback):
        main_only = True

    assert CallbackList([Display(), Callback()], is_main=False).callbacks[0].__class__ is Callback


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 2), value), "optimizer.a.step": torch.tensor(value)}


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    manager = CheckpointManager(folder=tmp_path)
    folder = manager.save(7, tensors(2.0), {"position": {"epoch": 1, "row": 8}})
    live = tensors(0.0)
    manifest = manager.load(folder, live)
    assert (manifest["step"], manifest["position"]) == (7, {"epoch": 1, "row": 8})
    assert all(torch.equal(live[name], value) for name, value in tensors(2.0).items())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"], "nothing is left beside"


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    manager = CheckpointManager(folder=tmp_path, keep_last=2, keep_best="validation_loss")
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.6], 1):
        manager.save(step, tensors(), {"metrics": {"validation_loss": loss}})
    assert [p.name[-1] for p in manager.all()] == ["2", "4", "5"]
    assert manager.best() == tmp_path / "step-00000002"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", ["flip", "truncate", "delete", "manifest", "no manifest"])
def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, harm: str) -> None:
    manager = CheckpointManager(folder=tmp_path)
    manager.save(1, tensors(), {})
    newest = manager.save(2, tensors(), {})
    shard = next(newest.glob("*.safetensors"))
    if harm == "flip":
        flip_a_bit(shard)
    elif harm == "truncate":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif harm == "delete":
        shard.unlink()
    elif harm == "manifest":
        (newest / "manifest.json").write_text('{"files": ')
    else:
        (newest / "manifest.json").unlink()
    assert find_damage(newest)
    assert manager.latest() == tmp_path / "step-00000001"
    with pytest.raises(CheckpointError):
        manager.load(newest, tensors())


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    manager = CheckpointManager(folder=tmp_path)
    folder = manager.save(1, tensors(), {})
    with pytest.raises(CheckpointError, match=r"tensor model.a was \[3, 2\], now it is \[2, 2\]"):
        manager.load(folder, {**tensors(), "model.a": torch.ones(2, 2)})


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be written"):
        CheckpointManager(folder=tmp_path / "file" / "x").save(1, tensors(), {})


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a pickle was run')",))


def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    manager = CheckpointManager(folder=tmp_path)
    folder = manager.save(1, tensors(), {})
    (folder / ".metadata").write_bytes(pickle.dumps(_Trap()))
    (folder / "extra.pt").write_bytes(pickle.dumps(_Trap()))
    manager.load(folder, tensors())
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match="damaged"):
        manager.load(folder, tensors())


def test_checkpoint_files_are_plain_safetensors(tmp_path: Path) -> None:
    folder = CheckpointManager(folder=tmp_path / "c").save(1, tensors(3.0), {})
    loaded = load_file(next(folder.glob("*.safetensors")))
    assert torch.equal(loaded["model.a"], torch.full((3, 2), 3.0))
    save_file(loaded, tmp_path / "again.safetensors")


def test_json_lines_replace_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = JSONLines(path, keep=lambda row: False)
    for step in range(5):
        first.write({"step": step})
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 5, "cut of')
    again = JSONLines(path, keep=lambda row: row["step"] <= 2)
    again.write({"step": 3, "new": True})
    again.close()
    assert [r["step"] for r in read_jsonl(path)] == [0, 1, 2, 3]
