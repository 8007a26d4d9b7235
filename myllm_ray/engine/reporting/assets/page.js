(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const state = { x: "step", log: false, smooth: 0 };
  const KINDS = { u4: Uint32Array, f4: Float32Array, f8: Float64Array };

  // ---- numbers -----------------------------------------------------------------------------------------------------

  function decode(text, kind) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new KINDS[kind](bytes.buffer);
  }

  const decoded = new Map();
  function once(key, make) {
    if (!decoded.has(key)) decoded.set(key, make());
    return decoded.get(key);
  }

  function column(run, name) {
    const found = data.runs[run][name];
    return found && once(`${run} ${name}`, () => decode(found, name === "step" ? "u4" : "f4"));
  }

  /** The drawn points of a metric: steps and values, and means by interval where the curve was reduced. */
  function series(run, metric) {
    const found = data.runs[run].series[metric];
    return once(`${run} series ${metric}`, () => ({
      steps: found.s ? decode(found.s, "u4") : column(run, "step"),
      values: decode(found.v, found.d || "f4"),
      meanSteps: found.ms && decode(found.ms, "u4"),
      means: found.m && decode(found.m, found.md || "f4"),
      count: found.n || 1,
      bad: found.bad || [],
    }));
  }

  /** Coordinates of steps on the selected x axis; between two logged rows they are interpolated. */
  function places(run, steps) {
    if (state.x === "step" || !column(run, state.x)) return Array.from(steps);
    const known = column(run, "step"), values = column(run, state.x), unit = state.x === "time" ? timeUnit().seconds : 1;
    const out = new Array(steps.length);
    let at = 0;
    for (let i = 0; i < steps.length; i++) {
      while (at < known.length - 1 && known[at + 1] <= steps[i]) at++;
      const next = Math.min(at + 1, known.length - 1), width = known[next] - known[at];
      const share = width > 0 ? Math.max(0, Math.min(1, (steps[i] - known[at]) / width)) : 0;
      out[i] = (values[at] + (share ? share * (values[next] - values[at]) : 0)) / unit;
    }
    return out;
  }

  function timeUnit() {
    return once("unit", () => {
      let most = 0;
      data.runs.forEach((_, run) => { const t = column(run, "time"); if (t && t.length) most = Math.max(most, t[t.length - 1] || 0); });
      return most > 3 * 3600 ? { name: "h", seconds: 3600 } : most > 180 ? { name: "min", seconds: 60 } : { name: "s", seconds: 1 };
    });
  }

  /** Exponential moving average with bias correction; `count` values stand behind each given one. */
  function smoothed(values, count) {
    const keep = Math.pow(state.smooth, count);
    let mean = 0, weight = 0;
    return Array.from(values, (value) => {
      if (!Number.isFinite(value)) return null;
      mean = keep * mean + (1 - keep) * value;
      weight = keep * weight + (1 - keep);
      return mean / weight;
    });
  }

  // ---- colours -----------------------------------------------------------------------------------------------------

  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colour = (which) => (typeof which === "number" ? css(`--c${which % 8}`) : which);
  const dash = (which) => (typeof which === "number" && which >= 8 ? ["dash", "dot", "dashdot"][(Math.floor(which / 8) - 1) % 3] : "solid");

  function faint(value) {
    const hex = /^#(..)(..)(..)$/.exec(value);
    return hex ? `rgba(${hex.slice(1).map((part) => parseInt(part, 16)).join(",")},0.28)` : value;
  }

  function axis(extra) {
    return Object.assign({
      gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ticks: "", exponentformat: "power",
      tickfont: { color: css("--soft"), size: 11 }, title: { font: { color: css("--soft"), size: 12 } },
    }, extra);
  }

  function layout(extra) {
    const font = { family: "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif", size: 12, color: css("--ink") };
    return Object.assign({
      font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 12, t: 10, b: 36 },
      hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { ...font, size: 12 } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12, color: css("--soft") }, bgcolor: "rgba(0,0,0,0)" },
      hovermode: "x unified", dragmode: "zoom", uirevision: state.x,
    }, extra);
  }

  // ---- charts ------------------------------------------------------------------------------------------------------

  function curves(chart) {
    const traces = [], shapes = [], marks = { x: [], y: [], text: [] };
    const many = chart.traces.length > 12, named = chart.traces.length > 1 && !many;
    let positive = true;
    for (const trace of chart.traces) {
      const own = series(trace.run, trace.metric), ink = colour(trace.colour), smooth = state.smooth > 0;
      const dots = own.values.length < 40, x = places(trace.run, own.steps);
      if (own.values.some((value) => value <= 0)) positive = false;
      traces.push({
        type: "scatter", mode: dots ? "lines+markers" : "lines", name: trace.name, x, y: Array.from(own.values, (v) => (Number.isFinite(v) ? v : null)),
        line: { color: smooth ? faint(ink) : ink, width: smooth ? 1 : 1.6, dash: dash(trace.colour) }, marker: { size: 5, color: smooth ? faint(ink) : ink },
        connectgaps: false, showlegend: !smooth && named, legendgroup: trace.name, hovertemplate: "%{y:.6~g}",
        meta: { metric: trace.metric, run: trace.run, role: "raw" },
      });
      if (smooth) {
        const steps = own.meanSteps || own.steps;
        traces.push({
          type: "scatter", mode: "lines", name: `${trace.name}, smoothed`, x: own.meanSteps ? places(trace.run, steps) : x,
          y: smoothed(own.means || own.values, own.count), line: { color: ink, width: 2, dash: dash(trace.colour) },
          showlegend: named, legendgroup: trace.name, hovertemplate: "%{y:.6~g}",
          meta: { metric: trace.metric, run: trace.run, role: "smoothed" },
        });
      }
      for (const [step, value] of own.bad) {
        marks.x.push(places(trace.run, [step])[0]);
        marks.y.push(0.98);
        marks.text.push(`step ${step}: ${trace.name} is ${value}`);
      }
    }
    if (marks.x.length) {
      traces.push({
        type: "scatter", mode: "markers", yaxis: "y2", name: "not finite", x: marks.x, y: marks.y, text: marks.text, showlegend: true,
        hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x", size: 8, color: css("--bad") }, meta: { role: "bad" },
      });
    }
    for (const run of new Set(chart.traces.map((trace) => trace.run))) {
      const events = data.runs[run].events;
      const x = places(run, events.map(([step]) => step));
      x.forEach((at) => shapes.push({
        type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", layer: "below", line: { color: css("--wait"), width: 1.2, dash: "dot" },
      }));
      if (events.length) {
        traces.push({
          type: "scatter", mode: "markers", yaxis: "y2", name: "events", x, y: x.map(() => 0.02), text: events.map(([, text]) => text), showlegend: false,
          hovertemplate: "%{text}<extra></extra>", cliponaxis: false, marker: { symbol: "triangle-up", size: 9, color: css("--wait") }, meta: { role: "events", run },
        });
      }
    }
    const title = { step: "step", tokens: "tokens", time: `time since the first row (${timeUnit().name})` }[state.x];
    return [traces, layout({
      shapes, hovermode: many ? "closest" : "x unified", showlegend: traces.filter((t) => t.showlegend).length > 0,
      xaxis: axis({ title: { text: title, font: { color: css("--soft"), size: 12 }, standoff: 6 }, tickformat: state.x === "time" ? "" : "~s", hoverformat: state.x === "time" ? ".2f" : ",.0f", showgrid: false, showline: true }),
      yaxis: axis({ type: state.log && positive ? "log" : "linear", nticks: 6 }),
      yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
    }), state.log && !positive];
  }

  /** A chart that is given whole: colours named `c0`, `soft`, ... are replaced by those of the theme. */
  function figure(chart) {
    const resolve = (value) => {
      if (typeof value === "string") return /^\$[a-z0-9-]+$/.test(value) ? css(`--${value.slice(1)}`) : value;
      if (Array.isArray(value)) return value.map(resolve);
      if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolve(v)]));
      return value;
    };
    const given = resolve(chart.figure.layout);
    const axes = Object.fromEntries(["xaxis", "yaxis"].map((name) => {
      const own = given[name] || {};
      return [name, axis({ ...own, title: { text: own.title || "", font: { color: css("--soft"), size: 12 } } })];
    }));
    return [resolve(chart.figure.data), layout({ hovermode: "closest", ...given, ...axes }), false];
  }

  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
  const figures = Array.from(document.querySelectorAll("figure.chart"));

  function draw(element) {
    const chart = data.charts[Number(element.dataset.chart)], plot = element.querySelector(".plot");
    const [traces, shown, unlogged] = chart.traces ? curves(chart) : figure(chart);
    let note = element.querySelector(".linear");
    if (unlogged && !note) {
      note = document.createElement("small");
      note.className = "linear";
      note.textContent = "linear: some values are not positive";
      element.querySelector("figcaption").append(note);
    } else if (!unlogged && note) note.remove();
    Plotly.react(plot, traces, shown, config);
    element.dataset.drawn = "1";
  }

  const redraw = () => figures.filter((element) => element.dataset.drawn).forEach(draw);
  const drawAll = () => figures.filter((element) => !element.dataset.drawn).forEach(draw);

  function move(plot, key) {
    const shown = plot._fullLayout && plot._fullLayout.xaxis;
    if (!shown) return false;
    const [low, high] = shown.range, width = high - low, middle = (low + high) / 2;
    const ranges = {
      "+": [middle - width / 4, middle + width / 4], "-": [middle - width, middle + width],
      ArrowLeft: [low - width / 5, high - width / 5], ArrowRight: [low + width / 5, high + width / 5],
    };
    const range = ranges[key === "=" ? "+" : key];
    if (range) Plotly.relayout(plot, { "xaxis.range": range });
    else if (key === "0") Plotly.relayout(plot, { "xaxis.autorange": true, "yaxis.autorange": true });
    else return false;
    return true;
  }

  for (const element of figures) {
    const plot = element.querySelector(".plot");
    plot.addEventListener("keydown", (event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && move(plot, event.key)) event.preventDefault();
    });
  }
  // A page can have hundreds of charts: each is drawn when it comes near the visible part.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
    }
  }, { rootMargin: "600px" });

  // ---- controls ----------------------------------------------------------------------------------------------------

  const controls = document.querySelector(".controls");
  if (controls) {
    controls.hidden = false;
    controls.addEventListener("submit", (event) => event.preventDefault());
    for (const [value, label] of [["tokens", "tokens"], ["time", "time"]]) {
      if (data.runs.length && data.runs.every((run) => run[value] || !run.step)) byId("x").append(new Option(label, value));
    }
    byId("x").addEventListener("change", (event) => { state.x = event.target.value; redraw(); });
    byId("log").addEventListener("change", (event) => { state.log = event.target.checked; redraw(); });
    let waiting = 0;
    byId("smooth").addEventListener("input", (event) => {
      state.smooth = Number(event.target.value);
      byId("smooth-value").textContent = state.smooth ? state.smooth.toFixed(2) : "off";
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(redraw);
    });
    byId("reset-zoom").addEventListener("click", () => figures.filter((e) => e.dataset.drawn).forEach((e) => move(e.querySelector(".plot"), "0")));
    // Browsers keep the state of a form over a reload.
    controls.reset();
  }

  for (const table of document.querySelectorAll(".table")) {
    const bar = table.querySelector(".filters");
    if (!bar) continue;
    bar.hidden = false;
    const text = bar.querySelector(".filter"), marked = bar.querySelector(".marked-only"), rows = Array.from(table.querySelectorAll("tbody tr"));
    const apply = () => {
      const wanted = text ? text.value.toLowerCase() : "";
      let shown = 0;
      for (const row of rows) {
        row.hidden = (wanted && !row.textContent.toLowerCase().includes(wanted)) || (marked && marked.checked && !row.querySelector(".mark"));
        shown += !row.hidden;
      }
      bar.querySelector(".count").textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    };
    for (const control of [text, marked]) if (control) control.addEventListener("input", apply);
    if (text) text.value = "";
    if (marked) marked.checked = false;
    apply();
  }

  // ---- theme -------------------------------------------------------------------------------------------------------

  const system = matchMedia("(prefers-color-scheme: dark)"), button = byId("theme");
  let chosen = null;
  function applyTheme(theme) {
    root.dataset.theme = theme;
    root.style.colorScheme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    for (const swatch of document.querySelectorAll(".swatch")) {
      const which = swatch.dataset.colour;
      swatch.style.background = /^\d+$/.test(which) ? colour(Number(which)) : which;
    }
    redraw();
  }
  const current = () => chosen || (system.matches ? "dark" : "light");
  button.hidden = false;
  button.addEventListener("click", () => { chosen = current() === "dark" ? "light" : "dark"; applyTheme(chosen); });
  system.addEventListener("change", () => applyTheme(current()));
  window.addEventListener("beforeprint", () => { applyTheme("light"); drawAll(); });
  window.addEventListener("afterprint", () => applyTheme(current()));
  applyTheme(current());
  figures.forEach((element) => watcher.observe(element));
})();
