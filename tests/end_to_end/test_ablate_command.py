"""``minitf ablate`` as a user meets it, and its page in a real browser."""

import subprocess
import sys

import numpy as np
import pytest
from browsing import Opened
from walk_example import CONFIG, saved


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    here = tmp_path_factory.mktemp("ablate")
    tokens = np.random.default_rng(0).integers(CONFIG.vocabulary, size=200)
    (here / "tokens.txt").write_text(",".join(map(str, tokens)))
    options = ["--ids", "--length", "6", "--windows", "3", "--data", "4", "--out", here / "run"]
    command = [sys.executable, "-m", "minitf", "ablate", saved(here / "gpt2"), here / "tokens.txt", *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Report: {(here / 'run' / 'report.html').resolve()}\n"
    return here / "run"


def test_it_leaves_a_report_its_numbers_and_what_ran(out):
    assert {file.name for file in out.iterdir()} == {
        *("report.html", "ablate.json", "claims.json", "config.json", "arrays")
    }


def test_its_page_opens_without_errors_or_requests_and_the_choices_change_the_pictures(browser, out):
    opened = Opened(browser, (out / "report.html").as_uri(), "#curves .scatterlayer")
    page = opened.page
    curve = lambda: page.evaluate("document.getElementById('curves').data[0].y")
    heads = lambda: page.evaluate("document.getElementById('map').data[0].z")
    first, before = curve(), heads()
    page.select_option("#measure", "divergence")
    page.select_option("#replacement", "identity")
    assert curve() != first and heads() != before
    assert page.locator("#numbers tr").count() == 13
    assert opened.seen == [] and len(opened.requests) == 1
