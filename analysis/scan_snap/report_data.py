"""What the report's page holds, worked out of the results: plain strings, numbers and lists."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from minitf.analysis.claims import Claim
from minitf.analysis.scan_snap import measures, reference, style
from minitf.analysis.scan_snap.figures import of_optimizer
from minitf.analysis.scan_snap.figures_text import four_times, leading, run_label, single_layer
from minitf.analysis.scan_snap.results import MediumPanel, ScanSnapResults, SmallRun, TextRun

VERDICTS = {
    (True, True): ("holds", "holds"),
    (True, False): ("fails", "does not hold"),
    (False, False): ("known", "known not to reproduce"),
    (False, True): ("surprise", "holds, though known not to reproduce"),
}

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(x: float) -> str:
    """A number for people: four significant digits, a true minus sign, powers of ten written out."""
    if not math.isfinite(x):
        return "not finite"
    mantissa, _, exponent = f"{x:.4g}".partition("e")
    power = (
        f"\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10{str(int(exponent)).translate(SUPERSCRIPTS)}" if exponent else ""
    )
    return mantissa.replace("-", "−") + power


# The two interactive pictures


def plain_rates(run: SmallRun) -> str:
    """The run's optimizer and rates, as plain text."""
    if run.optimizer == "adam":
        return f"Adam, rate {run.decoder_rate:g}"
    return f"SGD, decoder rate {run.decoder_rate:g}, attention rate {run.attention_rate:g}"


def small_data(run: SmallRun) -> dict[str, Any]:
    """One Syn-Small run for the time slider; means over seeds."""
    c = np.asarray(run.association, np.float64)
    entropy = measures.distinct_entropy(c, run.distinct).mean(axis=0)
    return {
        "label": plain_rates(run),
        "steps": run.record_steps,
        "common": run.common,
        "distinct": run.distinct,
        "probability": run.probability,
        "attention": c.mean(axis=0),
        "sd": c.std(axis=0, ddof=1) if len(c) > 1 else None,
        "entropy": entropy,
        "law": measures.law_entropies(run).mean(axis=0) if run.optimizer == "sgd" else None,
        "common_mass": measures.common_mass(c, run.common).mean(axis=0),
        "strongest": measures.strongest_mass(c, run.probability, run.distinct).mean(axis=0),
        "snapping": measures.snapping_time(run),
    }


def text_data(run: TextRun) -> dict[str, Any]:
    """One text run's attention matrices at four times, with short and full token labels."""
    chosen = four_times(run)
    return {
        "label": run_label(run),
        "tokens": [style.visible(t) for t in run.snapshot_tokens],
        "full": [style.visible(t, 60) for t in run.snapshot_tokens],
        "steps": run.snapshot_steps[chosen],
        "patterns": run.snapshot_pattern[chosen],
    }


def interactive(results: ScanSnapResults) -> dict[str, Any]:
    """Everything that the page's script draws."""
    return {
        "small": [small_data(r) for r in results.small],
        "text": [text_data(r) for r in leading(results.text)],
        "colors": {"common": style.COMMON, "classes": style.NAMED, "ink": style.INK, "grid": style.GRID},
        "scale": style.ATTENTION_COLORS,
    }


# Tables


def _limit(threshold: Any, direction: str) -> str:
    if direction == "within":
        return f"{number(threshold[0])} to {number(threshold[1])}"
    return f"{'exactly' if direction == '==' else direction} {number(threshold)}"


def _limits(claim: Claim) -> list[str]:
    """The claim's threshold in words, one for all values or one per value."""
    threshold = claim.threshold
    single = isinstance(threshold, float) or (claim.direction == "within" and isinstance(threshold[0], float))
    return [_limit(threshold, claim.direction)] if single else [_limit(t, claim.direction) for t in threshold]  # type: ignore[union-attr]


def _span(texts: list[str]) -> str:
    unique = list(dict.fromkeys(texts))
    return unique[0] if len(unique) == 1 else f"{len(texts)} limits, see the list"


