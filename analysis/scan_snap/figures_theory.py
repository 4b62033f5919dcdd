"""The figures of theory alone: Scan and Snap's Fig. 3, 8, 9, and JoMA's small experiments."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minitf.analysis.scan_snap import style
from minitf.analysis.scan_snap.joma import INVARIANT_CASES, JomaResults
from minitf.analysis.scan_snap.style import BLUE, GREEN, INK, MARKERS, MUTED, NAMED, VERMILLION, styled
from minitf.analysis.scan_snap.theory import TheoryCurves


def _beside(axes: Axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


@styled
def fig3(curves: TheoryCurves) -> Figure:
    """Theorem 4's growth factor e^{2B} against time, and where scanning ends."""
    figure, axes = style.panels(1, 1, 7.4, 4.2)
    place = axes[0, 0]
    colors = style.ordered_colors(len(curves.fig3_eta_y))
    for i, (eta, color) in enumerate(zip(curves.fig3_eta_y, colors, strict=True)):
        place.plot(curves.fig3_time, curves.fig3_growth[i], color=color, label=rf"$\eta_Y$ = {eta:g}")
        height = np.interp(curves.fig3_t0[i], curves.fig3_time, curves.fig3_growth[i])
        place.plot([curves.fig3_t0[i]] * 2, [0, height], color=color, ls=":", lw=1.4)
        place.plot(curves.fig3_t0[i], height, MARKERS[i], color=color)
    place.plot([], [], color=MUTED, ls=":", marker="o", label="$t_0$: scanning ends")
    place.set_xlabel("time (steps)")
    place.set_ylabel("growth factor $e^{2B(t)}$")
    place.set_ylim(bottom=0)
    place.set_xlim(0, curves.fig3_time[-1])
    _beside(place)
    return figure


@styled
def fig8(curves: TheoryCurves) -> Figure:
    """Lemmas 5 to 7: h* (one point per visit) and its smooth form h (line)."""
    figure, axes = style.panels(1, 2, 11.2, 4.0)
    for panel, place in enumerate(axes[0]):
        colors = style.ordered_colors(curves.fig8_eta_y.shape[1])
        for i, (eta, color) in enumerate(zip(curves.fig8_eta_y[panel], colors, strict=True)):
            place.plot(curves.fig8_visits, curves.fig8_h[panel, i], color=color, lw=1.4)
            place.plot(
                curves.fig8_visits[::3],
                curves.fig8_h_star[panel, i, ::3],
                MARKERS[i % 6],
                mfc="none",
                color=color,
                ms=4,
                label=rf"$\eta_Y$ = {eta:g}",
            )
        place.set_title(f"M = {curves.fig8_vocabulary[panel]:g}")
        place.set_xlabel("visits of the class")
        place.set_ylim(bottom=0)
        place.legend(loc="lower right", ncols=2)
    axes[0, 0].set_ylabel("$h$ (line), $h^*$ (markers)")
    return figure


@styled
def fig9(curves: TheoryCurves) -> Figure:
    """Theorem 4's exponent B at a fixed ratio of the rates: faster is sparser, B(t_0) stays the same."""
    figure, axes = style.panels(1, 2, 11.2, 4.0)
    for panel, place in enumerate(axes[0]):
        for i, color in enumerate(style.ordered_colors(len(curves.fig9_eta_z))):
            times, b = curves.fig9_time[panel], curves.fig9_exponent[panel, i]
            place.plot(times, b, color=color, label=rf"$\eta_Z$ = {curves.fig9_eta_z[i]:g}")
            end = curves.fig9_t0[panel, i]
            if end <= times[-1]:
                place.plot(end, np.interp(end, times, b), MARKERS[i % 6], color=color)
        title = rf"$\eta_Y/\eta_Z$ = {curves.fig9_ratio[panel]:g}, M = {curves.fig9_vocabulary[panel]:g}"
        place.set_title(title)
        place.set_xlabel("time (steps); markers at $t_0$")
        place.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("exponent $B(t)$")
    _beside(axes[0, 1])
    return figure


VARIANTS = ("gaussian classes", "random classes")


@styled
def joma_fig2(results: JomaResults) -> Figure:
    """Correlation of the attention logits with JoMA's prediction and with each of its terms; the data above."""
    figure, axes = style.panels(2, 2, 10.6, 6.4, height_ratios=(1, 1.4))
    steps = np.arange(results.fig2_full.shape[-1])
    for variant, name in enumerate(VARIANTS):
        above, below = axes[:, variant]
        image = above.imshow(results.fig2_x[variant], aspect="auto", cmap=style.ATTENTION, vmin=0)
        above.set_title(f"{name}: token frequencies")
        above.set_xlabel("class")
        above.set_xticks(range(0, 20, 5))
        above.grid(False)
        lines = (
            ("both terms", results.fig2_full, BLUE, "-"),
            ("first term alone", results.fig2_first, VERMILLION, "--"),
            ("second term alone", results.fig2_second, GREEN, ":"),
        )
        for label, samples, color, look in lines:
            style.band(below, steps, samples[variant], color, label, ls=look)
        below.set_title(f"{name}: correlation of $z$ with")
        below.set_xlabel("step")
        below.set_ylim(-1.05, 1.05)
    axes[0, 0].set_ylabel("token")
    axes[1, 0].set_ylabel("Pearson correlation")
    axes[1, 1].legend(loc="lower right")
    figure.colorbar(image, ax=axes[0, :], label="frequency", pad=0.01)
    return figure


