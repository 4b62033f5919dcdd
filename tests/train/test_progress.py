import io

import pytest
from rich.console import Console

from minitf.train.progress import Progress


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def shown(console):
    """The last picture of the bars: what stands on the screen at the end."""
    text = console.file.getvalue().split("\x1b[2K")[-1]
    return [line.rstrip() for line in text.replace("\x1b[?25h", "").splitlines() if line.strip()]


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_shows_title_percentage_loss_rate_and_time_in_full(width):
    console, clock = terminal(width), Clock()
    with (
        Progress(False, console=console, clock=clock) as progress,
        progress.stage("Syn-Small (Fig. 4, 5)", 200) as r,
    ):
        clock.now = 10.0
        r(120, 0.0000123456)
        clock.now = 14.0
        r(200, 0.00001)
    (line,) = shown(console)
    assert line.split() == [
        "Syn-Small",
        "(Fig.",
        "4,",
        "5)",
        "━" * 16,
        "100%",
        "loss",
        "1e-05",
        "20",
        "steps/s",
        "0:00:00",
    ]
    assert len(line) <= 78


def test_a_stage_without_steps_has_a_bar_that_fills_when_it_is_done():
    console = terminal()
    with Progress(False, console=console) as progress, progress.stage("theory"):
        pass
    (line,) = shown(console)
    assert line.split() == ["theory", "━" * 16, "100%", "0:00:00"]


def test_a_second_program_of_a_stage_goes_on_where_the_first_ended():
    console, clock = plain(), Clock()
    with Progress(False, console=console, clock=clock) as progress, progress.stage("Syn-Small", 200) as report:
        report(100, 1.0)
        report(50, 2.0)
        clock.now = 70.0
        report(80, 0.5)
    assert console.file.getvalue().splitlines()[0].startswith("Syn-Small: 90% in 70 s, loss 0.5, ")


def test_compiling_does_not_count_against_the_rate():
    console, clock = plain(), Clock()
    with Progress(False, console=console, clock=clock) as progress, progress.stage("a", 30) as report:
        clock.now = 20.0
        report(10, 1.0)
        clock.now = 22.0
        report(30, 1.0)
    assert console.file.getvalue() == "a: done in 22 s, loss 1, 10 steps/s\n"


def test_one_chunk_has_the_rate_of_all_its_time():
    console, clock = plain(), Clock()
    with Progress(False, console=console, clock=clock) as progress, progress.stage("a", 30) as report:
        clock.now = 20.0
        report(30, 1.0)
    assert console.file.getvalue() == "a: done in 20 s, loss 1, 1.5 steps/s\n"


def test_where_there_is_no_terminal_a_stage_has_one_line_and_one_a_minute_before():
    console, clock = plain(), Clock()
    with Progress(False, console=console, clock=clock) as progress, progress.stage("a", 100) as report:
        for second in range(1, 101):
            clock.now = second * 1.5
            report(second, 1.0)
    lines = console.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["a: 40% in 60 s", "a: 80% in 120 s", "a: done in 150 s"]
    assert "\x1b" not in console.file.getvalue()


def test_a_stage_that_fails_is_not_called_done():
    console = plain()
    with pytest.raises(KeyboardInterrupt), Progress(False, console=console) as progress, progress.stage("a", 10):
        raise KeyboardInterrupt
    assert console.file.getvalue() == ""


def test_quiet_prints_nothing(capfd):
    with Progress(True) as progress:
        progress.note("a note")
        with progress.stage("a", 10) as report:
            report(10, 1.0)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("console", [terminal(), plain()])
def test_a_title_is_text_and_never_markup(console):
    with Progress(False, console=console) as progress:
        with progress.stage("[red]x[/nope]"):
            pass
        progress.note("[bold]y")
    assert "[red]x[/nope]" in console.file.getvalue()
    assert "[bold]y" in console.file.getvalue()
