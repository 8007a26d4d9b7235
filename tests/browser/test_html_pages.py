"""The HTML pages in a headless Chromium: what they show, how they are operated, and that they request nothing."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import read_jsonl
from e2e.test_kills import killed
from harness import STEPS, job_config
from report_pages import attempt, event, logged, page_data, write_run

from myllm_ray import train
from myllm_ray.config.sweep import SweepConfig
from myllm_ray.engine.lr_finder import analyse
from myllm_ray.engine.reporting.attempts import read_attempts
from myllm_ray.engine.reporting.run_page import write_run_page
from myllm_ray.orchestration.sweeps.report import write_report
from myllm_ray.orchestration.sweeps.results import SweepResult, best_of
from myllm_ray.runs.report import write_reports

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def found_browser() -> tuple[str, str]:
    """Returns the paths of a browser and of its driver. Skips the test, or fails if a browser is required."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    missing = "no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    if os.environ.get("MYLLM_RAY_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{missing}, and MYLLM_RAY_REQUIRE_BROWSER=1")
    pytest.skip(missing)


class Browser:
    """A browser with helpers for the pages."""

    def __init__(self, driver: Any):
        self.driver = driver

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        scheme = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},  # a click scrolls, and the driver does not wait
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get_log("performance")
        self.driver.get(path.absolute().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, seconds: float = 20.0) -> Any:
        """Waits until a script returns a true value and returns it."""
        limit = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < limit, f"never true: {script}"
            time.sleep(0.05)
        return found

    def draw_all(self) -> None:
        """Scrolls to every chart, as a reader does: a chart is drawn when it comes near the visible part."""
        charts = self.run("return document.querySelectorAll('figure.chart').length")
        for number in range(charts):
            chart = f"document.querySelectorAll('figure.chart')[{number}]"
            self.run(f"{chart}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
            self.until(f"return {chart}.dataset.drawn")

    def traces(self) -> list[dict[str, Any]]:
        """Returns for each trace of all charts its name, visible color, `meta`, x and y."""
        found: list[dict[str, Any]] = self.run(
            "return Array.from(document.querySelectorAll('.js-plotly-plot')).flatMap(plot => plot.data.map(t => "
            "({name: t.name, meta: t.meta || {}, x: Array.from(t.x || []), y: Array.from(t.y || []), "
            "color: (t.line || {}).color, type: t.type})))"
        )
        return found

    def problems(self) -> list[str]:
        """Returns messages of the console, and requests for anything but the page itself."""
        said = [entry["message"] for entry in self.driver.get_log("browser")]
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("data:", "blob:")) and url != self.driver.current_url.partition("#")[0]:
                    said.append(f"requested {url[:200]}")
        return said


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path, driver_path = found_browser()
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = path
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    yield Browser(driver)
    driver.quit()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed at step 7 and resumed from the checkpoint of step 6."""
    shared = tmp_path_factory.mktemp("resumed")
    config = job_config(
        shared,
        "run",
        "scaling.workers=0",
        "accelerator.name=single",
        "checkpoint.every_steps=3",
        "logging.every_steps=1",
    )
    kill = {"helpers:KillOnce": {"step": 7, "marker": str(shared / "killed")}}
    config["callbacks"] = ["jsonl", "report", kill]
    assert killed(config)
    folder = Path(train(config).folder)
    assert [(a.first, a.last) for a in read_attempts(folder)] == [(0, None), (6, STEPS)]
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a made run with all kinds of sections."""
    rows = logged(400, spike=200)
    rows[50]["kl"] = float("nan")
    samples = [{"step": s, "prompt": f"question {s} {EVIL}", "response": "x", "reward": s / 10} for s in range(1, 30)]
    folder = write_run(
        tmp_path_factory.mktemp("page") / "made",
        rows,
        samples=samples,
        config=yaml.safe_dump({"run": {"name": f"made {EVIL}"}, "trainer": "grpo"}),
        environment={"torch": "2.13.0", "command": ["myllm-ray", "train"]},
        interventions=[{"step": 200, "action": "skip", "reason": "a spike"}],
        events=[
            event("train_start", 1.79e9, 0, total_steps=400),
            event("train_start", 1.79e9 + 60, 100, total_steps=400),
            attempt(1.79e9 + 90, 100, 400, "done"),
        ],
    )
    return write_run_page(folder)