def claim_row(claim: Claim) -> dict[str, Any]:
    """A claim as strings for the table; ``each`` lists several values with their limits and intervals."""
    verdict, label = VERDICTS[claim.expected, claim.holds]
    values = [claim.value] if isinstance(claim.value, float) else list(claim.value)
    limits = _limits(claim)
    nested = claim.ci95 is not None and not isinstance(claim.ci95[0], float)
    intervals = list(claim.ci95) if nested else [claim.ci95] if claim.ci95 is not None else []  # type: ignore[arg-type]
    shown = [f"[{number(i[0])}, {number(i[1])}]" for i in intervals]  # type: ignore[index]
    if len(values) <= 4:
        measured = "; ".join(number(v) for v in values)
    else:
        measured = f"{number(min(values))} to {number(max(values))} ({len(values)} values)"
    each = []
    if len(values) > 1:
        wide_limits = limits * len(values) if len(limits) == 1 else limits
        wide_shown = shown if len(shown) == len(values) else [""] * len(values)
        each = [
            {"value": number(v), "interval": i, "limit": t}
            for v, i, t in zip(values, wide_shown, wide_limits, strict=True)
        ]
    return {
        **{k: getattr(claim, k) for k in ("id", "statement", "source", "statistic", "note", "n")},
        "verdict": verdict,
        "label": label,
        "limit": _span(limits),
        "measured": measured,
        "interval": shown[0] if len(values) == 1 and shown else "",
        "each": each,
    }


def claim_counts(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many claims have each verdict."""
    verdicts = [row["verdict"] for row in rows]
    return {key: verdicts.count(key) for key, _ in VERDICTS.values()}


def flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value as JSON) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
            rows.append((f"{prefix}{key}", shown))
    return rows


def fig6_rows(grid: Iterable[MediumPanel]) -> list[dict[str, str]]:
    """Every cell of Fig. 6, the published mean and sd beside it where they are known."""
    rows = []
    for panel in grid:
        published = reference.published_panel(panel.queries, panel.queries * panel.next_per_query)
        for i, eta in enumerate(panel.attention_rates):
            for j, ratio in enumerate(panel.ratios):
                cell = panel.entropy[i, j]
                row = {
                    "panel": f"{panel.queries} / {panel.queries * panel.next_per_query}",
                    "eta": number(float(eta)),
                    "ratio": number(float(ratio)),
                    "mean": f"{cell.mean():.3f}",
                    "sd": f"{cell.std(ddof=min(1, len(cell) - 1)):.3f}",
                    "published": "",
                    "difference": "",
                }
                known = _published_cell(published, float(eta), float(ratio))
                if known is not None:
                    row["published"] = f"{known[0]:.3f} ± {known[1]:.3f}"
                    row["difference"] = f"{cell.mean() - known[0]:+.3f}".replace("-", "−")
                rows.append(row)
    return rows


def _published_cell(
    panel: reference.PublishedPanel | None, eta: float, ratio: float
) -> tuple[float, float] | None:
    if panel is None or eta not in panel.attention_rates or ratio not in panel.ratios:
        return None
    i, j = int(np.argmax(panel.attention_rates == eta)), int(np.argmax(panel.ratios == ratio))
    return float(panel.mean[i, j]), float(panel.sd[i, j])


def fig6_difference(grid: Iterable[MediumPanel]) -> dict[str, str] | None:
    """Root mean square of the differences to the published means, and how many cells it is over."""
    differences = []
    for panel in grid:
        published = reference.published_panel(panel.queries, panel.queries * panel.next_per_query)
        for i, eta in enumerate(panel.attention_rates):
            for j, ratio in enumerate(panel.ratios):
                known = _published_cell(published, float(eta), float(ratio))
                if known is not None:
                    differences.append(float(panel.entropy[i, j].mean()) - known[0])
    if not differences:
        return None
    return {"rms": f"{np.sqrt(np.mean(np.square(differences))):.3f}", "cells": str(len(differences))}


def headlines(results: ScanSnapResults) -> list[dict[str, str]]:
    """The few numbers to remember, each with one line of what it is."""
    cards = []
    sgd = of_optimizer(results.small, "sgd")
    if sgd:
        curves = measures.progress(sgd[0])
        start, end = (float(curves.common.mean(axis=0)[i]) for i in (0, -1))
        cards.append(
            {
                "number": f"{start:.0%} → {end:.0%}",
                "text": "of the attention goes to common tokens, before and after",
            }
        )
        start, end = (float(curves.entropy.mean(axis=0)[i]) for i in (0, -1))
        cards.append(
            {
                "number": f"{start:.2f} → {end:.2f}",
                "text": f"nats: entropy over the distinct tokens ({plain_rates(sgd[0])})",
            }
        )
    difference = fig6_difference(results.medium)
    if difference:
        cards.append(
            {
                "number": difference["rms"],
                "text": f"nats rms from the {difference['cells']} published values of Fig. 6",
            }
        )
    for run in single_layer(leading(results.text)):
        entropy = run.entropy[:, 0]
        path = [entropy[0], entropy.min(), entropy[-1]]
        if run.optimizer != "adam" or path[2] - path[1] < 0.05:
            path.pop(1)
        cards.append(
            {
                "number": " → ".join(f"{x:.2f}" for x in path),
                "text": f"nats: attention entropy on real text, {run_label(run)}",
            }
        )
    return cards
