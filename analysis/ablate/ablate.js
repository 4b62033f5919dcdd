"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const blue = "#0072b2", orange = "#d55e00", ink = "#1d2733", grid = "#e3e7ec";
  const colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2733", "#8c6d31", "#7b4173", "#637939", "#ad494a", "#7f7f7f"];
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: ink };
  const config = { displayModeBar: false, responsive: true };
  const axis = { gridcolor: grid, zeroline: false, automargin: true };
  const names = Object.keys(data.replacements);
  const orders = Object.keys(data.replacements[names[0]].orders);
  const measures = { loss: "loss, nats a token", accuracy: "accuracy", divergence: "divergence, nats" };

  const curves = () => {
    const measure = byId("measure").value, order = byId("order").value;
    const bars = (name) => ({ type: "data", array: data.replacements[name].orders[order].margins[measure], thickness: 1, width: 3 });
    const traces = names.map((name, i) => ({ type: "scatter", mode: "lines+markers", name, x: data.fractions, error_y: bars(name),
      y: data.replacements[name].orders[order][measure], line: { color: colors[i % colors.length], dash: i < 7 ? "solid" : "dash" },
      hovertemplate: `${name}: %{y:.3f}<extra></extra>` }));
    const layout = { font, margin: { l: 60, r: 10, t: 10, b: 44 }, hovermode: "closest", legend: { font: { size: 12 } },
      xaxis: { ...axis, title: { text: "share of heads replaced" }, tickvals: data.fractions,
        ticktext: data.fractions.map((share) => Number(share.toFixed(2))) },
      yaxis: { ...axis, title: { text: measures[measure] } } };
    Plotly.react("curves", traces, layout, config);
  };
  const map = () => {
    const heads = data.replacements[byId("replacement").value].heads;
    const z = heads.loss.map((row) => row.map((v) => v === null ? null : v - data.intact.loss));
    const text = heads.margins.loss.map((row) => row.map((v) => v === null ? "" : ` \u00b1 ${v.toFixed(4)}`));
    const most = Math.max(...z.flat().map(Math.abs), 1e-9);
    const traces = [{ type: "heatmap", z, text, zmin: -most, zmax: most, colorscale: [[0, orange], [0.5, "#fff"], [1, blue]], colorbar: { thickness: 10 },
      hovertemplate: "layer %{y}, head %{x}: %{z:.4f}%{text}<extra></extra>" }];
    const layout = { font, margin: { l: 50, r: 10, t: 10, b: 44 }, xaxis: { ...axis, title: { text: "head" }, dtick: Math.ceil(data.heads / 24), showgrid: false },
      yaxis: { ...axis, title: { text: "layer" }, dtick: 1, autorange: "reversed", showgrid: false } };
    Plotly.react("map", traces, layout, config);
  };
  const fill = (id, values, labels, draw) => {
    values.forEach((value, i) => byId(id).appendChild(Object.assign(document.createElement("option"), { value, textContent: labels[i] })));
    byId(id).addEventListener("change", draw);
  };
  fill("order", orders, orders, curves);
  fill("measure", Object.keys(measures), Object.values(measures), curves);
  fill("replacement", names, names, map);
  const last = data.fractions.length - 1;
  const told = (number) => (Number(number.toFixed(3)) + 0).toFixed(3);  // nothing has no sign
  const rows = names.map((name) => [name, data.replacements[name].orders[orders[0]]])
    .map(([name, q]) => [name, q.loss[last], q.loss[last] - data.intact.loss, q.margins.loss[last], q.accuracy[last], q.divergence[last]]);
  rows.sort((a, b) => a[1] - b[1]);
  for (const row of [["nothing replaced", data.intact.loss, 0, 0, data.intact.accuracy, 0], ...rows]) {
    const line = document.createElement("tr");
    row.forEach((value, i) => line.appendChild(Object.assign(document.createElement("td"), { textContent: !i ? value : value === null ? "" : told(value) })));
    byId("numbers").appendChild(line);
  }
  curves();
  map();
})();
