"""The report of the main job: one self-contained ``report.html`` and a PNG of every figure beside it.

The page asks nothing of the network, and its own content security policy forbids it to: it runs exactly the
scripts whose hashes it names, and text from data is text wherever it stands.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs

from minitf.analysis import page_parts
from minitf.analysis.claims import Claim
from minitf.analysis.scan_snap import figures, figures_text, figures_theory, report_data, style, theory
from minitf.analysis.scan_snap.joma import JomaResults
from minitf.analysis.scan_snap.results import ScanSnapResults
from minitf.files import write_atomically

HERE = Path(__file__).parent


def drawings(results: ScanSnapResults, joma: JomaResults | None) -> dict[str, Callable[[], Figure]]:
    """Every figure that the results allow, by file name, not yet drawn."""
    draw: dict[str, Callable[[], Figure]] = {}
    sgd, adam = (figures.of_optimizer(results.small, kind) for kind in ("sgd", "adam"))
    if sgd:
        draw |= {"stages": partial(figures.stages, sgd[0]), "fig4": partial(figures.fig4, sgd)}
        draw |= {"progress": partial(figures.progress, sgd), "ratios": partial(figures.ratios, sgd)}
    if adam:
        draw["fig5"] = partial(figures.fig5, adam)
    if results.small:
        draw["loss"] = partial(figures.loss, results.small)
    if results.medium:
        draw |= {name: partial(getattr(figures, name), results.medium) for name in ("fig6", "fig11", "fig12")}
    curves = theory.theory_curves()
    draw |= {name: partial(getattr(figures_theory, name), curves) for name in ("fig3", "fig8", "fig9")}
    draw |= _text_drawings(results)
    if joma is not None:
        names = ("joma_theorems", "joma_fig2", "joma_fig3", "joma_fig4")
        draw |= {name: partial(getattr(figures_theory, name), joma) for name in names}
    return draw


def _text_drawings(results: ScanSnapResults) -> dict[str, Callable[[], Figure]]:
    draw: dict[str, Callable[[], Figure]] = {}
    leading = figures_text.leading(results.text)
    single = figures_text.single_layer(leading)
    deeper = [r for r in leading if r.layers > 1]
    sweep = figures_text.rate_sweep(results.text)
    if single:
        draw["text_entropy"] = partial(figures_text.text_curves, single)
        draw["text_lift"] = partial(figures_text.lift, single)
    if deeper:
        draw["text_layers"] = partial(figures_text.text_layers, deeper)
    if sweep:
        draw["fig10"] = partial(figures_text.fig10, sweep)
    for run in leading:
        draw[f"text_attention_{run.optimizer}_{run.layers}_layers"] = partial(figures_text.attention_matrices, run)
    return draw


def save_figures(folder: Path, results: ScanSnapResults, joma: JomaResults | None) -> dict[str, bytes]:
    """Write every figure as ``figures/<name>.png`` under the folder; returns the PNGs by name. Raises OSError."""
    return {
        name: style.save_png(draw(), folder / "figures" / f"{name}.png")
        for name, draw in drawings(results, joma).items()
    }


def _natural_width(png: bytes) -> int:
    """The width at which a figure's text is as large as the page's, in CSS pixels, from the PNG's header."""
    return round(int.from_bytes(png[16:20], "big") * 0.7)


def page(
    results: ScanSnapResults,
    pictures: Mapping[str, bytes],
    claims: Sequence[Claim],
    config: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """The whole report as HTML text. Parts without results are left out."""
    scripts = {"report": page_parts.script((HERE / "report.js").read_text(encoding="utf-8"))}
    if results.small or results.text:
        scripts["plotly"] = page_parts.script(get_plotlyjs())
    rows = [report_data.claim_row(c) for c in claims]
    images = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    return page_parts.render(
        HERE / "report.html.j2",
        scripts,
        report_data.interactive(results),
        results=results,
        text_runs=figures_text.leading(results.text),
        run_label=figures_text.run_label,
        images=images,
        widths={name: _natural_width(data) for name, data in pictures.items()},
        claims=rows,
        counts=report_data.claim_counts(rows),
        headlines=report_data.headlines(results),
        fig6_rows=report_data.fig6_rows(results.medium),
        config=report_data.flat(config),
        versions=list(versions.items()),
    )


def write_report(
    folder: Path,
    results: ScanSnapResults,
    joma: JomaResults | None,
    claims: Sequence[Claim],
    config: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Path:
    """Draw all figures and write ``report.html`` into the folder; returns its path. Raises OSError."""
    pictures = save_figures(folder, results, joma)
    path = folder / "report.html"
    write_atomically(path, page(results, pictures, claims, config, versions).encode())
    return path
