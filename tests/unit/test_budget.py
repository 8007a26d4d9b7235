"""The budget of a run: it saves and stops at the same step everywhere, and a run that has used it says so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import MakeConfig, comparable, ledger

from myllm_ray.common.files import read_jsonl
from myllm_ray.config.errors import ConfigError
from myllm_ray.config.run_section import BudgetSection
from myllm_ray.config.sweep import validate_sweep
from myllm_ray.data.row_tokens import batches_for_tokens, row_tokens
from myllm_ray.engine.budget import reason_to_stop, seconds_used
from myllm_ray.preparation import absolute, prepare_data
from myllm_ray.worker import run_local


def test_tokens_are_counted_from_the_plan(make_config: MakeConfig) -> None:
    spec = prepare_data(absolute(make_config())).train
    built = []
    for epoch in (0, 1):
        rows = [sum(s.length for s in row) for row in spec.plan.rows(epoch, 0, spec.plan.rows_in_epoch(epoch))]
        assert row_tokens(spec.plan, epoch).tolist() == rows
        built += [sum(rows[i : i + spec.global_size]) for i in range(0, len(rows), spec.global_size)]
    micro = spec.build(0, 0, spec.global_size)
    assert int((micro["source_ids"] >= 0).sum()) == built[0]
    total = np.cumsum(built)
    for tokens in (1, total[0] - 1, total[0], total[0] + 1, total[-1]):
        found = int(np.searchsorted(total, tokens)) + 1
        assert batches_for_tokens(spec, int(tokens), most=found) == found
        assert batches_for_tokens(spec, int(tokens), most=found - 1) is None


def test_a_budget_of_tokens_saves_stops_and_resumes(make_config: MakeConfig) -> None:
    whole = run_local(make_config("run.name=whole"))
    spec = prepare_data(absolute(make_config())).train
    tokens = int(row_tokens(spec.plan, 0)[: 2 * spec.global_size].sum())
    given = (f"run.budget.tokens={tokens}", "checkpoint.at_end=false", "checkpoint.resume=auto")
    first = run_local(make_config(*given))
    assert (first["step"], first["exit"], Path(first["checkpoint"]).name) == (2, None, "step-00000002")
    with pytest.raises(ConfigError, match=r"is at step 2 and has used its budget .run.budget.tokens: .* after step 2"):
        run_local(make_config(*given))
    more = run_local(make_config("run.budget.tokens=1000000000", "checkpoint.resume=auto"))
    assert more["step"] == 6
    assert ledger(str(more["folder"])) == ledger(str(whole["folder"]))
    assert [r["loss"] for r in comparable(str(more["folder"]))] == [r["loss"] for r in comparable(whole["folder"])]


def test_hours_and_dollars_count_all_attempts(make_config: MakeConfig, tmp_path: Path) -> None:
    used = make_config("run.budget.hours=1e-9", "checkpoint.resume=auto")
    result = run_local(used)
    folder = Path(str(result["folder"]))
    assert (result["step"], Path(result["checkpoint"]).name) == (1, "step-00000001")
    assert seconds_used(folder) > 0
    with pytest.raises(ConfigError, match=r"run.budget.hours: 1e-09 hours are used"):
        run_local(used)
    before = seconds_used(folder)
    run_local(make_config("run.budget={usd: 1, usd_per_hour: 0.5}", "checkpoint.resume=auto"))
    assert seconds_used(folder) > before
    ends = [row for row in read_jsonl(folder / "events.jsonl") if row["event"] == "end"]
    assert ends[-1]["status"] == "done"


@pytest.mark.parametrize(
    ("budget", "seconds", "step", "reason"),
    [
        ({"hours": 2}, 7199, 5, None),
        ({"hours": 2}, 7200, 5, "2 hours"),
        ({"usd": 10, "usd_per_hour": 5}, 7199, 5, None),
        ({"usd": 10, "usd_per_hour": 5}, 7200, 5, "10 USD"),
        ({"tokens": 100, "hours": 2}, 0, 7, None),
        ({"tokens": 100, "hours": 2}, 0, 8, "100 tokens"),
    ],
)
def test_reasons(budget: dict[str, float], seconds: float, step: int, reason: str | None) -> None:
    found = reason_to_stop(BudgetSection(**budget), seconds, step, 8 if "tokens" in budget else None)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.budget={}"], "give hours, tokens or usd"),
        (["run.budget.usd=3"], "usd and usd_per_hour belong together"),
        (["run.budget={hours: 1, usd_per_hour: 3}"], "usd and usd_per_hour belong together"),
        (["run.budget.hours=0"], "run.budget.hours"),
    ],
)
def test_wrong_budgets_are_refused(make_config: MakeConfig, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(*overrides)


def test_what_a_budget_of_tokens_does_not_support(make_config: MakeConfig) -> None:
    pairs = ("trainer=dpo", "data.train={source: brackets, format: preference, limit: 30}", "data.validation=null")
    with pytest.raises(ConfigError, match=r"trainer dpo does not read tokens; use run.budget.hours"):
        run_local(make_config(*pairs, "run.budget.tokens=100", "data.sequence_length=32"))
    amended = "run.amendments=[{at: 2, set: {batch.global_size: 4}}]"
    with pytest.raises(ConfigError, match=r"changes batch.global_size"):
        run_local(make_config(amended, "run.budget.tokens=100"))
    with pytest.raises(ConfigError, match=r"run.budget.hours can't change within a run"):
        run_local(make_config("run.amendments=[{at: 2, set: {run.budget.hours: 4}}]"))


def test_a_sweep_has_its_own_budget(make_config: MakeConfig) -> None:
    base = make_config("run.budget.hours=1").model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"run.budget: a sweep has a budget of its own"):
        validate_sweep({"base": base, "space": {"optimizer.lr": {"choice": [1e-3, 1e-2]}}})
    with pytest.raises(ConfigError, match=r"run.budget: a sweep has a budget of its own"):
        validate_sweep(
            {"base": make_config().model_dump(mode="json"), "space": {"run.budget.hours": {"choice": [1, 2]}}}
        )
