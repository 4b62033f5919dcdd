import struct
import zlib

import matplotlib
import numpy as np
import pytest
from report_example import example_joma, example_results, medium_panel, text_run

from minitf.analysis.scan_snap import figures, figures_text, figures_theory, report, style, theory
from minitf.analysis.scan_snap.results import ScanSnapResults

JOMA = ("joma_fig2", "joma_fig3", "joma_fig4", "joma_theorems")
NAMES = [*sorted(report.drawings(example_results(), None)), *JOMA]


def pixels(png: bytes) -> np.ndarray:
    """Filtered scan lines of an 8-bit PNG, enough to see whether anything is drawn."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    place, data = 8, b""
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"IDAT":
            data += png[place + 8 : place + 8 + length]
        place += length + 12
    return np.frombuffer(zlib.decompress(data), np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_is_drawn_without_touching_matplotlibs_settings(name):
    before = dict(matplotlib.rcParams)
    joma = example_joma() if name.startswith("joma") else None
    figure = report.drawings(example_results(), joma)[name]()
    figure.set_layout_engine("none")  # which takes longer than all else; whole reports are laid out
    assert len(np.unique(pixels(style.png(figure)))) > 10
    assert dict(matplotlib.rcParams) == before


def test_pyplot_keeps_no_figure():
    figures.loss(example_results().small)
    assert "matplotlib.pyplot" not in __import__("sys").modules or not matplotlib._pylab_helpers.Gcf.figs


def test_figure_4_draws_the_mean_association_of_the_recorded_steps():
    run = example_results().small[0]
    figure = figures.fig4([run])
    image = figure.axes[0].images[0].get_array()
    assert np.asarray(image[0]) == pytest.approx(run.probability[0])
    assert np.asarray(image[-1]) == pytest.approx(run.association[:, -1, 0].mean(axis=0))
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == ["0", "2", "4", "6", "8", "10", "final (100)"]


def test_figure_6_shows_published_values_hollow_and_dashed_only_where_they_are_known():
    figure = figures.fig6([medium_panel(1), medium_panel(5)])
    dashed = [[line for line in axes.lines if line.get_linestyle() == "--"] for axes in figure.axes]
    assert [len(lines) for lines in dashed] == [4, 0]
    assert dashed[0][0].get_ydata() == pytest.approx([1.971, 2.007, 2.066, 2.092])
    assert dashed[0][0].get_markerfacecolor() == "white"


def test_snapping_time_is_marked_in_the_entropy_figure():
    sgd = figures.of_optimizer(example_results().small, "sgd")
    figure = figures.progress(sgd)
    dotted = {float(line.get_xdata()[0]) for line in figure.axes[0].lines if line.get_linestyle() == ":"}
    assert dotted == {theory.t0(2, 34, 1.0), theory.t0(2, 34, 10.0)}


def test_adam_runs_alone_and_single_seeds_and_single_panels_can_be_drawn():
    alone = example_results(1)
    adam = ScanSnapResults(small=tuple(figures.of_optimizer(alone.small, "adam")), medium=(medium_panel(3, 1),))
    drawings = report.drawings(adam, None)
    assert "fig4" not in drawings
    for name in ("fig5", "loss", "fig6", "fig11"):
        drawings[name]()


def test_tokens_with_dollar_signs_and_white_space_label_an_attention_matrix_literally():
    figure = figures_text.attention_matrices(text_run("x", "sgd", tokens=("$x$", " the", "\n", "\x00", "")))
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == [r"\$x\$", "␣the", "⏎", "�", "∅"]
    style.png(figure)


def test_a_sweep_of_learning_rates_is_drawn_as_figure_10():
    runs = [
        text_run(f"r{i}", "sgd").__class__(**{**vars(text_run("r", "sgd")), "learning_rate": float(i)})
        for i in (3, 1, 2)
    ]
    assert [r.learning_rate for r in figures_text.rate_sweep(runs)] == [1, 2, 3]
    assert figures_text.rate_sweep(runs[:2]) == []
    assert "fig10" in report.drawings(ScanSnapResults(text=tuple(runs)), None)


def test_theory_figures_mark_where_scanning_ends():
    curves = theory.theory_curves()
    lines = figures_theory.fig3(curves).axes[0].lines
    assert {float(x.get_xdata()[0]) for x in lines if len(x.get_xdata()) == 1} == set(curves.fig3_t0)


def test_a_png_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    data = style.save_png(figures.loss(example_results().small), path)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]
