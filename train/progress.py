"""Progress for people: one bar per stage with its loss and rate, on standard error, or nothing."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from minitf.train.loop import Report


class Progress:
    """A context in which stages show a bar; silent when ``quiet``. Lines remain after a stage is done."""

    def __init__(self, quiet: bool) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=quiet),
            disable=quiet,
        )

    def __enter__(self) -> "Progress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def stage(self, title: str, steps: int = 1) -> Iterator[Report]:
        """One stage; call the yielded function with the step and the loss."""
        bar = self._bars.add_task(title, total=steps, state="")
        began, base, last = time.monotonic(), 0, 0

        def report(step: int, loss: float) -> None:
            nonlocal base, last
            if step < last:  # a further program of the same stage starts counting anew
                base += last
            last = step
            done, seconds = base + step, time.monotonic() - began
            shown = f"loss {loss:.4g}  " if not math.isnan(loss) else ""
            self._bars.update(bar, completed=done, state=f"{shown}{done / max(seconds, 1e-9):.0f} steps/s")

        yield report
        self._bars.update(bar, completed=steps)
