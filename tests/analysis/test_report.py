import html
import html.parser
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_example import example_claims, example_config, example_results, example_versions, medium_panel

from minitf.analysis import page_parts
from minitf.analysis.claims import claim
from minitf.analysis.scan_snap import report, report_data
from minitf.analysis.scan_snap.results import ScanSnapResults


class Reader(html.parser.HTMLParser):
    """What a page refers to, and the content of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.references += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data") and v]
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = self._inside and tag != "script"

    def handle_data(self, data):
        if self._inside:
            self.scripts[-1] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def page():
    pictures = {name: b"\x89PNG\r\n\x1a\n" + bytes(16) for name in ("fig4", "fig6", "joma_fig4")}
    return report.page(example_results(), pictures, example_claims(), example_config(), example_versions())


@pytest.fixture(scope="module")
def read(page):
    return Reader(page)


def test_the_page_refers_to_nothing_outside_itself(read):
    assert read.references
    assert all(r.startswith(("#", "data:")) for r in read.references)


def test_the_page_runs_exactly_the_scripts_whose_hashes_it_names(page, read):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1))
    allowed = re.search(r"script-src ([^;]*);", policy).group(1)
    assert "default-src 'none'" in policy
    assert "unsafe" not in allowed
    assert allowed.split() == [page_parts.script_hash(s) for s in (read.scripts[2], read.scripts[1])]


def test_markup_in_data_is_text(page, read):
    assert "<script>alert(1)" not in page
    assert "<b>corpus</b>" not in page
    assert any("<script>window.hit = 1</script> stays text." in t for t in read.text)
    data = json.loads(read.scripts[0])
    assert "<script>alert(1)</script>" in " ".join(data["text"][0]["full"])


def test_parts_without_results_are_left_out():
    bare = report.page(ScanSnapResults(), {}, [], {}, {})
    assert "plotly" not in bare
    for part in ("watch", "rates", "text", "joma", "claims"):
        assert f'id="{part}"' not in bare
        assert f'href="#{part}"' not in bare
    assert 'id="idea"' in bare
    assert "All cells as a table" in report.page(ScanSnapResults(medium=(medium_panel(3),)), {}, [], {}, {})


def test_every_link_of_the_contents_leads_somewhere(page, read):
    for target in (r[1:] for r in read.references if r.startswith("#")):
        assert f'id="{target}"' in page


@given(
    st.recursive(
        st.text() | st.floats() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_embedded_json_cannot_end_its_script_and_says_the_same(data):
    text = page_parts.script_json(data)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == page_parts._finite(data, page_parts.DIGITS)


def test_numbers_that_are_not_finite_become_null():
    assert page_parts.script_json({"x": np.array([1.0, np.nan, -np.inf])}) == '{"x":[1.0,null,null]}'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.148, "0.148"),
        (-1.5, "−1.5"),
        (4.819e-5, "4.819\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10⁻⁵"),
        (1234567.0, "1.235\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}10⁶"),
        (np.nan, "not finite"),
    ],
)
def test_numbers_are_written_for_people(value, text):
    assert report_data.number(value) == text


def test_each_claim_has_the_verdict_of_its_numbers():
    rows = [report_data.claim_row(c) for c in example_claims()]
    assert [r["verdict"] for r in rows] == ["holds", "holds", "fails", "known", "surprise"]
    assert report_data.claim_counts(rows) == {"holds": 2, "fails": 1, "known": 1, "surprise": 1}
    assert rows[1]["limit"] == "> 0"
    assert rows[1]["interval"] == "[0.14, 0.156]"
    assert rows[2]["measured"] == "−0.03 to 0.06 (32 values)"
    assert len(rows[2]["each"]) == 32


@pytest.mark.parametrize(
    ("direction", "threshold", "limit", "each"),
    [
        ("<", 3.0, "< 3", ["< 3", "< 3"]),
        ("==", (1.0, 2.0), "2 limits, see the list", ["exactly 1", "exactly 2"]),
        ("within", (0.0, 5.0), "0 to 5", ["0 to 5", "0 to 5"]),
        ("within", ((0.0, 5.0), (1.0, 6.0)), "2 limits, see the list", ["0 to 5", "1 to 6"]),
    ],
)
def test_a_list_of_values_is_shown_with_the_limit_of_each(direction, threshold, limit, each):
    one = claim("a", "b", source="c", statistic="d", value=[1, 2], direction=direction, threshold=threshold)
    row = report_data.claim_row(one)
    assert row["limit"] == limit
    assert [e["limit"] for e in row["each"]] == each


def test_nested_settings_become_dotted_rows():
    assert report_data.flat({"a": {"b": 1, "c": {}}, "d": "x"}) == [("a.b", "1"), ("a.c", "{}"), ("d", "x")]


def test_cells_of_figure_6_stand_beside_published_ones():
    rows = report_data.fig6_rows([medium_panel(1), medium_panel(5)])
    assert len(rows) == 32
    assert rows[0]["published"] == "1.971 ± 0.028"
    assert rows[-1]["published"] == ""
    panel = medium_panel(3)
    shifted = type(panel)(**{**vars(panel), "entropy": panel.entropy * 0 + 1})
    differences = report_data.reference.published_panel(3, 6).mean - 1
    expected = f"{np.sqrt(np.mean(differences**2)):.3f}"
    assert report_data.fig6_difference([shifted]) == {"rms": expected, "cells": "16"}
    assert report_data.fig6_difference([medium_panel(5)]) is None


def test_the_report_and_its_figures_are_written_into_the_folder(tmp_path):
    results = ScanSnapResults(medium=(medium_panel(3),))
    path = report.write_report(tmp_path / "run", results, None, [], {}, {})
    assert path == tmp_path / "run" / "report.html"
    names = {p.name for p in (tmp_path / "run" / "figures").iterdir()}
    assert names == {f"fig{i}.png" for i in (3, 6, 8, 9, 11, 12)}
    assert path.read_text().count("data:image/png;base64,") == len(names)
