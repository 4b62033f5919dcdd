"""``minitf mixers`` as a user meets it, and its page in a real browser."""

import subprocess
import sys

import pytest
from browsing import Opened


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    here = tmp_path_factory.mktemp("mixers")
    options = ["--mixers", "FNet", "--tasks", "memorisation", "--seeds", "1", "--steps", "3"]
    asked = "\n\n".join(f"What is association {i} for? <b>Ask</b> what a task loses." * 3 for i in range(60))
    (here / "text.txt").write_text(asked)
    files = ["--text", here / "text.txt", "--out", here / "run"]
    command = [sys.executable, "-m", "minitf", "mixers", *files, *options]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"Report: {(here / 'run' / 'report.html').resolve()}\n")
    return here / "run"


def test_it_leaves_a_report_its_numbers_and_claims(out):
    names = {file.name for file in out.iterdir()}
    assert names == {"report.html", "mixers.json", "claims.json", "config.json", "arrays"}


def test_its_page_opens_without_errors_or_requests_and_the_choices_change_the_pictures(browser, out):
    opened = Opened(browser, (out / "report.html").as_uri(), "#plot .scatterlayer")
    page = opened.page
    assert page.locator("#table tbody tr").count() == 2
    assert page.locator("#pictures canvas").count() == 2
    picture = lambda: page.evaluate("document.querySelectorAll('#pictures canvas')[0].toDataURL()")
    curve = lambda: page.evaluate("document.getElementById('plot').data[1].x")
    frozen = lambda: page.evaluate("document.getElementById('frozen').data.map((trace) => trace.y)")
    moves = lambda: page.evaluate("document.getElementById('moves').data[0].y")
    before = picture(), curve(), moves()
    assert len(frozen()) == 12
    page.select_option("#head", "2")
    page.select_option("#axis", "compute")
    page.select_option("#which", "3")
    assert picture() != before[0] and curve() != before[1] and moves() != before[2]
    page.locator("#pictures canvas").first.hover()
    assert "query" in page.locator("#told").inner_text()
    assert opened.seen == [] and len(opened.requests) == 1