def test_a_page_opens_from_disk_and_draws_every_curve(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.draw_all()
    raw = [t for t in browser.traces() if t["meta"].get("role") == "raw"]
    names = {name for row in read_jsonl(page.parent / "metrics.jsonl") for name in row} - {"step", "epoch", "time"}
    assert sorted(t["meta"]["metric"] for t in raw) == sorted(names)
    loss = next(t for t in raw if t["meta"]["metric"] == "loss")
    assert loss["x"] == list(range(1, 401))
    assert max(loss["y"]) == 50
    kl = next(t for t in raw if t["meta"]["metric"] == "kl")
    assert [x for x, y in zip(kl["x"], kl["y"], strict=True) if y is None] == [51]
    assert any(t["meta"].get("role") == "bad" for t in browser.traces())
    drawn = browser.run("return document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length")
    assert drawn >= len(raw)
    assert browser.driver.title.startswith("made </script>"), "the text of a config is text"
    assert browser.problems() == []


def test_the_switches(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.draw_all()
    plots = "Array.from(document.querySelectorAll('.js-plotly-plot'))"
    curves = f"{plots}.filter(p => p.data.some(t => (t.meta || {{}}).role === 'raw'))"
    assert browser.run(f"return {curves}.every(p => p._fullLayout.yaxis.type === 'linear')")
    before = browser.traces()
    browser.driver.find_element("id", "log").click()
    kinds = browser.run(
        f"return Object.fromEntries({curves}.map(p => [p.closest('figure').querySelector('figcaption').firstChild."
        "textContent.trim(), p._fullLayout.yaxis.type]))"
    )
    assert kinds["loss"] == "log"
    assert kinds["kl"] == "linear", "a logarithmic axis would hide values that are not positive"
    assert browser.run("return document.querySelectorAll('figcaption .linear').length") > 0
    browser.driver.find_element("id", "log").click()

    browser.run(
        "const s = document.getElementById('smooth'); s.focus(); s.value = 0.9;"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    browser.until(f"return {curves}.every(p => p.data.some(t => t.meta.role === 'smoothed'))")
    now = browser.traces()
    raw = {t["meta"]["metric"]: t for t in now if t["meta"].get("role") == "raw"}
    smooth = {t["meta"]["metric"]: t for t in now if t["meta"].get("role") == "smoothed"}
    assert raw.keys() == smooth.keys()
    loss, average = raw["loss"]["y"], smooth["loss"]["y"]
    assert loss == next(t["y"] for t in before if t["meta"].get("metric") == "loss"), "the raw curve stays"
    assert raw["loss"]["color"].startswith("rgba(")
    mean, expected = 0.0, []
    for count, value in enumerate(loss, 1):
        mean = 0.9 * mean + 0.1 * value
        expected.append(mean / (1 - 0.9**count))
    assert average == pytest.approx(expected)

    for axis, last in (("tokens", 400 * 8192), ("time", 399 * 0.21)):
        browser.run(f"const x = document.getElementById('x'); x.value = '{axis}'; x.dispatchEvent(new Event('change'))")
        trace = next(t for t in browser.traces() if t["meta"].get("metric") == "loss")
        assert trace["x"][-1] == pytest.approx(last, rel=1e-3)
    assert browser.problems() == []


def test_dark_and_light(browser: Browser, page: Path) -> None:
    def background() -> int:
        """Returns the brightness of the page."""
        color = browser.run("return getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])

    browser.open(page)
    light = background()
    button = browser.driver.find_element("id", "theme")
    assert (button.get_attribute("aria-pressed"), light > 600) == ("false", True)
    button.click()
    assert background() < 150
    assert button.get_attribute("aria-pressed") == "true"
    browser.draw_all()
    colour = browser.run("return document.querySelector('.js-plotly-plot')._fullLayout.xaxis.tickfont.color")
    assert colour == browser.run("return getComputedStyle(document.documentElement).getPropertyValue('--soft').trim()")
    browser.open(page, dark=True)
    assert background() < 150
    assert browser.problems() == []


def test_the_keyboard_reaches_every_control(browser: Browser, page: Path) -> None:
    from selenium.webdriver import ActionChains, Keys

    browser.open(page)
    browser.draw_all()
    browser.run(  # Tab starts at an element before all others
        "const start = document.createElement('span'); start.tabIndex = -1; document.body.prepend(start);start.focus()"
    )
    wanted = browser.run(
        "return Array.from(document.querySelectorAll('a[href], button, select, input, .plot, .scroll, pre'))"
        ".filter(e => !e.hidden && e.offsetParent !== null && !e.closest('.js-plotly-plot .plot-container')).length"
    )
    seen: list[str] = []
    for _ in range(wanted + 10):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        at = browser.run(
            "const e = document.activeElement; if (e === document.body) return null;"
            "e.dataset.seen = e.dataset.seen || String(Math.random());"
            "return [e.dataset.seen, e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle]"
        )
        if at is None or at[0] in seen[::2]:
            break
        assert at[2] != "none", f"no visible focus at {at[1]}"
        seen += [at[0], at[1]]
    assert seen[1::2][:2] == ["skip", "theme"]
    order = [name for name in seen[1::2] if name in ("x", "smooth", "log", "reset-zoom")]
    assert order == ["x", "smooth", "log", "reset-zoom"]
    assert len(seen) // 2 == wanted

    plot = browser.driver.find_element("css selector", ".js-plotly-plot")
    browser.run("arguments[0].focus()", plot)
    start = browser.run("return document.activeElement._fullLayout.xaxis.range")
    ActionChains(browser.driver).send_keys("+").perform()
    near = browser.run("return document.activeElement._fullLayout.xaxis.range")
    assert near[1] - near[0] == pytest.approx((start[1] - start[0]) / 2)
    ActionChains(browser.driver).send_keys(Keys.ARROW_RIGHT).perform()
    assert browser.run("return document.activeElement._fullLayout.xaxis.range")[0] > near[0]
    ActionChains(browser.driver).send_keys("0").perform()
    assert browser.run("return document.activeElement._fullLayout.xaxis.range") == pytest.approx(start)
    names = browser.run(
        "return Array.from(document.querySelectorAll('.plot, .scroll, nav, .controls, input, select'))"
        ".filter(e => !(e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"
    )
    assert names == 0, "every control and chart has a name"
    assert browser.run("return Array.from(document.querySelectorAll('table')).every(t => t.caption && t.tHead)")


def test_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    table = browser.driver.find_element("id", "table-samples")
    table.find_element("css selector", "input.filter").send_keys("question 7 ")
    rows = [row for row in table.find_elements("css selector", "tbody tr") if row.is_displayed()]
    assert len(rows) == 1
    assert EVIL in rows[0].text
    assert table.find_element("css selector", ".count").text == "1 of 29"
    assert browser.driver.title.startswith("made </script>")
    assert browser.problems() == []


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    browser.draw_all()
    assert browser.run("return document.documentElement.scrollWidth") <= width
    assert browser.run(
        "return Array.from(document.querySelectorAll('.js-plotly-plot svg.main-svg')).every(s => "
        "s.getBoundingClientRect().right <= innerWidth)"
    )


def test_a_page_prints_all_charts(browser: Browser, page: Path) -> None:
    browser.open(page, dark=True)
    pdf = browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(pdf["data"]) > 10_000
    assert browser.run("return Array.from(document.querySelectorAll('figure.chart')).every(f => f.dataset.drawn)")
    assert browser.problems() == []


def test_a_run_that_was_killed_has_one_curve_and_marks(browser: Browser, resumed: Path) -> None:
    browser.open(resumed / "report.html")
    browser.draw_all()
    traces = browser.traces()
    loss = next(t for t in traces if t["meta"].get("metric") == "loss")
    steps = [row["step"] for row in read_jsonl(resumed / "metrics.jsonl") if "loss" in row]
    assert loss["x"] == steps == list(range(steps[0], steps[-1] + 1)), "no gap and no step twice"
    marks = [t for t in traces if t["meta"].get("role") == "events"]
    assert marks
    assert all(t["x"] == [6] for t in marks)
    assert page_data(resumed / "report.html")["runs"][0]["events"][0][1].startswith("step 6: resumed")
    text = browser.run("return document.body.innerText")
    for section in ("Timeline", "Data", "Config", "Environment", "Checkpoints", "packing efficiency"):
        assert section in text
    assert browser.run("return document.querySelectorAll('.tokens mark').length") > 0
    assert browser.problems() == []


def sweep_page(folder: Path) -> Path:
    space = {"optimizer.lr": {"loguniform": [1e-5, 1e-1]}, "scheduler.name": {"choice": ["cosine", EVIL]}}
    base = {
        "trainer": "sft",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"kind": "bytes"},
        "data": {"train": {"path": "x.json", "format": "text"}},
        "run": {"max_steps": 5},
    }
    sweep = SweepConfig.model_validate(
        {"base": base, "metric": "loss", "space": space, "trials": 14, "run": {"name": "s", "storage": str(folder)}}
    )
    rows: list[dict[str, Any]] = []
    for number in range(14):
        name, failed = f"{number:04d}", number == 3
        write_run(folder / "trials" / name, logged(20, rl=False))
        values = {"optimizer.lr": 10.0 ** -(1 + number / 4), "scheduler.name": ("cosine", EVIL)[number % 2]}
        row = {"trial": name, "values": values, "status": "failed" if failed else "done", "step": 20, "seconds": 1.0}
        rows.append(row | {"score": None if failed else 2.0 + number, "error": EVIL if failed else None, "folder": ""})
    return write_report(SweepResult(str(folder), "loss", rows, best_of(rows, "min"), None, None), sweep)


def comparison_page(folder: Path) -> Path:
    runs = [write_run(folder / name, logged(30, rl=name == "b")) for name in ("a", "b", "c")]
    return write_reports(runs, folder / "comparison.html")


def range_test_page(folder: Path) -> Path:
    rates = [10 ** (-5 + i / 20) for i in range(100)]
    found = analyse(rates, [4 - i / 40 if i < 80 else i / 40 for i in range(100)])
    found.write_report(folder / "lr_find.html", "test")
    return folder / "lr_find.html"


@pytest.mark.parametrize(
    ("make", "curves", "others"), [(sweep_page, 14, 14), (comparison_page, None, 0), (range_test_page, 0, 3)]
)
def test_other_pages(
    browser: Browser, tmp_path: Path, make: Callable[[Path], Path], curves: int | None, others: int
) -> None:
    path = make(tmp_path)
    browser.open(path)
    browser.draw_all()
    traces = browser.traces()
    raw = [t for t in traces if t["meta"].get("role") == "raw"]
    expected = sum(len(run["series"]) for run in page_data(path)["runs"]) if curves is None else curves
    assert len(raw) == expected
    # Of the sweep: a line for each trial with a result, and a scatter chart for each of two keys, less one.
    assert len(traces) - len(raw) == others + (1 if make is sweep_page else 0)
    browser.driver.find_element("id", "theme").click()
    assert browser.driver.title != "owned"
    assert browser.problems() == []


def test_a_missing_browser_fails_where_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("MYLLM_RAY_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="MYLLM_RAY_REQUIRE_BROWSER=1"):
        found_browser()
    monkeypatch.delenv("MYLLM_RAY_REQUIRE_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="apt-get install"):
        found_browser()
