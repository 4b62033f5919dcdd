"""The report of ``minitf mixers``: the numbers by task and row, and one self-contained page that draws them."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitf import __version__
from minitf.analysis import page_parts
from minitf.analysis.claims import Claim, mean_ci95
from minitf.analysis.mixer_study.cell import GEOMETRY, SHOWN_POSITIONS, Cell
from minitf.analysis.mixer_study.replaced import Replaced
from minitf.analysis.mixer_study.rows import BLIND
from minitf.analysis.mixer_study.tasks import Task

HERE = Path(__file__).parent
PLAIN = range(32, 127)  # bytes that are shown as they are


def results(
    rows: Sequence[str],
    cells: Mapping[tuple[str, str], Cell],
    replaced: Mapping[str, Replaced],
    tasks: Mapping[str, Task],
) -> dict[str, Any]:
    """Everything that was measured, but for the associations, as JSON can hold it."""
    return {
        "rows": list(rows),
        "tasks": {
            name: {"asks": task.asks, "measure": task.measure, "references": dict(task.references)}
            for name, task in tasks.items()
        },
        "geometry": list(GEOMETRY),
        "cells": {
            name: {row: _cell(cells[row, name], cells["softmax", name]) for row in rows if (row, name) in cells}
            for name in tasks
        },
        "replaced": {name: _replaced(one) for name, one in replaced.items()},
    }


def _cell(cell: Cell, softmax: Cell) -> dict[str, Any]:
    """One row on one task; costs are those of softmax attention's training step."""
    return {
        "parameters": cell.parameters,
        "hidden": cell.hidden,
        "rate": float(cell.rates[cell.best]),
        "steps": cell.steps,
        "matched_steps": cell.matched_steps,
        "record_steps": cell.record_steps,
        "flops": cell.flops / cell.softmax_flops,
        "seconds": cell.seconds_per_step / softmax.seconds_per_step,
        "memory": cell.temporary_bytes / max(softmax.temporary_bytes, 1),
        "curve": _spread(cell.values[cell.best].T),
        "equal_size": _spread(cell.final[None]),
        "equal_compute": _spread(cell.at_equal_compute[None]),
        "seeds": cell.final,
        "by_rate": {f"{rate:g}": float(cell.values[i].mean(axis=0)[-1]) for i, rate in enumerate(cell.rates)},
        "geometry": cell.geometry.mean(axis=1),
        "data_dependence": cell.data_dependence.mean(axis=0),
    }


def _replaced(one: Replaced) -> dict[str, Any]:
    flat = one.values.reshape(-1, one.values.shape[-1])
    shape = one.values.shape[:-1]
    spread = {key: np.asarray(value).reshape(shape) for key, value in _spread(flat).items()}
    return {
        "names": one.names,
        "orders": one.orders,
        "fractions": one.fractions,
        "intact": _spread(one.intact[None]),
        "heads": one.heads.mean(axis=1),
        **spread,
    }


def _spread(samples: np.ndarray) -> dict[str, Any]:
    """Means over seeds ``[..., seed]`` and their 95 % intervals, which one seed has none of."""
    found = [mean_ci95(one) for one in samples]
    ends = [(mean, mean) if interval is None else interval for mean, interval in found]
    return {
        "mean": [mean for mean, _ in found],
        "low": [low for low, _ in ends],
        "high": [high for _, high in ends],
    }


def page(
    found: Mapping[str, Any],
    cells: Mapping[tuple[str, str], Cell],
    tasks: Mapping[str, Task],
    claims: Sequence[Claim],
    settings: Mapping[str, Any],
) -> str:
    """The report as HTML text; ``found`` as :func:`results` makes it."""
    shown = {
        name: {
            "symbols": symbols(task),
            "rows": {row: _picture(cells[row, name].association) for row in found["cells"][name]},
        }
        for name, task in tasks.items()
    }
    return page_parts.render(
        HERE / "study.html.j2",
        page_parts.drawn_by(HERE / "study.js"),
        {**found, "associations": shown},
        claims=page_parts.claim_rows(claims),
        settings=[(name, _in_words(value)) for name, value in settings.items()],
        tasks=found["tasks"],
        version=__version__,
        conclusion=conclusion(found),
    )


def _in_words(value: Any) -> str:
    """A setting for people: names one after another, nothing where nothing was given."""
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    return "" if value is None else str(value)


def conclusion(found: Mapping[str, Any]) -> str:
    """What an association that looks at the data is worth, task by task, in a sentence."""
    parts = []
    for name, task in found["tasks"].items():
        bits = task["measure"] == "bits"
        cells = found["cells"][name]
        rows = {row: cell["equal_size"]["mean"][0] for row, cell in cells.items()}
        blind = {row: value for row, value in rows.items() if row in BLIND and value is not None}
        if not blind or rows["softmax"] is None:
            continue
        best = (min if bits else max)(blind, key=lambda row: blind[row])
        told = [f"{x:.2f} bits" if bits else f"{x:.0%}" for x in (rows["softmax"], blind[best])]
        parts.append(f"{name} {told[0]}, and {told[1]} ({best})")
    if not parts:
        return "No mixer ran whose association the data has no part in."
    return (
        "With softmax attention, and with the best mixer here whose association is the same whatever the data: "
        + "; ".join(parts)
        + "."
    )


def symbols(task: Task) -> list[str]:
    """The sequence whose associations are shown, symbol by symbol."""
    tokens = np.asarray(task.held_out.tokens[0, :SHOWN_POSITIONS]).tolist()
    if task.name != "text":
        return [str(token) for token in tokens]
    return [chr(token) if token in PLAIN else f"\\x{token:02x}" for token in tokens]


def _picture(association: np.ndarray) -> dict[str, Any]:
    """``[layer, head, query, key]`` as bytes: 128 is zero, 1 and 255 are the largest size, given beside."""
    most = float(np.max(np.abs(association), initial=0.0))
    levels = 128 + np.round(127 * association / (most or 1.0))
    return {
        "shape": list(association.shape),
        "most": most,
        "levels": base64.b64encode(levels.astype(np.uint8).tobytes()).decode(),
    }
