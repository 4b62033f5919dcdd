"""The figures of the synthetic experiments: Syn-Small (Fig. 4, 5) and Syn-Medium (Fig. 6, 11, 12)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from minitf.analysis.scan_snap import measures, reference, style
from minitf.analysis.scan_snap.results import MediumPanel, SmallRun
from minitf.analysis.scan_snap.style import BLUE, COMMON, INK, MARKERS, MUTED, NAMED, styled

FIG4_STEPS = (0, 2, 4, 6, 8, 10)
SMALLEST_LOSS = 1e-8  # below, a mean of single-precision losses is rounding, and often zero


def rates_label(run: SmallRun) -> str:
    """The run's optimizer and rates as a title."""
    if run.optimizer == "adam":
        return rf"Adam, $\eta$ = {run.decoder_rate:g}"
    return rf"SGD, $\eta_Y$ = {run.decoder_rate:g}, $\eta_Z$ = {run.attention_rate:g}"


def of_optimizer(runs: Sequence[SmallRun], optimizer: str) -> list[SmallRun]:
    """The runs of one optimizer, in order."""
    return [r for r in runs if r.optimizer == optimizer]


def _mean_association(run: SmallRun) -> np.ndarray:
    return run.association.mean(axis=0)


def _kinds(axes: Axes, run: SmallRun, shown: int) -> None:
    """Below an image of c_n: which tokens are common, and whose distinct tokens the others are."""
    groups = [("common", run.common, COMMON)]
    groups += [(f"distinct of n = {n + 1}", own, NAMED[n % 6]) for n, own in enumerate(run.distinct)]
    for name, mask, color in groups:
        places = np.flatnonzero(mask[:shown])
        if len(places):
            low, high = (places[0] - 0.4) / shown, (places[-1] + 0.4) / shown
            low, high = low + 0.5 / shown, high + 0.5 / shown
            axes.plot([low, high], [-0.05, -0.05], color=color, lw=3, transform=axes.transAxes, clip_on=False)
            axes.text((low + high) / 2, -0.1, name, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)


def _history_image(
    axes: Axes, run: SmallRun, n: int, highest: float, shown: int, steps: tuple[int, ...]
) -> AxesImage:
    chosen = measures.nearest_records(run.record_steps, steps)
    image = axes.imshow(
        _mean_association(run)[chosen, n, :shown], aspect="auto", cmap=style.ATTENTION, vmin=0, vmax=highest
    )
    labels = [f"{int(run.record_steps[r])}" for r in chosen]
    axes.set_yticks(range(len(chosen)), [*labels[:-1], f"final ({labels[-1]})"])
    axes.set_xticks([])
    axes.grid(False)
    axes.hlines(np.arange(1, len(chosen)) - 0.5, -0.5, shown - 0.5, color="white", linewidth=1.5)
    axes.tick_params(length=0)
    return image


@styled
def fig4(runs: Sequence[SmallRun], steps: tuple[int, ...] = FIG4_STEPS) -> Figure:
    """c_n over training as images, one column per SGD run, one row per class; means over seeds."""
    classes, shown = runs[0].distinct.shape
    figure, axes = style.panels(classes, len(runs), 5.4 * len(runs) + 0.8, 2.5 * classes)
    highest = max(float(_mean_association(r).max()) for r in runs)
    for column, run in enumerate(runs):
        for n in range(classes):
            place = axes[n, column]
            image = _history_image(place, run, n, highest, shown, steps)
            place.set_title(f"{rates_label(run)}: attention $c_n$ for n = {n + 1}")
            _kinds(place, run, shown)
            if column == 0:
                place.set_ylabel("step")
    figure.colorbar(image, ax=axes, label="attention $c_n$ (sums to 1)", shrink=0.8, pad=0.015)
    return figure


