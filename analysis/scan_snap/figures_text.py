"""The figures of real text: entropy and loss, attention matrices, distinct against common keys."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minitf.analysis.scan_snap import reference, style
from minitf.analysis.scan_snap.results import TextRun
from minitf.analysis.scan_snap.style import BLUE, COMMON, MUTED, NAMED, VERMILLION, styled

OPTIMIZER_COLORS = {"sgd": BLUE, "adam": VERMILLION}


def single_layer(runs: Sequence[TextRun]) -> list[TextRun]:
    """The runs of one layer, to which the theory speaks."""
    return [r for r in runs if r.layers == 1]


def leading(runs: Sequence[TextRun]) -> list[TextRun]:
    """The first run of each optimizer and depth: what is shown at length."""
    first: dict[tuple[str, int], TextRun] = {}
    for run in runs:
        first.setdefault((run.optimizer, run.layers), run)
    return list(first.values())


def rate_sweep(runs: Sequence[TextRun]) -> list[TextRun]:
    """One-layer SGD runs at different learning rates, by rate; empty if there are fewer than three rates."""
    by_rate = {r.learning_rate: r for r in single_layer(runs) if r.optimizer == "sgd"}
    return [by_rate[rate] for rate in sorted(by_rate)] if len(by_rate) > 2 else []


def run_label(run: TextRun) -> str:
    """The run's name in words."""
    optimizer = {"sgd": "SGD", "adam": "Adam"}.get(run.optimizer, run.optimizer)
    depth = "" if run.layers == 1 else f", {run.layers} layers"
    return f"{optimizer}, rate {run.learning_rate:g}{depth}"


def four_times(run: TextRun, count: int = 4) -> list[int]:
    """At most ``count`` snapshots, spread evenly from the first to the last."""
    last = len(run.snapshot_steps) - 1
    return sorted({round(i * last / max(1, count - 1)) for i in range(count)})


