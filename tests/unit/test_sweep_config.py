"""The file of a sweep, the values of its trials, and the reports to schedulers, all without Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import LLAMA

from myllm_ray.config.errors import ConfigError
from myllm_ray.config.load import validate
from myllm_ray.config.sweep import SweepConfig, load_sweep, run_config, validate_sweep
from myllm_ray.orchestration.sweeps.console import SweepConsole
from myllm_ray.orchestration.sweeps.report import rewrite_report, write_report
from myllm_ray.orchestration.sweeps.results import SweepFolder, best_of, result_of
from myllm_ray.orchestration.sweeps.schedule import explore, report_interval
from myllm_ray.orchestration.sweeps.space import dimensions_from, draw, plan, trials_of
from myllm_ray.orchestration.sweeps.sweep import sweep as run_sweep

BASE: dict[str, Any] = {
    "trainer": "sft",
    "model": {"config": dict(LLAMA)},
    "tokenizer": {"kind": "bytes"},
    "data": {"train": {"path": "rows.json", "format": "instruction"}, "sequence_length": 64},
    "batch": {"global_size": 8, "micro_size": 2},
    "run": {"name": "base", "max_steps": 20},
}
SPACE = {"optimizer.lr": {"loguniform": [1e-5, 1e-1]}, "scheduler.warmup_steps": {"choice": [0, 4, 16]}}


def make(**changes: Any) -> SweepConfig:
    return validate_sweep({"base": BASE, "space": SPACE, **changes}, "sweep.yaml")


def write(folder: Path, **changes: Any) -> Path:
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "base.yaml", "space": SPACE, **changes}))
    return path


def test_a_file_is_read_with_its_base_and_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, scheduler={"asha": {"grace_steps": 5}}, budget={"steps": 40})
    sweep = load_sweep(path, ["trials=4", "space.scheduler.warmup_steps.choice=[1, 2]"])
    assert (sweep.scheduler.name, sweep.scheduler.grace_steps, sweep.trials) == ("asha", 5, 4)
    assert sweep.space["scheduler.warmup_steps"].values == [1, 2]
    config = run_config(sweep, {"optimizer.lr": 0.5, "scheduler.warmup_steps": 2}, "x", str(tmp_path))
    assert (config.optimizer.lr, config.scheduler.warmup_steps, config.run.max_steps, config.run.name) == (
        0.5,
        2,
        40,
        "x",
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"space": {"optimizer.lrr": {"uniform": [0, 1]}}}, "optimizer.lrr"),
        ({"space": {"optimizer.lr": {"uniform": [1, 0]}}}, "the first number must be smaller"),
        ({"space": {"optimizer.lr": {"normal": [1, 0]}}}, "normal"),
        ({"space": {"optimizer.lr": {}}}, "exactly one of"),
        ({"space": {"optimizer.lr": {"choice": [1], "uniform": [0, 1]}}}, "exactly one of"),
        ({"space": {"optimizer.lr": {"choice": []}}}, "empty list"),
        ({"space": {"optimizer.lr": {"loguniform": [0, 1]}}}, "greater than 0"),
        ({"space": {"optimizer.lr": {"choice": [-1.0, -2.0]}}}, "optimizer.lr"),
        ({"space": {}}, "space"),
        ({"search": "grid"}, "search: grid needs grid or choice"),
        ({"search": "grid", "space": {"optimizer.lr": {"grid": [1, 2]}}, "trials": 3}, "leave out trials"),
        ({"space": {"optimizer.lr": {"grid": [1, 2]}}}, "grid is for search: grid"),
        ({"search": "optuna", "scheduler": "pbt"}, "use search: random"),
        ({"scheduler": "pbt", "trials": 1}, "at least 2 trials"),
        ({"scheduler": "ashes"}, "scheduler"),
        ({"scheduler": {"asha": {"graze": 1}}}, "graze"),
        ({"trails": 3}, "did you mean trials"),
        ({"base": {**BASE, "optimzer": {}}}, "optimzer"),
    ],
)
def test_a_wrong_file_is_reported_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**changes)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("sweep.yaml: ")


def test_a_wrong_file_ends_the_command_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from myllm_ray import cli

    monkeypatch.setattr(
        "sys.argv", ["myllm-ray", "sweep", str(write(tmp_path, space={"optimizer.lrr": {"uniform": [0, 1]}}))]
    )
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "optimizer.lrr" in said
    assert "did you mean lr" in said


@pytest.mark.parametrize(
    ("file", "overrides", "says"),
    [
        ("base.yaml", [], "this is the config of a run"),
        ("sweep.yaml", ["metric=validation_loss"], "needs held-out data"),
        ("sweep.yaml", ["fork_from=nowhere"], "nowhere"),
        ("sweep.yaml", ["space.scheduler.warmup_steps.choice=[]"], "empty list"),
    ],
)
def test_nothing_is_written_before_a_mistake_is_reported(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    overrides: list[str],
    says: str,
) -> None:
    from myllm_ray import cli

    write(tmp_path, run={"name": "s", "storage": str(tmp_path / "sweeps")})
    monkeypatch.setattr("sys.argv", ["myllm-ray", "sweep", str(tmp_path / file), *overrides])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("given", [{"space": SPACE}, {"trials": 3}], ids=str)
def test_settings_beside_a_whole_sweep_are_refused(given: dict[str, Any]) -> None:
    """They were ignored without a message."""
    with pytest.raises(ConfigError, match=f"sweep: a SweepConfig contains {next(iter(given))} already"):
        run_sweep(make(), **given)


def test_values_depend_on_seed_key_and_number_alone() -> None:
    values = plan(make(trials=6))
    assert values is not None
    assert plan(make(trials=3)) == values[:3]
    assert plan(make(trials=6, seed=1)) != values
    alone = plan(make(trials=6, space={"optimizer.lr": SPACE["optimizer.lr"]}))
    assert alone is not None
    assert [v["optimizer.lr"] for v in alone] == [v["optimizer.lr"] for v in values]
    assert all(1e-5 <= v["optimizer.lr"] <= 1e-1 and type(v["optimizer.lr"]) is float for v in values)
    assert yaml.safe_load(yaml.safe_dump(values)) == values


def test_a_log_uniform_key_covers_its_decades_evenly() -> None:
    sweep = make()
    drawn = [draw(sweep, "optimizer.lr", i) for i in range(400)]
    shares = [sum(10.0**d <= v < 10.0 ** (d + 1) for v in drawn) / 400 for d in (-5, -4, -3, -2)]
    assert all(0.18 < share < 0.32 for share in shares), shares


def test_grid_is_every_combination_once() -> None:
    sweep = make(search="grid", space={"optimizer.lr": {"grid": [0.1, 0.2]}, "run.seed": {"choice": [1, 2, 3]}})
    values = plan(sweep)
    assert values is not None
    assert trials_of(sweep) == len(values) == 6
    assert len({tuple(v.values()) for v in values}) == 6


def test_distributions_of_tune_are_accepted() -> None:
    from ray import tune

    given = {
        "a": tune.uniform(0, 1),
        "b": tune.loguniform(1e-5, 1e-2),
        "c": tune.quniform(0, 1, 0.1),
        "d": tune.randint(1, 9),
        "e": tune.choice([1, 2]),
        "f": tune.grid_search([3, 4]),
        "g": [5, 6],
        "h": {"choice": [7]},
    }
    assert dimensions_from(given) == {
        "a": {"uniform": [0, 1]},
        "b": {"loguniform": [1e-5, 1e-2]},
        "c": {"quniform": [0, 1, 0.1]},
        "d": {"randint": [1, 9]},
        "e": {"choice": [1, 2]},
        "f": {"grid": [3, 4]},
        "g": {"choice": [5, 6]},
        "h": {"choice": [7]},
    }
    for other in (
        tune.randn(0, 1),
        tune.qloguniform(1e-4, 1e-1, 5e-5),
        tune.qrandint(1, 9, 2),
        tune.lograndint(1, 9),
        tune.sample_from(lambda spec: 1),
        3,
    ):
        with pytest.raises(ConfigError, match=r"space\.x: can't use"):
            dimensions_from({"x": other})


def test_a_population_explores_near_by_and_within_bounds() -> None:
    sweep = make(
        scheduler={"pbt": {"resample": 0.0}},
        space={
            "optimizer.lr": {"loguniform": [1e-3, 1e-2]},
            "scheduler.warmup_steps": {"choice": [0, 4, 16]},
            "run.seed": {"randint": [0, 10]},
            "optimizer.weight_decay": {"quniform": [0, 1, 0.25]},
        },
    )
    steps = {
        key: {explore(sweep, key, value, n, 10) for n in range(40)}
        for key, value in {
            "optimizer.lr": 5e-3,
            "scheduler.warmup_steps": 4,
            "run.seed": 9,
            "optimizer.weight_decay": 1.0,
        }.items()
    }
    assert steps["optimizer.lr"] == {0.004, 0.006}
    assert steps["scheduler.warmup_steps"] == {0, 16}
    assert steps["run.seed"] <= {7, 9}
    assert steps["optimizer.weight_decay"] <= {0.75, 1.0}
    assert explore(sweep, "optimizer.lr", 9.9e-3, 1, 10) in (0.01, 0.00792)
    assert [explore(sweep, "optimizer.lr", 5e-3, 3, s) for s in range(9)] == [
        explore(sweep, "optimizer.lr", 5e-3, 3, s) for s in range(9)
    ]
    anew = make(scheduler={"pbt": {"resample": 1.0}})
    assert len({explore(anew, "optimizer.lr", 5e-3, n, 10) for n in range(20)}) > 15


def test_the_report_interval_fits_the_scheduler_and_the_metric() -> None:
    def every(steps: int, **changes: Any) -> int:
        sweep = make(**changes)
        return report_interval(sweep, validate(sweep.base), steps)  # type: ignore[arg-type]

    assert every(200, scheduler={"asha": {"grace_steps": 7}}) == 7
    assert every(200, scheduler="pbt") == 40
    assert every(200, scheduler="fifo", report_every=3) == 3
    base = {**BASE, "logging": {"every_steps": 5}}
    assert every(200, base=base, scheduler={"asha": {"grace_steps": 7}}) == 10
    held_out = {**BASE, "data": {**BASE["data"], "validation": {"split": 0.1}}}
    assert (
        every(200, base={**held_out, "evaluation": {"every_steps": 20}}, metric="validation_loss", scheduler="asha")
        == 20
    )
    with pytest.raises(ConfigError, match=r"base\.evaluation\.every_steps"):
        every(200, base=held_out, metric="validation_loss", scheduler="asha")
    with pytest.raises(ConfigError, match=r"base\.data\.validation"):
        every(200, metric="validation_loss")


def row(trial: int, score: float | None, status: str = "done", step: int = 20, **more: Any) -> dict[str, Any]:
    values = {"optimizer.lr": 10.0 ** -(trial % 7 + 1), "scheduler.warmup_steps": 4}
    return {
        "trial": f"{trial:04d}",
        "values": values,
        "status": status,
        "score": score,
        "step": step,
        "seconds": 1.0,
        "error": None,
        "folder": f"trials/{trial:04d}",
        "reports": [[10, 2.0], [20, score]] if score else [],
        **more,
    }


def test_the_best_is_one_that_reached_its_end() -> None:
    rows = [row(0, 1.5), row(1, 1.2), row(2, 0.9, "stopped", 10), row(3, None, "failed", error="x"), row(4, 1.2)]
    best = best_of(rows, "min")
    assert best is rows[1]
    assert best_of(rows, "max") is rows[0]
    assert best_of(rows[2:4], "min") is rows[2]
    assert best_of(rows[3:4], "min") is None


def test_a_sweep_folder_contains_its_results(tmp_path: Path) -> None:
    sweep = make(run={"name": "s", "storage": str(tmp_path)}, trials=5)
    folder = SweepFolder(sweep)
    folder.claim(resume=False)
    for r in [
        row(0, 1.5),
        row(1, 1.2),
        row(2, 0.9, "stopped", 10),
        row(3, None, "failed", error="<b>no</b>"),
        row(4, 3.0),
    ]:
        folder.record(r)
    (tmp_path / "s" / "trials" / "0001").mkdir(parents=True)
    (tmp_path / "s" / "trials" / "0001" / "metrics.jsonl").write_text(
        '{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.2}\n'
    )
    folder.close()
    folder.write_best()
    result = result_of(folder, None)
    assert (
        result.summary() == f"{tmp_path}/s: 3 done, 1 stopped, 1 failed; best loss 1.2 (trial 0001): "
        "optimizer.lr=0.01  scheduler.warmup_steps=4"
    )
    assert list(result.table["loss"].fillna(0)) == [1.5, 1.2, 0.9, 0, 3.0]
    assert result.best_values["optimizer.lr"] == 0.01
    recorded = validate(yaml.safe_load((tmp_path / "s" / "best.yaml").read_text()))
    assert (recorded.optimizer.lr, recorded.run.name, recorded.run.storage) == (0.01, "s-0001", str(tmp_path))
    page = write_report(result, sweep).read_text()
    assert "<b>no</b>" not in page
    assert "&lt;b&gt;no" in page
    drawn = json.loads(re.findall(r'id="page-data">(.*?)</script>', page)[0])
    titles = ["All trials", "loss against optimizer.lr", "loss against scheduler.warmup_steps", "loss of all trials"]
    assert [chart["title"] for chart in drawn["charts"]] == titles
    assert len(drawn["charts"][0]["figure"]["data"]) == 4  # the failed trial has no score
    assert [trace["name"] for trace in drawn["charts"][3]["traces"]] == ["trial 0001"]
    assert rewrite_report(tmp_path / "s").read_text() == page

    again = SweepFolder(sweep.model_copy(update={"trials": 9}))
    again.claim(resume=True)
    assert len(again.rows) == 5
    file = tmp_path / "s" / "sweep.yaml"
    older = yaml.safe_load(file.read_text())
    assert older["base"]["data"]["train"].pop("options") == {}, "a key that older versions did not write"
    file.write_text(yaml.safe_dump(older))
    SweepFolder(sweep).claim(resume=True)
    for changed, says in [
        ({"seed": 3}, "seed is not what it was"),
        ({"space": {"run.seed": {"choice": [1, 2]}}}, "space is not what it was"),
        ({"budget": {"steps": 3}}, "budget.steps"),
    ]:
        with pytest.raises(ConfigError, match=says):
            SweepFolder(make(run={"name": "s", "storage": str(tmp_path)}, **changed)).claim(resume=True)
    with pytest.raises(ConfigError, match="--resume continues it"):
        SweepFolder(sweep).claim(resume=False)
    assert len(SweepFolder(make(run={"name": "s", "storage": str(tmp_path), "overwrite": True})).rows) == 0
    with pytest.raises(ConfigError, match="there is no sweep"):
        SweepFolder(make(run={"name": "none", "storage": str(tmp_path)})).claim(resume=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="not a sweep"):
        SweepFolder(make(run={"name": "run", "storage": str(tmp_path)})).claim(resume=False)


def test_the_live_table_shows_running_trials_first_and_the_best_in_bold() -> None:
    from rich.console import Console

    display = SweepConsole(make(trials=40), 40)
    for number in range(40):
        display.update(row(number, 1.0 + number) if number != 39 else row(39, 0.5, "running"))
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(display.render())
    text = console.export_text()
    assert "39 of 40 trials" in text
    assert "0039" in text
    assert "10 more are in results.jsonl" in text
    assert "optimizer.lr" in text
    assert "scheduler.warmup_steps" in text


def test_a_population_continues_when_a_member_fails_while_the_others_wait() -> None:
    """The class of Tune waits forever in this case."""
    from ray.tune.experiment import Trial as TuneTrial

    from myllm_ray.orchestration.sweeps.schedule import SeededPBT

    class Member:
        def __init__(self, number: int):
            self.trial_id, self.status, self.config = (
                f"m{number}",
                TuneTrial.PAUSED,
                {"trial": {"number": number, "values": {}}},
            )
            self.evaluated_params: dict[str, Any] = {}

        def is_finished(self) -> bool:
            return self.status in (TuneTrial.ERROR, TuneTrial.TERMINATED)

    class Controller:
        def __init__(self, members: list[Any]):
            self.members = members

        def get_live_trials(self) -> list[Any]:
            return self.members

    scheduler: Any = SeededPBT(make(scheduler="pbt", trials=4), 5)
    members = [Member(n) for n in range(4)]
    controller = Controller(members)
    exchanged: list[str] = []
    scheduler._checkpoint_or_exploit = lambda trial, *_: exchanged.append(trial.trial_id)
    for member in members:
        scheduler._trial_state[member] = type(
            "State", (), {"last_score": 1.0, "last_train_time": 5, "last_perturbation_time": 0}
        )()
    scheduler._next_perturbation_sync = 5
    scheduler.on_trial_error(controller, members[3])
    assert sorted(exchanged) == ["m0", "m1", "m2"]
    assert scheduler._next_perturbation_sync == 10
