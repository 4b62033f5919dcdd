"""``minitf walk`` as a user meets it, and its page in a real browser."""

import subprocess
import sys

import numpy as np
import pytest
from browsing import Opened
from walk_example import EvilTokenizer, model, saved

from minitf.analysis.walk_report import job, page
from minitf.analysis.walk_report.data import both_sides


def minitf(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "minitf", "walk", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model") / "gpt2")


def test_the_generated_text_alone_goes_to_standard_output(folder, tmp_path):
    done = minitf(folder, "3 1 4", "--ids", "--generate", 5, "--ablate", "0.1", "1.0", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    ids = done.stdout.split()
    assert ids[:3] == ["3", "1", "4"] and len(ids) == 8
    assert done.stderr.strip() == f"Report: {(tmp_path / 'a' / 'report.html').resolve()}"
    again = minitf(folder, "3 1 4", "--ids", "--out", tmp_path / "a")
    assert again.returncode == 2 and "--overwrite" in again.stderr and not again.stdout


def test_a_model_that_is_not_there_is_told_without_a_stack_trace(tmp_path):
    done = minitf(tmp_path / "nothing", "text", "--out", tmp_path / "a")
    assert done.returncode == 2 and done.stderr.startswith("minitf: there is no file or folder")
    assert "Traceback" not in done.stderr and not (tmp_path / "a").exists()


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """A page of evil tokens, before and after an edit."""
    evil = model(EvilTokenizer())
    config = job.WalkConfig("m", "eight ..", ablate=("0.1",))
    tokens = np.array(evil.tokenizer.encode(config.text), np.int32)
    data = both_sides(evil, tokens, job.edit_of(config, evil), prompt=6)
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page.page(data, evil, "m", ["head 0.1 left out"]), encoding="utf-8")
    return Opened(browser, file.as_uri(), "[data-plot=neurons] .barlayer")


def plotted(opened, kind, side, what):
    return opened.page.evaluate(
        f"JSON.stringify(document.querySelectorAll('[data-plot={kind}] .js-plotly-plot')[{side}].{what})"
    )


def test_choosing_a_token_a_head_and_a_layer_changes_the_pictures(opened):
    map_of = lambda side: plotted(opened, "map", side, "data[0].x")
    before = map_of(0), plotted(opened, "parts", 0, "data[0].y"), opened.page.inner_text("[data-table=lens]")
    opened.page.click("#tokens button >> nth=2")
    after = map_of(0), plotted(opened, "parts", 0, "data[0].y"), opened.page.inner_text("[data-table=lens]")
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert opened.page.get_attribute("#tokens button >> nth=2", "aria-pressed") == "true"
    pattern = plotted(opened, "pattern", 0, "data[0].z")
    opened.page.select_option("#head", "2")
    another = plotted(opened, "pattern", 0, "data[0].z")
    opened.page.select_option("#layer", "0")
    assert len({pattern, another, plotted(opened, "pattern", 0, "data[0].z")}) == 3


def test_both_sides_are_drawn_and_differ(opened):
    heads = [plotted(opened, "heads", side, "data[0].z") for side in (0, 1)]
    assert heads[0] != heads[1]


def test_a_walk_can_be_seen_in_three_dimensions(opened):
    opened.page.select_option("#dimensions", "3")
    assert plotted(opened, "map", 0, "data[0].type") == '"scatter3d"'
    opened.page.select_option("#dimensions", "2")


def test_evil_tokens_stay_text_and_nothing_goes_wrong(opened):
    assert opened.page.inner_text("#tokens button >> nth=0") == "<script>alert(1)</script>"
    assert opened.page.locator("main b, main script").count() == 0
    # Warnings are the drawing library's advice to itself on speed.
    assert not [line for line in opened.seen if not line.startswith("console warning")]
    assert all(address.startswith(("file:", "data:", "blob:")) for address in opened.requests)
