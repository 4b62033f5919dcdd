"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("report-data").textContent);
  const ink = "#1d2733", grid = "#e3e7ec", blue = "#0072b2", orange = "#d55e00";
  const colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2733", "#8c6d31", "#7b4173", "#637939", "#ad494a", "#7f7f7f"];
  const signs = ["circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon", "circle-open", "square-open", "diamond-open", "triangle-up-open"];
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: ink };
  const config = { displayModeBar: false, responsive: true };
  const axis = { gridcolor: grid, zeroline: false, automargin: true };
  const many = data.models.length;
  const steps = () => ({ ...axis, type: byId("scale").value, title: { text: "step" } });

  // Of many models each is a thin line; of one, training and validation are told apart by color.
  const lines = (curve, name, color, dash) => curve.values.map((y, i) => ({ type: "scatter", mode: "lines", x: curve.step, y,
    name: many > 1 ? `${data.models[i]}, ${name}` : name, showlegend: many <= 12 && (many === 1 || dash !== "dot"),
    line: { color: many > 1 ? colors[i % colors.length] : color, dash, width: many > 1 ? 1.2 : 2 },
    hovertemplate: `%{x}: %{y:.4g}<extra>${many > 1 ? data.models[i] : name}</extra>` }));
  // Of few decades 1, 2 and 5 are written, where all from 1 to 9 would touch each other.
  const ticks = (traces) => {
    const known = traces.flatMap((trace) => trace.y).filter((y) => y > 0).map(Math.log10).sort((a, b) => a - b);
    const least = known[0], most = known.at(-1);
    if (!(most - least >= 0.5 && most - least <= 3)) return {};
    const powers = Array.from({ length: Math.ceil(most) - Math.floor(least) + 1 }, (_, i) => Math.floor(least) + i);
    return { tickvals: powers.flatMap((power) => [1, 2, 5].map((digit) => digit * 10 ** power)), tickformat: "~g" };
  };
  const draw = (id, traces, title, type, shapes = []) => {
    byId(id).hidden = traces.length === 0;
    if (!traces.length) return;
    // The same room for every legend, so that steps lie below each other.
    Plotly.react(id, traces, { font, margin: { l: 60, r: many > 1 ? 10 : 130, t: 10, b: 44 }, hovermode: "closest", legend: { font: { size: 12 } },
      xaxis: steps(), yaxis: { ...axis, type, ...(type === "log" ? ticks(traces) : {}), title: { text: title } }, shapes, annotations: shapes.map((line, i) => ({ xref: "paper", x: 0.99,
        xanchor: "right", y: type === "log" ? Math.log10(line.y0) : line.y0, yanchor: "bottom", text: Object.keys(data.references)[i], showarrow: false,
        font: { size: 11 } })) }, config);
  };
  const curves = () => {
    const type = byId("height").value;
    const known = Object.values(data.references).filter((y) => y > 0 || type === "linear");
    const shapes = known.map((y) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: "#8a94a3", dash: "dash", width: 1 } }));
    draw("losses", [...lines(data.training, `training${data.besides}`, blue, many > 1 ? "dot" : "solid"), ...lines(data.validation, "validation", orange, "solid")],
      `loss, ${data.unit}`, type, shapes);
    draw("accuracies", data.unit === "squared error" ? [] : lines(data.accuracy, "validation", orange, "solid"), "right answers", "linear");
    draw("gradients", lines(data.gradient, "gradient", blue, "solid"), "norm of the gradient", "log");
  };
  const names = Object.keys(data.statistics);
  const shown = () => {
    const found = data.statistics[byId("statistic").value];
    const rows = found.values.map((value) => [value].flat(Infinity));
    const inner = found.axes.length > 1 ? found.values[0][0].length : 1;
    const label = (i) => found.axes.length > 1 ? `${found.axes[0]} ${Math.floor(i / inner)}, ${found.axes[1]} ${i % inner}`
      : found.axes.length ? `${found.axes[0]} ${i}` : "all";
    // Layers are told apart by color and their heads by signs; the heads of a single layer by color.
    const single = rows[0].length === inner;
    const color = (i) => colors[(single ? i : Math.floor(i / inner)) % colors.length];
    const sign = (i) => single ? "circle" : signs[(i % inner) % signs.length];
    const traces = rows[0].map((_, i) => ({ type: "scatter", mode: "lines+markers", marker: { size: inner > 1 ? 6 : 4, symbol: sign(i) },
      name: label(i), x: found.step, y: rows.map((row) => row[i]), line: { color: color(i), width: 1.6 },
      hovertemplate: `%{x}: %{y:.4g}<extra>${label(i)}</extra>` })).filter((trace) => trace.y.some((y) => y !== null));
    Plotly.react("statistics", traces, { font, margin: { l: 60, r: 10, t: 10, b: 44 }, hovermode: "closest", showlegend: traces.length <= 24,
      xaxis: steps(), yaxis: { ...axis, title: { text: found.label } } }, config);
  };
  byId("nothing").hidden = names.length > 0;
  byId("looks").hidden = names.length === 0;
  names.forEach((value) => byId("statistic").appendChild(Object.assign(document.createElement("option"), { value, textContent: data.statistics[value].label })));
  byId("statistic").addEventListener("change", shown);
  const all = () => { curves(); if (names.length) shown(); };
  byId("scale").addEventListener("change", all);
  byId("height").addEventListener("change", curves);
  all();
})();
