"""How every figure of the report looks: colors, sizes, and the few helpers that all of them share.

Colors are those of Okabe and Ito where they name things, and a trimmed viridis where they have an order; both
can be told apart with any color vision. Nothing here touches pyplot.
"""

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from minitf.files import write_atomically

INK, MUTED, GRID = "#1d2733", "#5b6775", "#e3e7ec"
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b5619b",
    "#e69f00",
    "#56b4e9",
)
NAMED = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
COMMON, DISTINCT = "#98a2ae", BLUE
MARKERS = ("o", "s", "^", "D", "v", "P")
# From white, so that a page stays white where nothing is attended to.
ATTENTION_COLORS = ("#ffffff", "#d6e6f4", "#9dc6e3", "#4a98c9", "#1664ab", "#08306b", "#04152f")
ATTENTION = LinearSegmentedColormap.from_list("attention", ATTENTION_COLORS)
DPI = 150

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 8,
    "axes.labelsize": 10,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "image.interpolation": "nearest",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": True,
}
Parameters = ParamSpec("Parameters")


def styled(draw: Callable[Parameters, Figure]) -> Callable[Parameters, Figure]:
    """Draw with :data:`STYLE`, and leave matplotlib's own settings as they were."""

    @functools.wraps(draw)
    def drawn(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Figure, np.ndarray]:
    """A figure of ``width`` by ``height`` inches and its axes [rows, columns]."""
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def ordered_colors(count: int) -> list[str]:
    """``count`` colors from dark to light for quantities that have an order."""
    return [to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.0, 0.82, max(count, 1)))]


def band(
    axes: Axes,
    x: np.ndarray,
    samples: np.ndarray,
    color: Any,
    label: str | None = None,
    error: bool = False,
    **line: Any,
) -> None:
    """The mean over seeds (axis 0) as a line, with a band: the smallest and largest, or the standard error."""
    mean = samples.mean(axis=0)
    axes.plot(x, mean, color=color, label=label, **line)
    if len(samples) > 1:
        half = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        low, high = (mean - half, mean + half) if error else (samples.min(axis=0), samples.max(axis=0))
        axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)


def note(axes: Axes, x: float, y: float, text: str, **how: Any) -> None:
    """A small remark inside the axes, in fractions of them."""
    axes.text(x, y, text, transform=axes.transAxes, fontsize=8.5, color=MUTED, **how)


def literal(text: str) -> str:
    """Text from data as matplotlib should show it: dollar signs are not mathematics."""
    return text.replace("$", r"\$")


WHITESPACE = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"}


def visible(token: str, longest: int = 14) -> str:
    """A token as one short, visible word: white space as signs, long ones cut."""
    shown = "".join(WHITESPACE.get(c, c if c.isprintable() else "�") for c in token) or "∅"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def token_ticks(axes: Axes, tokens: Sequence[str], size: float = 6.5) -> None:
    """Tokens as the labels of both axes of an attention matrix."""
    labels, places = [literal(visible(t)) for t in tokens], range(len(tokens))
    axes.set_xticks(places, labels, rotation=90, fontsize=size)
    axes.set_yticks(places, labels, fontsize=size)
    axes.tick_params(length=0, pad=2)
    axes.grid(False)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes at 150 dpi."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(buffer)  # savefig would draw twice, once only to lay it out
    return buffer.getvalue()


def save_png(figure: Figure, path: Path) -> bytes:
    """Write the figure so that no reader sees half of it; returns the bytes. Raises OSError."""
    data = png(figure)
    write_atomically(path, data)
    return data