@styled
def joma_fig3(results: JomaResults) -> Figure:
    """V = U^T W before and after training, and four components of its first column over time."""
    figure, axes = style.panels(1, 3, 12.6, 3.9, width_ratios=(1, 1, 1.3))
    highest = float(np.abs(results.fig3_v_end).max())
    for place, values, title in zip(
        axes[0], (results.fig3_v_start, results.fig3_v_end), ("V at the start", "V at the end"), strict=False
    ):
        image = place.imshow(values, aspect="auto", cmap="PuOr_r", vmin=-highest, vmax=highest)
        place.set_title(title)
        place.set_xlabel("hidden unit")
        place.set_xticks(range(0, 20, 5))
        place.set_yticks(range(0, 21, 5))
        place.grid(False)
    axes[0, 0].set_ylabel("token (last: the query)")
    figure.colorbar(image, ax=axes[0, 1], label="weight")
    for i, component in enumerate(results.fig3_component.T):
        axes[0, 2].plot(component, color=NAMED[i], label=f"token {i}")
    axes[0, 2].set_title("components of $v_0$ over time")
    axes[0, 2].set_xlabel("step")
    axes[0, 2].legend()
    return figure


@styled
def joma_fig4(results: JomaResults) -> Figure:
    """Nonlinear units: strong components first, then the rest; so entropy falls, then rises."""
    figure, axes = style.panels(2, 2, 10.6, 6.2, sharex=True)
    steps = np.arange(results.fig4_entropy.shape[1])
    every = np.arange(results.fig4_v.shape[1]) * 100
    for variant, name in enumerate(("the authors' targets", "evenly spaced targets")):
        above, below = axes[:, variant]
        for i, color in enumerate(style.ordered_colors(results.fig4_mu.shape[1])):
            above.plot(every, results.fig4_v[variant, :, i], color=color, lw=1.4)
            above.plot(steps[-1], results.fig4_mu[variant, i], "<", color=color, ms=5, clip_on=False)
        above.set_title(name)
        entropy = results.fig4_entropy[variant]
        lowest = int(entropy.argmin())
        below.plot(steps, entropy, color=INK)
        below.plot(lowest, entropy[lowest], "o", color=VERMILLION)
        below.annotate(
            f"minimum {entropy[lowest]:.3f} at step {lowest}",
            (lowest, entropy[lowest]),
            xytext=(14, -4),
            textcoords="offset points",
            fontsize=9,
        )
        below.set_xlabel("step")
        below.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("components of $v$\n(arrows: targets $\\mu$)")
    axes[1, 0].set_ylabel("attention entropy (nats)")
    return figure


@styled
def joma_theorems(results: JomaResults) -> Figure:
    """Theorem 1's invariants, Theorem 2's winner, Theorem 4's order of the components."""
    figure, axes = style.panels(1, 3, 13.6, 4.6)
    first, second, third = axes[0]
    for i, case in enumerate(INVARIANT_CASES):
        mean = results.invariant_error[i].mean(axis=-1)
        look = "-" if mean[-1] < 0.1 else "--"
        first.plot(
            results.invariant_step, mean, look, marker=MARKERS[i % 6], color=(*NAMED, MUTED)[i], label=case.name
        )
    first.set_xscale("log")
    first.set_yscale("log")
    first.set_xticks(results.invariant_step, [f"{s:g}" for s in results.invariant_step])
    first.set_xticks([], minor=True)
    first.set_xlabel("step size of gradient descent")
    first.set_ylabel("relative error of the invariant")
    first.set_title("Theorem 1: invariants")
    first.legend(loc="upper left", bbox_to_anchor=(-0.2, -0.2), ncols=2, fontsize=8)
    colors = style.ordered_colors(len(results.winner_drive))
    for drive, v, color in zip(results.winner_drive, results.winner_v, colors, strict=True):
        second.plot(results.winner_time, v, color=color, label=rf"$\Delta$ = {drive:g}")
    blowup = np.sqrt(np.pi / 2) / np.abs(results.winner_drive).max()
    second.axvline(blowup, color=VERMILLION, ls=":", label="$t^*$, predicted")
    second.set_title("Theorem 2: winner takes all")
    second.set_xlabel("time")
    second.set_ylabel("$v$ of a linear unit")
    second.legend(loc="upper left")
    logs = results.salience_log
    for j in range(1, len(results.salience_mu)):
        limit = np.exp((results.salience_mu[j] ** 2 - results.salience_mu[0] ** 2) / 2)
        third.plot(
            results.salience_time,
            logs[j] / logs[0],
            color=NAMED[j - 1],
            label=rf"$\mu$ = {results.salience_mu[j]:g} over {results.salience_mu[0]:g}",
        )
        third.axhline(limit, color=NAMED[j - 1], ls=":")
    third.set_xscale("log")
    third.set_title("Theorem 4: salient components first")
    third.set_xlabel("time")
    third.set_ylabel(r"$\ln(1/\delta_j)\,/\,\ln(1/\delta_k)$ (dotted: limit)")
    third.legend(loc="center right", bbox_to_anchor=(1, 0.55))
    return figure
