"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };
  const data = JSON.parse(byId("report-data").textContent);
  const ink = "#1d2733", grid = "#e3e7ec";
  const colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1d2733", "#8c6d31", "#7b4173", "#637939"];
  const dashes = ["solid", "dash", "dot"];
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: ink };
  const config = { displayModeBar: false, responsive: true };
  const axis = { gridcolor: grid, zeroline: false, automargin: true };
  const tasks = Object.keys(data.tasks);
  const percent = (task) => data.tasks[task].measure === "accuracy";
  const shown = (task, value) => (value === null ? "-" : percent(task) ? (100 * value).toFixed(1) : value.toFixed(3));
  const label = (task) => (percent(task) ? "accuracy" : "bits a symbol");
  const line = (i) => ({ color: colors[i % colors.length], dash: dashes[Math.floor(i / colors.length) % dashes.length], width: i ? 1.6 : 3 });
  const fill = (id, values, labels, draw) => {
    values.forEach((value, i) => byId(id).append(make("option", { value, textContent: labels[i] })));
    byId(id).addEventListener("change", draw);
  };
  const row = (cells, tag = "td") => make("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : make(tag, { textContent: cell }))));

  const table = () => {
    const at = byId("matched").value;
    const body = data.rows.map((name) => row([name, ...tasks.map((task) => {
      const found = data.cells[task][name];
      if (!found) return "";
      const [mean, low, high] = ["mean", "low", "high"].map((key) => found[at][key][0]);
      if (mean === null) return "diverged";
      const softmax = data.cells[task].softmax[at].mean[0];
      const better = percent(task) ? mean - softmax : (softmax - mean) / softmax * 2;
      const strength = Math.min(Math.abs(better) / 0.5, 1) * 0.55 + (Math.abs(better) > 0.005 ? 0.06 : 0);
      const cell = make("td", {}, shown(task, mean), make("small", { textContent: high > low ? ` ± ${shown(task, (high - low) / 2)}` : "" }));
      cell.style.background = better >= 0 ? `rgba(0,114,178,${strength})` : `rgba(213,94,0,${strength})`;
      return cell;
    })]));
    byId("table").replaceChildren(make("thead", {}, row(["", ...tasks], "th")), make("tbody", {}, ...body));
  };
  const curves = () => {
    const task = byId("curve-task").value, compute = byId("axis").value === "compute";
    const names = data.rows.filter((name) => data.cells[task][name]);
    const traces = names.map((name, i) => {
      const cell = data.cells[task][name], curve = cell.curve;
      return { type: "scatter", mode: "lines", name, line: line(i), x: cell.record_steps.map((s) => (compute ? s * cell.flops : s)), y: curve.mean,
        error_y: { type: "data", array: curve.high.map((h, j) => h - curve.mean[j]), arrayminus: curve.low.map((l, j) => curve.mean[j] - l), thickness: 0.7, width: 0, color: colors[i % colors.length] },
        hovertemplate: `${name}: %{y:.3f}<extra></extra>` };
    });
    const references = Object.entries(data.tasks[task].references);
    const layout = { font, margin: { l: 60, r: 10, t: 10, b: 44 }, hovermode: "closest", legend: { font: { size: 11.5 } },
      xaxis: { ...axis, title: { text: compute ? "operations, in steps of softmax attention" : "steps" } }, yaxis: { ...axis, title: { text: label(task) } },
      shapes: references.map(([, y]) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: "#8a94a0", width: 1, dash: "dot" } })),
      annotations: references.map(([text, y]) => ({ text, xref: "paper", x: 1, xanchor: "right", y, yanchor: "bottom", showarrow: false, font: { size: 11, color: "#5a6470" } })) };
    Plotly.react("plot", traces, layout, config);
  };
  const decoded = {};
  const picture = (task, name) => {
    const key = `${task}/${name}`;
    if (!decoded[key]) {
      const { shape, most, levels } = data.associations[task].rows[name];
      decoded[key] = { shape, most, levels: Uint8Array.from(atob(levels), (c) => c.charCodeAt(0)) };
    }
    return decoded[key];
  };
  const sequence = (query = -1, key = -1) => {
    const symbols = data.associations[byId("map-task").value].symbols;
    const spaced = byId("map-task").value !== "text";
    byId("sequence").replaceChildren(...symbols.flatMap((symbol, i) => {
      const text = symbol === " " ? "\u00b7" : symbol;
      const one = i === query || i === key ? make("mark", { className: i === query ? "query" : "key", textContent: text }) : text;
      return spaced ? [one, " "] : [one];
    }));
  };
  const maps = () => {
    const task = byId("map-task").value, layer = Number(byId("layer").value), head = Number(byId("head").value);
    const names = data.rows.filter((name) => data.cells[task][name] && data.associations[task].rows[name].shape[0]);
    byId("pictures").replaceChildren(...names.map((name) => {
      const { shape, most, levels } = picture(task, name);
      const [, heads, size] = shape, h = Math.min(head, heads - 1);
      const start = (layer * heads + h) * size * size;
      const own = levels.subarray(start, start + size * size);
      const largest = Math.max(...own.map((v) => Math.abs(v - 128)), 1);
      const canvas = make("canvas", { width: size, height: size });
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${name}, layer ${layer}, head ${h}`);
      const context = canvas.getContext("2d"), image = context.createImageData(size, size);
      own.forEach((v, i) => {
        const strength = Math.sqrt(Math.abs(v - 128) / largest), [r, g, b] = v >= 128 ? [0, 114, 178] : [213, 94, 0];
        [r, g, b].forEach((c, j) => { image.data[4 * i + j] = 255 + (c - 255) * strength; });
        image.data[4 * i + 3] = 255;
      });
      context.putImageData(image, 0, 0);
      canvas.addEventListener("pointermove", (event) => {
        const box = canvas.getBoundingClientRect();
        const at = (from, length) => Math.min(size - 1, Math.max(0, Math.floor(from / length * size)));
        const key = at(event.clientX - box.left, box.width), query = at(event.clientY - box.top, box.height);
        byId("told").textContent = `${name}: query ${query}, key ${key}: ${((own[query * size + key] - 128) / 127 * most).toFixed(3)}`;
        sequence(query, key);
      });
      return make("figure", {}, canvas, make("figcaption", { textContent: name }));
    }));
    sequence();
  };
  const frozen = () => {
    const task = byId("frozen-task").value, found = data.replaced[task];
    if (!found) return;
    const order = found.orders.indexOf(byId("order").value);
    // No replacement stands out, as softmax attention does elsewhere; what all start from is a line.
    const traces = found.names.map((name, i) => ({ type: "scatter", mode: "lines+markers", name, line: { ...line(i), width: 1.6 }, x: found.fractions, y: found.mean[i][order],
      error_y: { type: "data", array: found.high[i][order].map((h, j) => h - found.mean[i][order][j]), thickness: 0.7, width: 0, color: colors[i % colors.length] },
      hovertemplate: `${name}: %{y:.3f}<extra></extra>` }));
    const layout = { font, margin: { l: 60, r: 10, t: 10, b: 44 }, hovermode: "closest", legend: { font: { size: 12 } },
      xaxis: { ...axis, title: { text: "share of heads replaced" }, tickvals: found.fractions }, yaxis: { ...axis, title: { text: label(task) } },
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: found.intact.mean[0], y1: found.intact.mean[0], line: { color: "#8a94a0", width: 1, dash: "dot" } }],
      annotations: [{ text: "nothing replaced", xref: "paper", x: 1, xanchor: "right", y: found.intact.mean[0], yanchor: "bottom", showarrow: false, font: { size: 11, color: "#5a6470" } }] };
    Plotly.react("frozen", traces, layout, config);
  };
  const moves = () => {
    const task = byId("walk-task").value, which = Number(byId("which").value);
    const names = data.rows.filter((name) => data.cells[task][name] && data.cells[task][name].geometry.length);
    const count = names.length ? data.cells[task][names[0]].geometry[which].length : 0;
    const steps = Array.from({ length: count }, (_, i) => `${i % 2 ? "feed-forward" : "mixer"} ${Math.floor(i / 2)}`);
    const traces = names.map((name, i) => ({ type: "scatter", mode: "lines+markers", name, line: line(i), x: steps, y: data.cells[task][name].geometry[which],
      hovertemplate: `${name}: %{y:.3f}<extra></extra>` }));
    const layout = { font, margin: { l: 60, r: 10, t: 10, b: 44 }, hovermode: "closest", legend: { font: { size: 11.5 } }, xaxis: { ...axis }, yaxis: { ...axis, title: { text: byId("which").selectedOptions[0].textContent } } };
    Plotly.react("moves", traces, layout, config);
  };
  const costs = () => {
    const task = byId("cost-task").value;
    const ratio = (value) => value.toFixed(2);
    const rate = (cell) => {
      const tried = Object.keys(cell.by_rate).map(Number);
      const end = tried.length < 2 ? "" : cell.rate === Math.max(...tried) ? " (largest tried)" : cell.rate === Math.min(...tried) ? " (smallest tried)" : "";
      return cell.rate + end;
    };
    const body = data.rows.filter((name) => data.cells[task][name]).map((name) => {
      const cell = data.cells[task][name];
      const depends = cell.data_dependence.map((v) => (v === null ? "-" : (Math.round(100 * v) / 100 || 0).toFixed(2))).join("  ");
      return row([name, cell.parameters.toLocaleString("en"), String(cell.hidden), ratio(cell.flops), ratio(cell.seconds), ratio(cell.memory), rate(cell), depends]);
    });
    const head = ["", "parameters", "hidden", "operations", "time", "memory", "learning rate", "data"];
    byId("cost").replaceChildren(make("thead", {}, row(head, "th")), make("tbody", {}, ...body));
  };

  fill("matched", ["equal_size", "equal_compute"], ["equal parameters and steps", "equal parameters and operations"], table);
  fill("curve-task", tasks, tasks, curves);
  fill("axis", ["steps", "compute"], ["steps", "operations"], curves);
  fill("map-task", tasks, tasks, maps);
  fill("layer", [0, 1], [0, 1], maps);
  fill("head", [0, 1, 2, 3], [0, 1, 2, 3], maps);
  const replaced = Object.keys(data.replaced);
  fill("frozen-task", replaced, replaced, frozen);
  fill("order", replaced.length ? data.replaced[replaced[0]].orders : [], replaced.length ? data.replaced[replaced[0]].orders : [], frozen);
  fill("walk-task", tasks, tasks, moves);
  const measures = { relative_step: "length of a step, of the point it leaves", turning_angle: "angle to the next step, radians", point_angle: "angle between points before and after, radians", radial: "cosine with the point it leaves", efficiency: "straightness of the whole walk" };
  fill("which", data.geometry.map((_, i) => i), data.geometry.map((name) => measures[name] || name), moves);
  fill("cost-task", tasks, tasks, costs);
  [table, curves, maps, frozen, moves, costs].forEach((draw) => draw());
})();
