"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  // Plotly reads tags and entities in labels; text from data has to be text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
    .replace(/\$/g, "&#36;");
  const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: data.colors.ink };
  const config = { displayModeBar: false };
  const axis = { gridcolor: data.colors.grid, zeroline: false, fixedrange: true, automargin: true };

  const title = (text) => ({ text, font: { size: 13 } });

  const fill = (select, labels) => {
    for (const [index, label] of labels.entries()) select.add(new Option(label, index));
  };

  const kindTrace = (run, name, mask, color, pattern, n, record) => {
    const tokens = mask.flatMap((inside, token) => (inside ? [token] : []));
    const sd = run.sd && run.sd[record][n];
    return {
      type: "bar", name, x: tokens, y: tokens.map((token) => run.attention[record][n][token]),
      marker: { color, pattern: { shape: pattern, bgcolor: color, fgcolor: "#fff", size: 6, solidity: 0.2 } },
      error_y: sd ? { type: "data", array: tokens.map((t) => sd[t]), thickness: 1, width: 0, color: data.colors.ink } : {},
      customdata: tokens.map((token) => run.probability[n][token]),
      hovertemplate: `token %{x} (${name})<br>attention %{y:.3f}<br>frequency %{customdata:.3f}<extra></extra>`,
    };
  };

  const drawAttention = (run, n, record, width, narrow) => {
    const tokens = run.common.map((_, token) => token).filter((token) => run.probability[n][token] > 0);
    const highest = Math.max(...run.attention.flat(2));
    const traces = [kindTrace(run, "common", run.common, data.colors.common, "/", n, record)];
    run.distinct.forEach((own, k) => {
      const color = data.colors.classes[k % data.colors.classes.length];
      traces.push(kindTrace(run, `distinct of n = ${k + 1}`, own, color, "", n, record));
    });
    traces.push({
      type: "scatter", mode: "markers", name: "at the start", x: tokens, hoverinfo: "skip",
      y: tokens.map((token) => run.attention[0][n][token]),
      marker: { symbol: "line-ew", size: narrow ? 8 : 20, line: { width: 2, color: data.colors.ink } },
    });
    const layout = {
      font, barmode: "overlay", bargap: 0.15, width, height: 340, margin: { l: 52, r: 8, t: 8, b: 44 },
      xaxis: { ...axis, title: title("contextual token"), range: [-0.7, run.common.length - 0.3], showgrid: false },
      yaxis: { ...axis, title: title("attention"), range: [0, highest * 1.12], rangemode: "tozero" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    };
    return Plotly.react("attention-plot", traces, layout, config);
  };

  const drawCurves = (run, n, record, width, narrow) => {
    const color = data.colors.classes[n % data.colors.classes.length];
    const pick = (rows) => rows.map((row) => row[n]);
    const line = (name, y, where, look) => ({
      type: "scatter", mode: "lines", name, x: run.steps, y, xaxis: `x${where}`, yaxis: `y${where}`,
      line: { width: 2.4, ...look }, hovertemplate: "%{y:.3f}",
    });
    const traces = [
      line("attention on common tokens", pick(run.common_mass), "", { color: data.colors.common, dash: "dot" }),
      line("on the strongest distinct token", pick(run.strongest), "", { color }),
      line("entropy of the distinct part", pick(run.entropy), "2", { color }),
    ];
    if (run.law) traces.push(line("Theorem 3, from the strongest token", pick(run.law), "2", { color: data.colors.ink, dash: "dash", width: 1.4 }));
    const shapes = ["", "2"].map((where) => ({
      type: "line", x0: run.steps[record], x1: run.steps[record], y0: 0, y1: 1,
      xref: `x${where}`, yref: `y${where} domain`, line: { color: data.colors.ink, width: 1.5 },
    }));
    const annotations = [];
    if (run.snapping) {
      for (const where of ["", "2"]) {
        shapes.push({
          type: "rect", x0: run.snapping[0], x1: run.snapping[1], y0: 0, y1: 1, layer: "below",
          xref: `x${where}`, yref: `y${where} domain`, fillcolor: color, opacity: 0.08, line: { width: 0 },
        });
        annotations.push({
          x: run.snapping[1], y: 1, xref: `x${where}`, yref: `y${where} domain`, text: "<i>t</i><sub>0</sub>",
          showarrow: false, xanchor: "left", yanchor: "top", font: { color },
        });
      }
    }
    const [left, right] = narrow ? [[0, 1], [0, 1]] : [[0, 0.46], [0.56, 1]];
    const [top, bottom] = narrow ? [[0.6, 1], [0, 0.4]] : [[0, 1], [0, 1]];
    const step = { ...axis, title: title("step"), range: [0, run.steps[run.steps.length - 1]] };
    const layout = {
      font, width, height: narrow ? 520 : 320, margin: { l: 52, r: 12, t: 8, b: 44 }, hovermode: "x", shapes, annotations,
      xaxis: { ...step, domain: left, anchor: "y" }, xaxis2: { ...step, domain: right, anchor: "y2" },
      yaxis: { ...axis, title: title("attention"), domain: top, rangemode: "tozero" },
      yaxis2: { ...axis, title: title("entropy (nats)"), domain: bottom, anchor: "x2" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    };
    return Plotly.react("curves-plot", traces, layout, config);
  };

  const startSmall = () => {
    const [runs, classes, time, play] = ["small-run", "small-class", "small-time", "small-play"].map(byId);
    let timer = null;
    const draw = () => {
      const run = data.small[Number(runs.value)];
      const record = Math.min(Number(time.value), run.steps.length - 1);
      const width = byId("attention-plot").clientWidth;
      const narrow = width < 620;
      byId("small-step").textContent = `${run.steps[record]} of ${run.steps[run.steps.length - 1]}`;
      drawAttention(run, Number(classes.value), record, width, narrow);
      drawCurves(run, Number(classes.value), record, width, narrow);
    };
    const choose = () => {
      const run = data.small[Number(runs.value)];
      const kept = Math.min(Number(classes.value) || 0, run.distinct.length - 1);
      classes.replaceChildren();
      fill(classes, run.distinct.map((_, n) => `n = ${n + 1}`));
      classes.value = kept;
      time.max = run.steps.length - 1;
      draw();
    };
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(time.value) >= Number(time.max)) time.value = 0;
      play.textContent = "Pause";
      timer = setInterval(() => {
        if (Number(time.value) >= Number(time.max)) return stop();
        time.value = Number(time.value) + 1;
        draw();
      }, 160);
    });
    fill(runs, data.small.map((run) => run.label));
    runs.addEventListener("change", choose);
    classes.addEventListener("change", draw);
    time.addEventListener("input", draw);
    window.addEventListener("resize", draw);
    choose();
  };

  const drawMatrix = (holder, run, index) => {
    const count = run.tokens.length;
    const labels = run.tokens.map(plain);
    const text = run.patterns[index].map((row, query) => row.map((value, key) =>
      `looks: <b>${plain(run.full[query])}</b> (${query + 1})<br>at: <b>${plain(run.full[key])}</b> (${key + 1})` +
      `<br>attention ${value === null ? "–" : value.toFixed(3)}`));
    const places = labels.map((_, place) => place);
    const room = 14 + 6.4 * Math.min(14, Math.max(...run.tokens.map((token) => token.length)));
    const side = Math.max(holder.clientWidth, 13 * count + room);
    const ticks = {
      ...axis, tickmode: "array", tickvals: places, ticktext: labels, showgrid: false, automargin: false,
      tickfont: { size: Math.max(7, Math.min(11, (side - room) / count - 3)) }, ticks: "",
    };
    const layout = {
      font, width: side, height: side, margin: { l: room, r: 4, t: 6, b: room },
      xaxis: { ...ticks, tickangle: -90 }, yaxis: { ...ticks, autorange: "reversed" },
      hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: data.colors.ink, font: { ...font } },
    };
    const colorscale = data.scale.map((color, i) => [i / (data.scale.length - 1), color]);
    const trace = {
      type: "heatmap", z: run.patterns[index], x: places, y: places, text, colorscale, zmin: 0, zmax: 1,
      showscale: false, hovertemplate: "%{text}<extra></extra>",
    };
    return Plotly.react(holder, [trace], layout, config);
  };

  const startText = () => {
    const runs = byId("text-run");
    const grid = byId("text-matrices");
    const place = () => {
      const run = data.text[Number(runs.value)];
      [...grid.querySelectorAll(".scroll > div")].forEach((holder, index) => drawMatrix(holder, run, index));
    };
    const choose = () => {
      grid.replaceChildren();
      for (const step of data.text[Number(runs.value)].steps) {
        const cell = grid.appendChild(document.createElement("div"));
        cell.appendChild(document.createElement("h4")).textContent = `step ${step}`;
        const scroll = cell.appendChild(document.createElement("div"));
        scroll.className = "scroll";
        scroll.appendChild(document.createElement("div"));
      }
      place();
    };
    byId("text-scale").style.background = `linear-gradient(to right, ${data.scale.join(", ")})`;
    fill(runs, data.text.map((run) => run.label));
    runs.addEventListener("change", choose);
    window.addEventListener("resize", place);
    choose();
  };

  const startClaims = () => {
    const buttons = [...document.querySelectorAll(".filters button")];
    const rows = [...document.querySelectorAll(".claims > tbody > tr")];
    const search = byId("claim-search");
    let chosen = "all";
    const filter = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !((chosen === "all" || row.dataset.verdict === chosen) && words.every((w) => text.includes(w)));
      }
      byId("claim-count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} claims shown`;
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen = button.dataset.filter;
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        filter();
      });
    }
    search.addEventListener("input", filter);
    filter();
  };

  if (data.small.length) startSmall();
  if (data.text.length) startText();
  if (document.querySelector(".claims")) startClaims();
})();
