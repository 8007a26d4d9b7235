"""The HTML pages of runs: their data, size and texts. tests/browser/ opens them in a browser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import MakeConfig
from e2e.test_cli import call
from report_pages import SOURCES, attempt, decoded, event, logged, page_data, points, write_run
from run_folders import beating

from myllm_ray import train
from myllm_ray.common.types import RunState
from myllm_ray.config.errors import ConfigError
from myllm_ray.data import summary
from myllm_ray.data.inspect import describe
from myllm_ray.data.tokenizer import open_tokenizer
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting import run_page
from myllm_ray.engine.reporting.attempts import Attempt, read_attempts, restarts_of, status_of
from myllm_ray.engine.reporting.chart_groups import charts_of
from myllm_ray.engine.reporting.curves import encode, read_curves
from myllm_ray.engine.reporting.evaluations import add_to, read_results
from myllm_ray.engine.reporting.page import as_script, duration, large, number
from myllm_ray.engine.reporting.report import ReportCallback
from myllm_ray.engine.reporting.run_page import write_run_page
from myllm_ray.engine.reporting.run_sections import evaluation
from myllm_ray.preparation import absolute, prepare_data
from myllm_ray.runs.report import write_reports

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}"


def test_every_logged_value_is_in_the_page(tmp_path: Path) -> None:
    rows = logged(300)
    data = page_data(write_run_page(write_run(tmp_path, rows)))
    names = {name for row in rows for name in row} - {"step", "epoch", "time"}
    assert set(data["runs"][0]["series"]) == names
    drawn = [trace["metric"] for chart in data["charts"] for trace in chart.get("traces", ())]
    assert sorted(drawn) == sorted(names), "each metric is in one chart"
    for name in names:
        expected = [(row["step"], np.float32(row[name])) for row in rows if name in row]
        assert list(zip(*points(data, name), strict=True)) == expected


@pytest.mark.parametrize("steps", [10_000, 20_000])
def test_a_page_is_small_and_hides_no_spike(tmp_path: Path, steps: int) -> None:
    rows = logged(steps, spike=steps // 3 + 1)
    samples = [{"step": step, "prompt": "é" * 300, "response": "x" * 3000, "reward": 0.5} for step in range(400)]
    config = yaml.safe_dump({"run": {"name": "r"}, "model": {"config": {f"key_{i}": i for i in range(100)}}})
    page = write_run_page(write_run(tmp_path, rows, samples=samples, config=config))
    assert page.stat().st_size < 3_000_000
    data = page_data(page)
    found = dict(zip(*points(data, "loss"), strict=True))
    assert found[steps // 3 + 1] == 50.0
    exact = {row["step"]: np.float32(row["loss"]) for row in rows}
    assert all(value == exact[step] for step, value in found.items()), "no value is an average"
    assert (min(found), max(found)) == (1, steps)
    assert (len(found) == steps) == (steps == 10_000)
    assert ("intervals of steps" in page.read_text()) == (steps > 10_000)
    lowest = min(row["kl"] for row in rows)
    assert min(points(data, "kl")[1]) == np.float32(lowest)


def test_means_of_intervals_are_those_of_their_values(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": float(step % 7), "time": 1e9} for step in range(1, 1001)]
    curves = read_curves(write_run(tmp_path, rows) / "metrics.jsonl")
    (encoded,), intervals = encode([curves], size=3000)
    assert intervals is not None
    series = encoded["series"]["loss"]
    means = decoded(series["m"], "f4")
    assert len(means) == intervals
    assert series["n"] == pytest.approx(1000 / intervals)
    assert means.mean() == pytest.approx(3.0, abs=0.05)
    assert len(json.dumps(encoded)) < 3300


def test_metrics_that_are_not_finite(tmp_path: Path) -> None:
    rows = logged(50, rl=False)
    rows[20]["loss"], rows[21]["loss"], rows[30]["grad_norm"] = math.nan, math.inf, 1e300
    for row in rows:
        row["never"] = math.nan
    page = write_run_page(write_run(tmp_path, rows))
    data = page_data(page)
    series = data["runs"][0]["series"]
    assert series["loss"]["bad"] == [[21, "nan"], [22, "inf"]]
    assert [math.isfinite(v) for v in points(data, "loss")[1]].count(False) == 2
    assert points(data, "grad_norm")[1][30] == 1e300
    assert len(series["never"]["bad"]) == 50
    assert "not finite" in page.read_text()
    # Where curves are reduced, such a value is listed, too.
    (encoded,), intervals = encode([read_curves(tmp_path / "metrics.jsonl")], size=1)
    assert intervals == 16
    assert encoded["series"]["loss"]["bad"] == [[21, "nan"], [22, "inf"]]


def test_steps_that_are_trained_again_replace_their_rows(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 3, "tokens": 10}\n{"step": 2, "loss": 2.5, "old": 1, "tokens": 10}\n'
        '{"step": 3, "loss": 2, "tokens": 10}\nnot json\n{"step": 2, "loss": 2.4, "tokens": 10, '
        '"note": "x", "on": true}\n'
        '{"step": 3, "loss": 1.9, "big": 1' + "0" * 400 + ', "tokens": 10}\n{"step": 4, "los'
    )
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert curves.steps.tolist() == [1, 2, 3]
    assert curves.series["loss"].values.tolist() == [3, 2.4, 1.9]
    assert curves.tokens.tolist() == [10, 20, 30]
    assert curves.series["big"].values.tolist() == [math.inf]
    assert "note" not in curves.series
    assert "on" not in curves.series
    assert "old" not in encode([curves])[0][0]["series"]
    assert not read_curves(tmp_path / "none.jsonl").steps


def test_charts_of_sources_pairs_and_layers() -> None:
    names = [*(f"loss/{s}" for s in SOURCES), "loss", "validation_loss", "loss/policy", "rewards/chosen"]
    names += ["rewards/rejected", *(f"experts/layer_{n}/load_max" for n in range(20)), "custom"]
    groups = {g.title: {c.title: [t.name for t in c.traces] for c in g.charts} for g in charts_of(names, SOURCES)}
    assert groups["Loss by source"] == {"loss by source": ["books", "code", "wiki"]}
    assert groups["Loss"]["loss"] == ["training", "validation"]
    assert groups["Rewards and policy"]["rewards"] == ["chosen", "rejected"]
    assert "loss/policy" in groups["Rewards and policy"]
    first, second = groups["Experts"].values()
    assert [len(first), len(second)] == [16, 4]
    assert first[2] == "layer_2/load_max"
    assert groups["Other"] == {"custom": ["training"]}


def test_results_of_evaluate_at_steps_that_are_not_logged(tmp_path: Path) -> None:
    """Logged values keep their steps and the trained tokens, and the newest result of a step is shown."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {s}, "loss": {s}.5, "tokens": 10, "time": {s}}}\n' for s in (2, 4, 6))
    )
    (tmp_path / "evaluations").mkdir()

    def result(name: str, step: int | None, time: float, path: str, digest: str, **metrics: Any) -> None:
        settings = {"path": path, "data": {"sha256": digest}} if path else {}
        row = {"step": step, "identity": "x", "time": time, "settings": settings, "metrics": metrics}
        (tmp_path / "evaluations" / f"{name}.json").write_text(json.dumps(row))

    result("a", 3, 1.0, "/data/wiki.jsonl", "abcdef123", loss=9.0, accuracy=None)
    result("b", 3, 2.0, "/data/wiki.jsonl", "abcdef123", loss=8.0)
    result("c", 6, 3.0, "/data/wiki.jsonl", "abcdef123", loss=7.0)
    result("d", 8, 3.0, "", "", **{"arc/acc": 0.5})
    result("e", None, 3.0, "/data/wiki.jsonl", "abcdef123", loss=1.0)
    (tmp_path / "evaluations" / "broken.json").write_text("{")
    curves, results = read_curves(tmp_path / "metrics.jsonl"), read_results(tmp_path)
    add_to(curves, results)
    assert curves.steps.tolist() == [2, 3, 4, 6, 8]
    assert curves.tokens.tolist() == [20, 20, 40, 60, 60]
    assert [[list(part) for part in curves.points(name)] for name in ("loss", "evaluate/wiki.jsonl/loss")] == [
        [[2, 4, 6], [2.5, 4.5, 6.5]],
        [[3, 6], [8.0, 7.0]],
    ]
    assert [part.tolist() for part in curves.points("evaluate/arc/acc")] == [[8], [0.5]]
    result("f", 6, 4.0, "/data/wiki.jsonl", "123456789", loss=6.0)
    curves = read_curves(tmp_path / "metrics.jsonl")
    add_to(curves, read_results(tmp_path))
    assert {"evaluate/wiki.jsonl@abcdef/loss", "evaluate/wiki.jsonl@123456/loss"} <= set(curves.series)
    shown = evaluation(curves, read_results(tmp_path))
    assert shown is not None
    assert len(shown.blocks[0].rows) == 5
    groups = {g.title: [c.title for c in g.charts] for g in charts_of(curves.series)}
    assert groups["Evaluation"][0] == "evaluate/arc/acc"