def _colors(runs: Sequence[TextRun]) -> list[str]:
    """Each optimizer its color; further runs of one optimizer take the others."""
    spare = iter([c for c in NAMED if c not in OPTIMIZER_COLORS.values()] * len(runs))
    seen: set[str] = set()
    colors = []
    for run in runs:
        fresh = run.optimizer in OPTIMIZER_COLORS and run.optimizer not in seen
        colors.append(OPTIMIZER_COLORS[run.optimizer] if fresh else next(spare))
        seen.add(run.optimizer)
    return colors


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    """Linear where records are evenly spaced, else logarithmic from the first one on with room for step 0."""
    spacing = np.diff(np.unique(steps))
    if len(spacing) == 0 or spacing.max() <= 2 * spacing.min():
        axes.set_xlabel("step")
        return
    positive = steps[steps > 0]
    axes.set_xscale("symlog", linthresh=float(positive.min()) if len(positive) else 1.0, linscale=0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("step (logarithmic)")


def _extremes(axes: Axes, run: TextRun, entropy: np.ndarray, color: str) -> None:
    """Mark the end, and the lowest entropy where Adam rebounds from it."""
    lowest = int(entropy.argmin())
    points = {len(entropy) - 1}
    if run.optimizer == "adam" and entropy[-1] - entropy[lowest] > 0.05:
        points.add(lowest)
    for i in points:
        axes.plot(run.record_steps[i], entropy[i], "o", color=color, mec="white", ms=7, clip_on=False, zorder=5)
        axes.annotate(
            f"{entropy[i]:.2f}",
            (run.record_steps[i], entropy[i]),
            xytext=(0, 8 if i == len(entropy) - 1 else -17),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=color,
            fontweight="bold",
        )


@styled
def text_curves(runs: Sequence[TextRun]) -> Figure:
    """Attention entropy and loss on validation text over training, one-layer runs; JoMA's own run beside."""
    figure, axes = style.panels(1, 3, 13.0, 4.2)
    first, second, third = axes[0]
    for run, color in zip(runs, _colors(runs), strict=True):
        entropy = run.entropy[:, 0]
        first.plot(run.record_steps, entropy, color=color, marker=".", label=run_label(run))
        _extremes(first, run, entropy, color)
        second.plot(run.record_steps, run.validation_loss, color=color, marker=".", label=run_label(run))
    for place in (first, second):
        _step_axis(place, runs[0].record_steps)
    first.set_title("attention entropy, here")
    first.set_ylabel("entropy (nats per query)")
    first.set_ylim(bottom=0)
    second.set_title("validation loss, here")
    second.set_ylabel("loss (nats per token)")
    second.legend(loc="upper right")
    third.plot(
        reference.JOMA_TEXT_BATCHES / 1000,
        reference.JOMA_TEXT_ENTROPY,
        "o--",
        color=MUTED,
        mfc="white",
        label="JoMA's authors, WikiText-2,\nAdam, rate 1e-4",
    )
    third.set_title("attention entropy, published")
    third.set_xlabel("thousand batches")
    third.set_ylim(first.get_ylim())
    third.legend(loc="lower right")
    return figure


@styled
def fig10(runs: Sequence[TextRun]) -> Figure:
    """Attention entropy over training for several learning rates of SGD, and at the end against the rate."""
    figure, axes = style.panels(1, 2, 11.2, 4.0)
    left, right = axes[0]
    rates, final = [r.learning_rate for r in runs], [float(r.entropy[-1, 0]) for r in runs]
    for i, (run, color) in enumerate(zip(runs, style.ordered_colors(len(runs)), strict=True)):
        left.plot(run.record_steps, run.entropy[:, 0], color=color, label=rf"$\eta$ = {run.learning_rate:g}")
        right.plot(run.learning_rate, final[i], style.MARKERS[i % 6], color=color, ms=7, zorder=3)
    right.plot(rates, final, color=MUTED, lw=1)
    _step_axis(left, runs[0].record_steps)
    left.set_ylabel("attention entropy (nats per query)")
    left.legend()
    right.set_xlabel(r"learning rate $\eta$")
    right.set_ylabel("entropy at the end (nats per query)")
    for place in axes[0]:
        place.set_ylim(bottom=0)
    return figure


@styled
def text_layers(runs: Sequence[TextRun]) -> Figure:
    """Attention entropy of every layer of the deeper runs, from the lowest (dark) to the top (light)."""
    figure, axes = style.panels(1, len(runs), 5.6 * len(runs), 4.0, sharey=True)
    for place, run in zip(axes[0], runs, strict=True):
        for layer, color in enumerate(style.ordered_colors(run.layers)):
            place.plot(run.record_steps, run.entropy[:, layer], color=color, label=f"layer {layer + 1}")
        _step_axis(place, run.record_steps)
        place.set_title(run_label(run))
        place.legend(ncols=2)
    axes[0, 0].set_ylabel("attention entropy (nats per query)")
    axes[0, 0].set_ylim(bottom=0)
    return figure


@styled
def attention_matrices(run: TextRun) -> Figure:
    """Which token attends to which, lowest layer, at four times; rows are queries."""
    chosen = four_times(run)
    columns = min(2, len(chosen))
    rows = -(-len(chosen) // columns)
    figure, axes = style.panels(rows, columns, 6.4 * columns + 0.8, 6.3 * rows)
    for place, i in zip(axes.flat, chosen, strict=False):
        image = place.imshow(run.snapshot_pattern[i], cmap=style.ATTENTION, vmin=0, vmax=1)
        place.set_title(f"step {int(run.snapshot_steps[i])}")
        style.token_ticks(place, run.snapshot_tokens, min(6.5, 260 / len(run.snapshot_tokens)))
    for place in axes[:, 0]:
        place.set_ylabel("query: the token that looks")
    for place in axes[-1]:
        place.set_xlabel("key: the token looked at")
    for place in axes.flat[len(chosen) :]:
        place.remove()
    figure.colorbar(image, ax=axes, label="attention (each row sums to 1)", shrink=0.5, pad=0.015)
    figure.suptitle(style.literal(run_label(run)), fontsize=12, fontweight="bold")
    return figure


@styled
def lift(runs: Sequence[TextRun]) -> Figure:
    """Attention to a key, relative to uniform, for keys distinct to few next tokens and common to many."""
    figure, axes = style.panels(1, len(runs), 5.4 * len(runs), 3.8, sharey=True)
    for place, run in zip(axes[0], runs, strict=True):
        place.axhline(1, color=MUTED, lw=1)
        place.plot(run.record_steps, run.distinct_lift, color=BLUE, marker="o", ms=3, label="distinct keys")
        place.plot(run.record_steps, run.common_lift, color=COMMON, marker="s", ms=3, label="common keys")
        _step_axis(place, run.record_steps)
        place.set_title(run_label(run))
    axes[0, 0].set_ylabel("attention relative to uniform")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend(loc="best")
    return figure