@styled
def fig5(runs: Sequence[SmallRun], steps: tuple[int, ...] = FIG4_STEPS) -> Figure:
    """Adam: c_1 over training as images, and how the final attention is shared by the distinct tokens."""
    figure, axes = style.panels(2, len(runs), 4.2 * len(runs), 5.4)
    shown = int(np.flatnonzero(runs[0].distinct[0] | runs[0].common)[-1]) + 1
    highest = max(float(_mean_association(r)[:, 0].max()) for r in runs)
    for column, run in enumerate(runs):
        image = _history_image(axes[0, column], run, 0, highest, shown, steps)
        axes[0, column].set_title(rates_label(run))
        _kinds(axes[0, column], run, shown)
        shares = measures.distinct_shares(run.association[:, -1], run.distinct)[:, 0, run.distinct[0]]
        start = measures.distinct_shares(run.probability, run.distinct)[0, run.distinct[0]]
        bars, below = np.arange(1, len(start) + 1), axes[1, column]
        below.bar(bars, shares.mean(axis=0), color=BLUE, label="at the end")
        if len(shares) > 1:
            below.errorbar(bars, shares.mean(axis=0), shares.std(axis=0, ddof=1), fmt="none", ecolor=INK, lw=1)
        below.plot(bars, start, "o", mfc="none", mec=INK, label="at the start")
        below.set_xticks(bars)
        below.set_xlabel("distinct token, rarest to most frequent")
        below.grid(axis="x", visible=False)
        below.sharey(axes[1, 0])
    axes[0, 0].set_ylabel("step")
    axes[1, 0].set_ylabel("share of the distinct\ntokens' attention")
    axes[1, 0].legend(loc="upper left")
    axes[1, 0].set_ylim(0, 1.25 * axes[1, 0].get_ylim()[1])
    figure.colorbar(image, ax=axes[0, :], label="attention $c_1$", pad=0.01)
    return figure


def _mark_snapping(axes: Axes, run: SmallRun, color: str, named: bool) -> None:
    times = measures.snapping_time(run)
    if times is None:
        return
    axes.axvspan(*times, color=color, alpha=0.07, linewidth=0)
    axes.axvline(times[1], color=color, linestyle=":", linewidth=1.4)
    if named:
        label = rf" $t_0$ = {times[1]:.1f}"
        place = axes.get_xaxis_transform()
        axes.text(times[1], 0.99, label, color=color, fontsize=9, transform=place, va="top")


@styled
def progress(runs: Sequence[SmallRun]) -> Figure:
    """Entropy of the distinct part, common mass and strongest distinct token over time, with t_0."""
    figure, axes = style.panels(1, 3, 12.6, 4.0)
    titles = (
        "entropy of the distinct part (nats)",
        "attention on common tokens",
        "on the strongest distinct token",
    )
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title)
        place.set_xlabel("step")
    for i, run in enumerate(runs):
        curves, color = measures.progress(run), NAMED[i % 6]
        for place, samples in zip(axes[0], (curves.entropy, curves.common, curves.strongest), strict=True):
            style.band(place, run.record_steps, samples, color, rates_label(run))
            _mark_snapping(place, run, color, named=place is axes[0, 0])
        axes[0, 0].plot(run.record_steps, curves.law.mean(axis=0), color=INK, ls=(0, (4, 2)), lw=1.2)
    handles = [*axes[0, 0].get_legend_handles_labels()[0], Line2D([], [], color=INK, ls=(0, (4, 2)), lw=1.2)]
    labels = [*(rates_label(r) for r in runs), "Theorem 3, from the strongest token's logit alone"]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    axes[0, 1].set_ylim(bottom=0)
    axes[0, 2].set_ylim(bottom=0)
    return figure