def test_texts_are_escaped_everywhere(tmp_path: Path) -> None:
    raw = {"trainer": EVIL, "run": {"name": EVIL}, "model": {"name": EVIL}}
    preview = {"row": 0, "tokens": 3, "documents": [1], "pieces": [[EVIL, EVIL, True]], "label": EVIL}
    data = {
        **{
            "documents": 1,
            "tokens": 2,
            "rows": 3,
            "steps": 1,
            "row_tokens": 8,
            "efficiency": 0.5,
            "trained_share": 0.5,
        },
        **{"longer_than_row": 0.0, "validation_rows": 0, "packing": EVIL, "notes": [EVIL], "histogram": [[1, 1, 1]]},
        "sources": [{"name": EVIL, "documents": 1, "tokens": 1, "skipped": 1, "first_skipped": EVIL, "duplicates": 0}],
        "preview": [preview],
    }
    folder = write_run(
        tmp_path,
        [{"step": 1, EVIL: 1.0, "loss": 1.0}],
        config=yaml.safe_dump(raw),
        data_summary=data,
        environment={EVIL: EVIL},
        samples=[{"step": 1, "prompt": EVIL, EVIL: EVIL}],
        interventions=[{"step": 1, "action": EVIL, "reason": EVIL}],
        events=[event("train_start", 1.0, 0, total_steps=2), attempt(2.0, 0, 1, f"failed: ValueError: {EVIL}")],
    )
    text = write_run_page(folder).read_text()
    assert "<script>alert" not in text
    assert "<img" not in text
    assert text.count("</script") == 4  # the theme, the data, Plotly, the page
    assert "{{ 7*7 }}" in text
    assert page_data(text)["runs"][0]["series"].keys() == {EVIL, "loss"}
    for path in (write_reports([folder, folder], tmp_path / "c.html"),):
        assert "<img" not in path.read_text()
    assert as_script(["<", "\u2028", math.nan]) == '["\\u003c","\\u2028",null]'


