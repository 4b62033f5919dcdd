"""The report in a real browser, from disk, without a network."""

import pytest
from browsing import Opened
from report_example import example_claims, example_config, example_results, example_versions

from minitf.analysis.scan_snap import report as reports
from minitf.analysis.scan_snap import style


def one_for_all(folder, results, joma):
    """In place of figures, the first of them: all are drawn where figures are tested."""
    draw = reports.drawings(results, joma)
    return dict.fromkeys(draw, style.save_png(next(iter(draw.values()))(), folder / "figure.png"))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    arguments = (example_claims(), example_config(), example_versions())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reports, "save_figures", one_for_all)
        return reports.write_report(folder, example_results(), None, *arguments)


@pytest.fixture(scope="module")
def opened(browser, report):
    return Opened(browser, report.as_uri(), "#text-matrices .heatmaplayer")


@pytest.fixture
def page(opened, report):
    """The report as it opens; afterwards, nothing went wrong and nothing was asked of the network."""
    page = opened.page
    page.set_viewport_size({"width": 1200, "height": 900})
    for control in ("#small-run", "#small-class", "#text-run"):
        if page.input_value(control) != "0":
            page.select_option(control, index=0)
    set_time(page, 0)
    page.locator("#claim-search").fill("")
    page.locator(".filters button[data-filter=all]").click()
    yield page
    page.wait_for_timeout(50)
    assert opened.seen == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]
    loaded = page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []


def bars(page):
    """Heights of all bars as plotted, common tokens first."""
    return page.evaluate(
        "document.getElementById('attention-plot').data.filter(t => t.type === 'bar').map(t => Array.from(t.y))"
    )


def drawn(page):
    """The bars as the browser drew them."""
    return page.evaluate(
        "[...document.querySelectorAll('#attention-plot .bars path')].map(p => p.getAttribute('d'))"
    )


def set_time(page, record):
    page.locator("#small-time").fill(str(record))


def test_it_opens_from_disk_without_errors_or_requests(page):
    assert page.title().startswith("Scan and snap")
    assert page.locator("h1").is_visible()
    assert all(page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))


def test_the_slider_moves_the_picture(page):
    run = example_results().small[0]
    start, picture = bars(page), drawn(page)
    assert start[0] == pytest.approx([float(x) for x in run.probability[0, :10]], rel=1e-3)
    last = len(run.record_steps) - 1
    set_time(page, last)
    end = bars(page)
    expected = run.association[:, last].mean(axis=0)[0]
    # four significant digits are written
    assert end[0] == pytest.approx(expected[:10].tolist(), rel=1e-3)
    assert end[1] == pytest.approx(expected[10:20].tolist(), rel=1e-3)
    assert end[1][-1] > 2 * start[1][-1]
    assert drawn(page) != picture
    assert page.locator("#small-step").inner_text() == "100 of 100"
    cursor = page.evaluate("document.getElementById('curves-plot').layout.shapes[0].x0")
    assert cursor == 100
    set_time(page, 0)
    assert bars(page) == start


def test_the_slider_moves_by_keyboard(page):
    page.locator("#small-time").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#small-step").inner_text() == "2 of 100"


def test_playing_runs_through_time_and_stops_at_the_end(page):
    set_time(page, 48)
    page.locator("#small-play").click()
    assert page.locator("#small-play").inner_text() == "Pause"
    page.get_by_role("button", name="Play", exact=True).wait_for()
    assert page.locator("#small-step").inner_text() == "100 of 100"


def test_choosing_another_next_token_changes_the_picture(page):
    set_time(page, 50)
    first = bars(page)
    page.select_option("#small-class", label="n = 2")
    second = bars(page)
    assert first[2] == [0] * 10
    assert second[1] == [0] * 10
    assert sum(second[2]) > 0.1


def test_choosing_another_run_changes_the_picture(page):
    set_time(page, 50)
    before = bars(page)
    page.select_option("#small-run", index=1)
    run = example_results().small[1]
    assert bars(page) != before
    assert bars(page)[0] == pytest.approx(run.association[:, 50].mean(axis=0)[0, :10].tolist(), rel=1e-3)


def test_a_script_as_a_token_stays_text(page):
    page.locator("#text").scroll_into_view_if_needed()
    labels = page.locator("#text-matrices .ytick text").all_text_contents()
    assert any(label.startswith("␣<script>aler") for label in labels)
    assert any(label == "␣<b>empty</b>" for label in labels)
    assert any(label == "␣$x$" for label in labels)
    assert page.locator("#text-matrices b, #text-matrices script, .keys script, .claims script").count() == 0
    assert page.evaluate("window.hit") is None


def test_hovering_over_a_cell_names_both_tokens_as_text(page):
    tokens = example_results().text[0].snapshot_tokens
    place = next(i for i, token in enumerate(tokens) if "<b>" in token)
    holder = page.locator("#text-matrices .scroll > div").first
    holder.scroll_into_view_if_needed()
    box = holder.locator(".nsewdrag").bounding_box()
    cell = box["width"] / len(tokens)
    page.mouse.move(box["x"] + 0.5 * cell, box["y"] + (place + 0.5) * cell)
    label = holder.locator(".hoverlayer .hovertext")
    label.wait_for()
    text = label.text_content()
    assert "<b>empty</b>" in text
    assert f"({place + 1})" in text
    assert page.evaluate("window.hit") is None


def test_text_matrices_show_the_chosen_run(page):
    def last():
        return page.evaluate(
            "[...document.querySelectorAll('#text-matrices .scroll > div')].at(-1).data[0].z.at(-1).map(Number)"
        )

    assert page.locator("#text-matrices h4").all_inner_texts() == ["step 0", "step 50", "step 250", "step 999"]
    before = last()
    page.select_option("#text-run", index=1)
    expected = example_results().text[1].snapshot_pattern[-1, -1]
    assert last() == pytest.approx(expected.tolist(), rel=1e-3)
    assert last() != before


def test_claims_are_filtered_by_verdict_and_by_words(page):
    rows = page.locator(".claims > tbody > tr:visible")
    assert rows.count() == len(example_claims())
    page.locator(".filters button[data-filter=known]").click()
    assert rows.count() == 1
    assert "known not to reproduce" in rows.first.inner_text()
    page.locator(".filters button[data-filter=all]").click()
    page.locator("#claim-search").fill("published mean")
    assert page.locator("#claim-count").inner_text() == "1 of 5 claims shown"
    assert "does not hold" in rows.first.inner_text()


@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
