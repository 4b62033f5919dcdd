"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const blue = "#0072b2", orange = "#d55e00", ink = "#1d2733", grid = "#e3e7ec";
  // Plotly reads tags and entities in labels; text from data has to be text.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
    .replace(/\$/g, "&#36;");
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: ink };
  const config = { displayModeBar: false, responsive: true };
  const axis = { gridcolor: grid, zeroline: false, automargin: true };
  const sides = data.after ? [["as it is", data.before], ["edited", data.after]] : [["", data.before]];
  const last = data.tokens.length - 1;
  const chosen = { token: last, layer: data.layers - 1, head: 0, dimensions: 2 };
  const names = data.tokens.map(plain);
  // Equal tokens must stay different rows: places are numbers, with the tokens as their labels.
  const places = data.tokens.map((_, i) => i);
  const stations = data.before.stations;
  const moves = stations.slice(1);
  const isAttention = moves.map((name) => name.endsWith(".mid") || !stations.some((s) => s.endsWith(".post")));
  const degrees = (radians) => (radians === null || radians === undefined ? null : radians * 180 / Math.PI);

  const hosts = {};
  for (const host of document.querySelectorAll("[data-plot], [data-table]")) {
    const kind = host.dataset.plot || host.dataset.table;
    hosts[kind] = sides.map(([label]) => {
      const side = document.createElement("div");
      if (label) side.appendChild(Object.assign(document.createElement("h3"), { textContent: label }));
      const plot = document.createElement("div");
      if (host.dataset.plot) { plot.style.height = `${host.dataset.height}px`; plot.id = `${kind}-${label ? label.replace(/\W/g, "-") : "plot"}`; }
      side.appendChild(plot);
      host.appendChild(side);
      return plot;
    });
  }

  // Weights that sum to one from white to blue; weights of any size and sign around white.
  const shades = (z) => {
    const all = z.flat(), most = Math.max(...all.map(Math.abs), 1e-9);
    if (Math.min(...all) >= 0 && most <= 1) return { zmin: 0, zmax: 1, colorscale: [[0, "#fff"], [0.3, "#9dc6e3"], [1, "#08306b"]] };
    return { zmin: -most, zmax: most, colorscale: [[0, orange], [0.5, "#fff"], [1, blue]] };
  };
  const draw = {
    map(side, plot) {
      const { points, tokens, share } = side.map[chosen.token];
      const flat = chosen.dimensions === 2;
      const at = (rows) => {
        const found = { x: rows.map((p) => p[0]), y: rows.map((p) => p[1] || 0) };
        return flat ? found : { ...found, z: rows.map((p) => p[2] || 0) };
      };
      const type = flat ? "scatter" : "scatter3d";
      const order = points.map((_, i) => i);
      const traces = [
        { type, ...at(points), mode: "lines+markers", name: "stations", customdata: stations,
          line: { color: "#98a2ae", width: 2 }, hovertemplate: "%{customdata}<extra></extra>",
          marker: { size: flat ? 9 : 5, color: order, colorscale: "Viridis", line: { width: 1, color: "#fff" } } },
        { type, ...at(tokens.map((t) => t.at)), mode: "markers+text", name: "tokens", text: tokens.map((t) => plain(t.label)),
          textposition: "top center", marker: { symbol: "diamond", size: flat ? 8 : 4, color: orange }, hovertemplate: "%{text}<extra></extra>" },
        { type, ...at([points[0], points[points.length - 1]]), mode: "text", text: ["start", "end"], textposition: "bottom center", hoverinfo: "skip",
          textfont: { color: blue, size: 13 } },
      ];
      const caption = { text: `this plane holds ${(100 * share).toFixed(0)} % of the variation`, font: { size: 12 } };
      const scene = { xaxis: { title: { text: "" } }, yaxis: { title: { text: "" } }, zaxis: { title: { text: "" } } };
      const layout = { font, showlegend: false, margin: { l: 30, r: 10, t: 34, b: 30 }, title: caption, scene,
        xaxis: { ...axis }, yaxis: { ...axis, scaleanchor: "x" } };
      Plotly.react(plot, traces, layout, config);
    },
    steps(side, plot) {
      const value = (name) => moves.map((_, j) => {
        const half = side[isAttention[j] ? "attention" : "feed_forward"][name][chosen.token];
        const index = isAttention.slice(0, j).filter((a) => a === isAttention[j]).length;
        return half[index];
      });
      const angles = value("turning_angle").map(degrees);
      const kinds = [["attention", true, blue], ["feed-forward", false, orange]];
      const traces = kinds.map(([name, is, color]) => ({
        type: "bar", name, x: moves, y: value("relative_step").map((v, j) => (isAttention[j] === is ? v : null)),
        marker: { color }, hovertemplate: "%{x}: %{y:.3f}<extra></extra>" }));
      traces.push({ type: "scatter", mode: "lines+markers", name: "turning angle", x: moves, y: angles, yaxis: "y2",
        line: { color: ink, width: 1.5, dash: "dot" }, hovertemplate: "%{y:.0f}°<extra></extra>" });
      const layout = { font, barmode: "stack", margin: { l: 50, r: 50, t: 10, b: 60 }, legend: { orientation: "h", y: 1.15 },
        xaxis: { ...axis, type: "category", categoryorder: "array", categoryarray: moves }, yaxis: { ...axis, title: { text: "relative step" }, rangemode: "tozero" },
        yaxis2: { overlaying: "y", side: "right", range: [0, 180], tickvals: [0, 90, 180], ticksuffix: "°", showgrid: false } };
      Plotly.react(plot, traces, layout, config);
    },
    lens(side, plot) {
      const table = document.createElement("table");
      table.className = "lens";
      const row = (cells, tag) => {
        const line = document.createElement("tr");
        for (const [text, className] of cells) {
          line.appendChild(Object.assign(document.createElement(tag), { textContent: text, className: className || "" }));
        }
        table.appendChild(line);
      };
      const next = side.next[chosen.token];
      row([["station"], [`rank of ${next}`], ["most likely"], ["second"], ["third"]], "th");
      stations.forEach((name, s) => {
        const tops = side.tops[chosen.token][s].slice(0, 3);
        row([[name], [side.rank[chosen.token][s] + 1], ...tops.map((t) => [`${t.label} ${t.p.toFixed(2)}`, t.label === next ? "token right" : "token"])], "td");
      });
      plot.replaceChildren(table);
    },
    pattern(side, plot) {
      const z = side.pattern[chosen.layer][chosen.head] || [];
      const traces = [{ type: "heatmap", z, x: places, y: places, ...shades(z),
        text: z.map((rowValues, q) => rowValues.map((_, k) => `${names[q]} looks at ${names[k]}`)), hovertemplate: "%{text}: %{z:.3f}<extra></extra>", colorbar: { thickness: 10 } }];
      const t = chosen.token;
      const labels = { tickvals: places, ticktext: names, showgrid: false, tickfont: { size: places.length > 40 ? 8 : 11 } };
      const layout = { font, margin: { l: 80, r: 10, t: 10, b: 90 }, xaxis: { ...axis, ...labels, tickangle: -60 },
        yaxis: { ...axis, ...labels, autorange: "reversed" },
        shapes: [{ type: "rect", x0: -0.5, x1: last + 0.5, y0: t - 0.5, y1: t + 0.5, line: { color: orange, width: 1.5 } }] };
      Plotly.react(plot, traces, layout, config);
    },
    rows(side, plot) {
      const label = [], z = [];
      side.pattern.forEach((heads, l) => heads.forEach((head, h) => { label.push(`${l}.${h}`); z.push(head[chosen.token]); }));
      const traces = [{ type: "heatmap", z, x: places, y: label, ...shades(z), showscale: false,
        text: z.map((values) => values.map((_, k) => names[k])), hovertemplate: "head %{y} looks at %{text}: %{z:.3f}<extra></extra>" }];
      const layout = { font, margin: { l: 60, r: 10, t: 10, b: 90 }, xaxis: { ...axis, tickvals: places, ticktext: names, tickangle: -60, showgrid: false },
        yaxis: { ...axis, type: "category", autorange: "reversed", title: { text: "layer.head", standoff: 10 }, showgrid: false } };
      Plotly.react(plot, traces, layout, config);
    },
    parts(side, plot) {
      const t = chosen.token;
      const x = ["start"], y = [side.start[t]];
      const both = side.feed_forward_parts.length > 0 && side.feed_forward_parts[t].length > 0;
      side.attention_parts[t].forEach((value, l) => {
        x.push(`${l} attention`); y.push(value);
        if (both) { x.push(`${l} feed-forward`); y.push(side.feed_forward_parts[t][l]); }
      });
      // What an edit put in between the steps; of one that only took away, rounding is left.
      if (side.edit_parts && side.edit_parts.some((value) => Math.abs(value) > 1e-3)) { x.push("edit"); y.push(side.edit_parts[t]); }
      x.push("bias"); y.push(side.bias[t]);
      const sum = y.reduce((a, b) => a + b, 0);
      const traces = [{ type: "bar", x, y, marker: { color: y.map((v) => (v < 0 ? orange : blue)) }, hovertemplate: "%{x}: %{y:.3f}<extra></extra>" }];
      const layout = { font, margin: { l: 50, r: 10, t: 34, b: 90 }, xaxis: { ...axis, type: "category", tickangle: -50 }, yaxis: { ...axis, title: { text: "logit" }, zeroline: true },
        title: { text: `the logit of ${plain(side.predicted[t])} is their sum, ${sum.toFixed(2)}`, font: { size: 13 } } };
      Plotly.react(plot, traces, layout, config);
    },
    heads(side, plot) {
      const z = side.heads[chosen.token];
      const most = Math.max(...z.flat().map(Math.abs), 1e-9);
      const traces = [{ type: "heatmap", z, zmin: -most, zmax: most, colorscale: [[0, orange], [0.5, "#fff"], [1, blue]], colorbar: { thickness: 10 },
        hovertemplate: "layer %{y}, head %{x}: %{z:.3f}<extra></extra>" }];
      const layout = { font, margin: { l: 50, r: 10, t: 10, b: 44 }, xaxis: { ...axis, title: { text: "head" }, dtick: Math.ceil(z[0].length / 16), showgrid: false },
        yaxis: { ...axis, title: { text: "layer" }, dtick: 1, autorange: "reversed", showgrid: false } };
      Plotly.react(plot, traces, layout, config);
    },
    neurons(side, plot) {
      const found = side.neurons ? side.neurons[chosen.token] : [];
      const x = found.map((n) => `${n.layer}.${n.neuron}`), y = found.map((n) => n.value);
      const traces = [{ type: "bar", x, y, marker: { color: y.map((v) => (v < 0 ? orange : blue)) }, hovertemplate: "neuron %{x}: %{y:.3f}<extra></extra>" }];
      const layout = { font, margin: { l: 50, r: 10, t: 10, b: 70 }, xaxis: { ...axis, type: "category", title: { text: "layer.neuron" }, tickangle: -50 },
        yaxis: { ...axis, title: { text: "logit" }, zeroline: true } };
      Plotly.react(plot, traces, layout, config);
    },
  };

  const hasParts = Boolean(data.before.heads);
  byId("no-parts").hidden = hasParts;
  const hasPattern = Boolean(data.before.pattern);
  if (!hasPattern) document.getElementById("heads").remove();
  const kinds = Object.keys(draw).filter((kind) => hasPattern || !["pattern", "rows"].includes(kind)).filter((kind) => hasParts || !["parts", "heads", "neurons"].includes(kind));
  const redraw = (which) => which.forEach((kind) => sides.forEach(([, side], i) => draw[kind](side, hosts[kind][i])));

  const buttons = data.tokens.map((label, t) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: label });
    if (t >= data.prompt) button.className = "generated";
    button.addEventListener("click", () => choose(t));
    byId("tokens").appendChild(button);
    return button;
  });
  const choose = (token) => {
    chosen.token = token;
    buttons.forEach((button, t) => button.setAttribute("aria-pressed", String(t === token)));
    redraw(kinds);
  };
  const offer = (id, count) => {
    chosen[id] = Math.max(Math.min(chosen[id], count - 1), 0);
    byId(id).replaceChildren(...Array.from({ length: count }, (_, i) => new Option(i, i, i === chosen[id], i === chosen[id])));
  };
  const onChoice = (id, then) => byId(id).addEventListener("change", () => { chosen[id] = Number(byId(id).value); then(); redraw(["pattern"]); });
  if (hasPattern) {
    const offerHeads = () => offer("head", data.heads[chosen.layer]);
    offer("layer", data.layers);
    offerHeads();
    onChoice("layer", offerHeads);
    onChoice("head", () => {});
  }
  byId("dimensions").addEventListener("change", (event) => { chosen.dimensions = Number(event.target.value); redraw(["map"]); });
  choose(last);
})();