def test_the_config_shows_what_is_not_the_default(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("optimizer.lr=0.0123")
    folder = write_run(tmp_path / "r", [], config=yaml.safe_dump(config.model_dump(mode="json")))
    text = " ".join(write_run_page(folder).read_text().split())
    assert '<td class="key">optimizer.lr</td><td class="mark">0.0123</td>' in text
    assert '<td class="key">checkpoint.resume</td><td class="">never</td><td class="">never</td>' in text
    assert "has logged no metrics" in text
    (folder / "config.yaml").write_text("trainer: nowhere:Nothing\nrun: {name: x}\n")
    assert "The defaults are not known" in write_run_page(folder).read_text()
    (folder / "config.yaml").write_text(": : :")
    assert "Curves" in write_run_page(folder).read_text()


class Breaks(Callback):
    def on_step_end(self, state: RunState) -> None:
        if state.step == 2:
            raise ValueError("it broke")


def test_the_page_of_a_run_that_failed_and_was_resumed(make_config: MakeConfig) -> None:
    """The process that starts a run writes the page after its last record."""
    common = ("run.max_steps=3", "checkpoint.every_steps=1")
    with pytest.raises(ValueError, match="it broke"):
        train(make_config(*common, callbacks=["jsonl", "report", f"{__name__}:Breaks"]))
    config = make_config(*common, "checkpoint.resume=auto", callbacks=["jsonl", "report"])
    page = Path(config.run.storage) / config.run.name / "report.html"
    text = page.read_text()
    assert "ValueError: it broke" in text
    assert '<span class="status bad">failed</span>' in text
    folder = Path(train(config).folder)
    assert '<span class="status good">finished</span>' in page.read_text()
    assert [(a.first, a.last, a.how) for a in read_attempts(folder)] == [
        (0, 1, "failed: ValueError: it broke"),  # step 2 was not completed
        (1, 3, "done"),
    ]
    (mark,) = page_data(page)["runs"][0]["events"]
    assert mark == [1, "step 1: resumed (failed: ValueError: it broke)"]
    page.unlink()
    with pytest.raises(ConfigError):
        train(make_config(*common, callbacks=["jsonl", "report"]))
    assert not page.exists(), "a run that is refused writes nothing"


def test_attempts_of_a_run(tmp_path: Path) -> None:
    write_run(
        tmp_path,
        logged(9, rl=False),
        events=[
            event("train_start", 100.0, 0, total_steps=9),
            attempt(150.0, 0, 5, "failed: worker 1 died"),
            attempt(160.0, 4, 4, "failed: no node"),  # no worker started
            event("train_start", 200.0, 4, total_steps=9),  # killed, with the process that started the run
            event("train_start", 300.0, 6, total_steps=9),
            attempt(350.0, 6, 8, "amended: at step 8"),
            event("train_start", 360.0, 8, total_steps=9),
        ],
        interventions=[{"step": 7, "action": "skip", "reason": "a spike"}],
    )
    attempts = read_attempts(tmp_path)
    assert [(a.first, a.last, a.seconds) for a in attempts] == [
        *((0, 5, 50.0), (4, 4, None), (4, None, None), (6, 8, 50.0), (8, None, None))
    ]
    assert page_data(write_run_page(tmp_path))["runs"][0]["events"] == [
        [4, "step 4: resumed (failed: worker 1 died)"],
        [4, "step 4: resumed (failed: no node)"],
        [6, "step 6: resumed (the process ended without recording why)"],
        [7, "step 7: skip: a spike"],
        [8, "step 8: amended: at step 8"],
    ]
    # All steps are logged, but no end: a TorchTrainer of the user.
    assert status_of(tmp_path, attempts, 9) == "finished"
    assert status_of(tmp_path, attempts, 8) == "dead"
    rows = [{"workers": 2, "from_step": 0, "to_step": 9, "end": "done", "time": 251.0}]
    old = write_run(tmp_path / "old", [], attempts=rows)  # a run of an earlier version
    assert [a.how for a in read_attempts(old)] == ["done"]


def test_a_page_of_a_process_that_records_no_end(tmp_path: Path) -> None:
    """A TorchTrainer of the user: rank 0 writes the page while its heartbeat is active."""
    write_run(tmp_path, logged(9, rl=False), events=[event("train_start", 100.0, 0, total_steps=9)])
    with beating(tmp_path):
        ReportCallback().on_train_end(RunState(step=9, total_steps=9, folder=str(tmp_path)))
        assert '<span class="status good">finished</span>' in (tmp_path / "report.html").read_text()
        ReportCallback().on_exception(RunState(step=9, total_steps=9, folder=str(tmp_path)), ValueError("mine"))
        assert "failed: ValueError: mine" in (tmp_path / "report.html").read_text()


def test_an_amendment_is_no_restart() -> None:
    ends = ["amended: at 2", "failed: x", "amended: at 5", "done"]
    assert restarts_of([Attempt(0, None, how=how) for how in ends]) == 1


def test_a_damaged_file_leaves_out_its_section(tmp_path: Path) -> None:
    folder = write_run(tmp_path, logged(3, rl=False), data_summary={"documents": 1}, config="run: null\nmodel: null\n")
    text = write_run_page(folder).read_text()
    assert "A file of the run is damaged: KeyError" in text
    assert "Curves" in text


def test_a_page_that_fails_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(run_page, "run_page", fail)
    ReportCallback().on_train_end(RunState(step=9, total_steps=9, folder=str(tmp_path)))
    assert warned == [f"{tmp_path}/report.html was not written: RuntimeError: no room"]


def test_a_comparison_shows_what_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [yaml.safe_dump({"optimizer": {"lr": lr, "name": "adamw"}, "run": {"name": "x"}}) for lr in (0.1, 0.2)]
    one = write_run(tmp_path / "one", logged(20, rl=False), config=configs[0], environment={"torch": "2.13.0"})
    two = write_run(tmp_path / "two", logged(30), config=configs[1], environment={"torch": "2.14.0"})
    code, out, _ = call(capsys, monkeypatch, "report", one, two, "-o", tmp_path / "c.html")
    assert (code, out) == (0, f"wrote {tmp_path}/c.html\n")
    text = (tmp_path / "c.html").read_text()
    data = page_data(text)
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    traces = {chart["title"]: [trace["run"] for trace in chart["traces"]] for chart in data["charts"]}
    assert traces["loss"] == [0, 1]
    assert traces["kl"] == [1]
    assert points(data, "loss", 1)[0] == list(range(1, 31))
    assert "optimizer.lr" in text
    assert "optimizer.name" not in text
    assert "2.14.0" in text
    code, out, _ = call(capsys, monkeypatch, "report", one)
    assert (code, out) == (0, f"wrote {one}/report.html\n")


def test_wrong_folders_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = write_run(tmp_path / "one", logged(5, rl=False))
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.yaml").write_text("trials: many\n")
    for arguments, says in [
        ((tmp_path / "nowhere",), "no such folder"),
        ((one, tmp_path / "empty"), "is not the folder of a run"),
        ((one, tmp_path / "sweep"), "is a sweep"),
        ((tmp_path / "sweep",), "sweep.yaml can't be read"),
        ((one, "-o", tmp_path), "is a folder"),
    ]:
        code, _, err = call(capsys, monkeypatch, "report", *arguments)
        assert code == 2
        assert says in err
        assert len(err.splitlines()) == 1
    with pytest.raises(ConfigError, match="can't be written"):
        write_reports([one, one], Path("/proc/none/c.html"))


def test_the_summary_of_the_data(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_data(absolute(make_config()))
    tokenizer = open_tokenizer(prepared.tokenizer_folder)
    whole, known = summary.summarize(prepared, tokenizer), describe(prepared, tokenizer)
    assert json.loads(json.dumps(whole)) == whole
    assert whole["sources"][0]["documents"] == known.sources[0].documents == whole["documents"]
    assert [tuple(bin) for bin in whole["histogram"]] == known.histogram
    assert whole["efficiency"] == pytest.approx(known.efficiency)
    assert (whole["rows"], whole["validation_rows"]) == (known.rows, known.validation_rows)
    assert whole["sampled_documents"] is None
    assert any(trained for *_, trained in whole["preview"][0]["pieces"])
    # A large store is read in few places only.
    read: list[int] = []
    lengths = type(prepared.train.plan.store).lengths
    monkeypatch.setattr(
        type(prepared.train.plan.store),
        "lengths",
        lambda self, documents: read.append(len(documents)) or lengths(self, documents),
    )
    monkeypatch.setattr(summary, "_MOST", 20)
    monkeypatch.setattr(summary, "_BLOCK", 5)
    part = summary.summarize(prepared, tokenizer)
    assert part["sampled_documents"] == 20
    assert max(read) <= 20
    assert part["documents"] == whole["documents"]
    assert part["efficiency"] == pytest.approx(whole["efficiency"], abs=0.1)


def test_numbers_for_people() -> None:
    assert [number(v) for v in (None, 3.0, 0.5, 1e-5, 12345.678, math.nan)] == [
        *("–", "3", "0.50000", "1.0000e-05", "12,346", "nan")
    ]
    assert [duration(s) for s in (0.5, 42, 125, 7500, 200_000)] == [
        *("0.5 s", "42 s", "2 min 05 s", "2 h 05 min", "2 d 07 h")
    ]
    assert [large(v) for v in (999, 1234, 5.6e9)] == ["999", "1.23 k", "5.6 B"]