@styled
def ratios(runs: Sequence[SmallRun], n: int = 0) -> Figure:
    """r(t) / r(0) of the strongest distinct token against weaker ones, and Theorem 3's one law for all."""
    figure, axes = style.panels(1, len(runs), 5.2 * len(runs), 4.0)
    for place, run in zip(axes[0], runs, strict=True):
        own = np.flatnonzero(run.distinct[n])
        order = own[np.argsort(run.probability[n, own], kind="stable")]
        top, weaker = order[-1], order[:-1][:: max(1, len(order) // 5)]
        c, z = run.association[:, :, n], run.attention_logits[:, :, n]
        for i, (token, color) in enumerate(zip(weaker, style.ordered_colors(len(weaker)), strict=True)):
            excess = measures.ratio_excess(c[..., top], c[..., token])
            times = run.probability[n, top] / run.probability[n, token]
            style.band(
                place,
                run.record_steps,
                excess / excess[:, :1],
                color,
                f"{times:.3g} times rarer",
                error=True,
                marker=MARKERS[i % 6],
                markevery=(2 * i, max(1, len(run.record_steps) // 5)),
            )
        law = measures.ratio_growth(z[..., top], z[:, :1, top]).mean(axis=0)
        place.plot(run.record_steps, law, color=INK, ls=(0, (4, 2)), label=r"law $e^{2(z_l(t)-z_l(0))}$")
        _mark_snapping(place, run, MUTED, named=True)
        place.set_title(rates_label(run))
        place.set_xlabel("step")
        place.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("$r(t)\\,/\\,r(0)$ of the strongest\nagainst a weaker distinct token")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), title="the weaker one is", alignment="left")
    return figure


@styled
def loss(runs: Sequence[SmallRun]) -> Figure:
    """Training loss of all runs on a log axis, the authors' log beside it."""
    figure, axes = style.panels(1, 1, 7.6, 4.2)
    place = axes[0, 0]
    for i, run in enumerate(runs):
        shown = np.maximum(run.loss, SMALLEST_LOSS)
        style.band(place, np.arange(run.loss.shape[1]), shown, NAMED[i % 6], rates_label(run))
    if any(r.optimizer == "sgd" and (r.decoder_rate, r.attention_rate) == reference.FIG4_LOSS_RATES for r in runs):
        label = "authors' log, SGD (1, 1)"
        place.plot(reference.FIG4_LOSS_STEP, reference.FIG4_LOSS, "o", mfc="white", mec=INK, label=label, zorder=5)
    place.set_yscale("log")
    place.set_ylim(bottom=SMALLEST_LOSS)
    place.set_xlabel("step")
    place.set_ylabel("loss (nats per token)")
    place.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


# Syn-Medium


def panel_name(panel: MediumPanel) -> str:
    """The paper's name of the panel: query tokens / next tokens."""
    return f"{panel.queries} / {panel.queries * panel.next_per_query}"


def _ratio_axis(axes: Axes, ratios: np.ndarray) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{r:g}" for r in ratios])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(r"ratio $\eta_Y / \eta_Z$")


@styled
def fig6(grid: Sequence[MediumPanel]) -> Figure:
    """Final entropy of the distinct part against the ratio of the rates, published values beside it."""
    columns = min(2, len(grid))
    rows = -(-len(grid) // columns)
    figure, axes = style.panels(rows, columns, 5.2 * columns + 1.6, 3.7 * rows, sharey=True)
    for place, panel in zip(axes.flat, grid, strict=False):
        published = reference.published_panel(panel.queries, panel.queries * panel.next_per_query)
        mean, sd = (
            panel.entropy.mean(axis=-1),
            panel.entropy.std(axis=-1, ddof=min(1, panel.entropy.shape[-1] - 1)),
        )
        for i, color in enumerate(style.ordered_colors(len(panel.attention_rates))):
            place.errorbar(
                panel.ratios, mean[i], sd[i], color=color, marker=MARKERS[i % 6], capsize=2.5, elinewidth=1.1
            )
            if published is not None and panel.attention_rates[i] in published.attention_rates:
                row = int(np.flatnonzero(published.attention_rates == panel.attention_rates[i])[0])
                look = {"color": color, "ls": "--", "lw": 1.1, "mfc": "white", "ms": 8, "alpha": 0.9}
                place.plot(published.ratios * 1.06, published.mean[row], marker=MARKERS[i % 6], **look)
        _ratio_axis(place, panel.ratios)
        unknown = "" if published is not None else "   (no published values known)"
        place.set_title(f"#last / #next = {panel_name(panel)}")
        style.note(place, 0.98, 0.03, unknown, ha="right")
    for place in axes.flat[len(grid) :]:
        place.remove()
    for place in axes[:, 0]:
        place.set_ylabel("entropy of $c_n$ on\ndistinct tokens (nats)")
    figure.legend(handles=_fig6_legend(grid[0]), loc="outside right upper", alignment="left")
    return figure


def _fig6_legend(panel: MediumPanel) -> list[Line2D]:
    colors = style.ordered_colors(len(panel.attention_rates))
    rates = [
        Line2D([], [], color=c, marker=MARKERS[i % 6], label=rf"$\eta_Z$ = {r:g}")
        for i, (c, r) in enumerate(zip(colors, panel.attention_rates, strict=True))
    ]
    ours = Line2D([], [], color=MUTED, marker="o", label="measured here\n(mean, sd of seeds)")
    theirs = Line2D([], [], color=MUTED, marker="o", mfc="white", ms=8, ls="--", lw=1.1, label="published")
    return [*rates, ours, theirs]


def _recall_grid(grid: Sequence[MediumPanel], across_rates: bool) -> Figure:
    """Recall curves: one row per panel; columns are eta_Z and curves ratios (Fig. 11), or the other way."""
    first = grid[0]
    columns = first.attention_rates if across_rates else first.ratios
    curves = first.ratios if across_rates else first.attention_rates
    column_name, curve_name = (
        (r"$\eta_Z$", r"$\eta_Y/\eta_Z$") if across_rates else (r"$\eta_Y/\eta_Z$", r"$\eta_Z$")
    )
    figure, axes = style.panels(
        len(grid), len(columns), 2.7 * len(columns) + 1.4, 2.2 * len(grid) + 0.5, sharex=True, sharey=True
    )
    for row, panel in enumerate(grid):
        mean = panel.recall.mean(axis=2)
        for column, fixed in enumerate(columns):
            for i, color in enumerate(style.ordered_colors(len(curves))):
                cell = mean[column, i] if across_rates else mean[i, column]
                label = f"{curve_name} = {curves[i]:g}" if row == column == 0 else None
                axes[row, column].plot(panel.thresholds, 100 * cell, color=color, label=label)
            if row == 0:
                axes[row, column].set_title(f"{column_name} = {fixed:g}")
        axes[row, 0].set_ylabel(f"{panel_name(panel)}\nrecall (%)")
    for place in axes[-1]:
        place.set_xlabel("threshold (1/M)")
    figure.legend(loc="outside right upper", alignment="left")
    return figure


@styled
def fig11(grid: Sequence[MediumPanel]) -> Figure:
    """Recall of distinct tokens against the threshold, curves for the ratios in each column of eta_Z."""
    return _recall_grid(grid, across_rates=True)


@styled
def fig12(grid: Sequence[MediumPanel]) -> Figure:
    """Recall of distinct tokens against the threshold, curves for eta_Z in each column of the ratio."""
    return _recall_grid(grid, across_rates=False)


STAGES = ("at the start", "common tokens fall", "strong distinct tokens rise", "frozen")


@styled
def stages(run: SmallRun, n: int = 0) -> Figure:
    """The paper's schematic Fig. 2 with measured numbers: one class's attention at four times."""
    chosen = measures.nearest_records(run.record_steps, (0, 8, 16))
    figure, axes = style.panels(1, len(chosen), 3.0 * len(chosen), 2.9, sharey=True)
    own = np.flatnonzero(run.distinct[n] | run.common)
    colors = [COMMON if run.common[token] else BLUE for token in own]
    for i, (place, record) in enumerate(zip(axes[0], chosen, strict=True)):
        place.bar(np.arange(len(own)), _mean_association(run)[record, n, own], color=colors, width=0.82)
        name = STAGES[-1] if record == chosen[-1] else STAGES[min(i, 2)]
        place.set_title(f"step {int(run.record_steps[record])}\n{name}")
        middles = [float(np.flatnonzero(kind[own]).mean()) for kind in (run.common, run.distinct[n])]
        place.set_xticks(middles, ["common", "distinct"])
        place.tick_params(axis="x", length=0)
        place.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("attention $c_1$")
    return figure
