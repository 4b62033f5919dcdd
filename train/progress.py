"""Progress for people, on standard error: a bar per stage in a terminal, else a line per stage, or nothing."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column

from minitf.train.loop import Report

SECONDS_BETWEEN_LINES = 60.0


class Progress:
    """A context in which stages show how far they are; silent when ``quiet``.

    In a terminal every stage has a bar, which stays when it is done; 80 columns are enough. Where lines cannot be
    drawn over (a file, a pipe), a stage has a line when it is done, and one a minute before. ``remaining`` shows
    how long a stage will take instead of how long it took.
    """

    def __init__(
        self,
        quiet: bool,
        *,
        remaining: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, quiet=quiet)
        self._clock = clock
        self._bars: Bars | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal and not quiet:
            self._bars = _bars(self._console, remaining)

    def __enter__(self) -> "Progress":
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def note(self, sentence: str) -> None:
        """A line of its own, above the bars."""
        self._console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(
        self, title: str, steps: int | None = None, *, first: int = 0, per_step: int = 1, unit: str = "steps/s"
    ) -> Iterator[Report]:
        """One stage; call the yielded function with the step and the loss, if the stage has any steps.

        When the step falls, a further program of the same stage has begun to count anew. ``first`` steps were
        taken before; speed is told in ``unit``, of which a step has ``per_step``.
        """
        state = _State(title, steps, self._clock, first, per_step, unit)
        bar = None if self._bars is None else self._bars.add_task(title, total=steps, state=state.short())
        lines = 0

        def report(step: int, loss: float) -> None:
            nonlocal lines
            state.update(step, loss)
            if self._bars is not None and bar is not None:
                self._bars.update(bar, completed=state.done, state=state.short())
            elif state.seconds >= (lines + 1) * SECONDS_BETWEEN_LINES:
                lines = int(state.seconds / SECONDS_BETWEEN_LINES)
                self.note(state.line())

        yield report
        if self._bars is not None and bar is not None:
            self._bars.update(bar, total=steps or 1, completed=steps or 1, state=state.short(finished=True))
        else:
            self.note(state.line(finished=True))


class _State:
    """How far a stage is."""

    def __init__(
        self,
        title: str,
        steps: int | None,
        clock: Callable[[], float],
        first: int = 0,
        per_step: int = 1,
        unit: str = "steps/s",
    ) -> None:
        self.title, self.steps, self.loss = title, steps, math.nan
        self._clock, self._began = clock, clock()
        self._base, self._last, self._before = 0, first, first
        self._per_step, self._unit = per_step, unit
        self._first: tuple[int, float] | None = None  # steps and seconds when the first chunk was done

    @property
    def done(self) -> int:
        return self._base + self._last

    @property
    def seconds(self) -> float:
        return self._clock() - self._began

    def update(self, step: int, loss: float) -> None:
        if step < self._last:
            self._base += self._last
        self._last, self.loss = step, loss
        self._first = self._first or (self.done, self.seconds)

    def _loss(self) -> str:
        return "" if math.isnan(self.loss) else f"loss {self.loss:.3g}"

    def _rate(self) -> str:
        # The first chunk took its time to compile; it counts only while there is no other.
        steps, since = self._first if self._first and self.done > self._first[0] else (self._before, 0.0)
        rate = self._per_step * (self.done - steps) / max(self.seconds - since, 1e-9)
        for size, mark in ((1e6, "M"), (1e4, "k")):
            if rate >= size and self._unit != "steps/s":
                return f"{rate / (1e3 if mark == 'k' else 1e6):.3g}{mark} {self._unit}"
        return f"{rate:.0f} {self._unit}" if rate >= 9.95 else f"{rate:.1f} {self._unit}"

    def short(self, finished: bool = False) -> str:
        """For beside the bar: 25 characters at most, loss and rate each in their place."""
        if self.done:
            return f"{self._loss():<13}{self._rate():>12}"
        return "compiling" if self.steps and not finished else ""

    def line(self, finished: bool = False) -> str:
        """For a line of its own."""
        far = "done" if finished or not self.steps else f"{min(self.done / self.steps, 1):.0%}"
        told = [f"{far} in {self.seconds:.0f} s", *([x for x in (self._loss(), self._rate()) if x and self.done])]
        return f"{self.title}: {', '.join(told)}"


def _bars(console: Console, remaining: bool) -> Bars:
    """Columns whose widths add up to 80 with the spaces between them."""
    column = Column(width=7, no_wrap=True)
    timed: ProgressColumn = TimeElapsedColumn(table_column=column)
    if remaining:
        timed = TimeRemainingColumn(elapsed_when_finished=True, table_column=column)
    return Bars(
        TextColumn("{task.description}", markup=False, table_column=Column(width=22, no_wrap=True)),
        BarColumn(bar_width=16, table_column=Column(width=16)),
        TaskProgressColumn(text_format_no_percentage="", table_column=Column(width=4, no_wrap=True)),
        TextColumn("{task.fields[state]}", markup=False, table_column=Column(width=25, no_wrap=True)),
        timed,
        console=console,
    )
