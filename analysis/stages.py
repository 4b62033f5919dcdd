"""The stages of a run: each is computed, or read if an earlier run finished it; Ctrl-C keeps what is finished."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from safetensors import SafetensorError

from minitf.analysis.arrays import load_run, save_run
from minitf.analysis.claims import Claim, as_json, claim
from minitf.analysis.run_folder import Diverged
from minitf.files import write_atomically
from minitf.train.loop import History, Report
from minitf.train.progress import Progress


class Stages:
    """The stages of one run folder: each is computed, or read if an earlier run finished it."""

    def __init__(self, arrays: Path, progress: Progress, interrupted: Callable[[], bool], first_seed: int) -> None:
        self.arrays, self.progress, self.interrupted, self.first_seed = arrays, progress, interrupted, first_seed

    def claims(self, name: str, title: str, make: Callable[[], list[Claim]]) -> list[Claim]:
        """A stage that yields claims."""
        file = self.arrays / f"{name}.claims.json"
        kept = self._kept(title, [file], lambda: read_claims(file))
        if kept is not None:
            return kept
        with self.progress.stage(title):
            try:
                made = make()
            except Exception as error:
                if self.interrupted():  # what failed had been left without its numbers
                    raise KeyboardInterrupt from error
                raise
            if self.interrupted():
                raise KeyboardInterrupt
        write_atomically(file, as_json(made).encode())
        return read_claims(file)

    def runs(
        self,
        kinds: Mapping[str, type],
        title: str,
        make: Callable[[Report], tuple[Sequence[Any], Sequence[History]]],
        *,
        steps: int | None = None,
        rates: Sequence[Sequence[str]] = (),
    ) -> list[Any]:
        """A stage that yields arrays: a dataclass of each of ``kinds``, kept under its name.

        ``make`` takes the progress report and returns the runs and the histories of the programs that trained
        them; ``rates`` says, per program, what the learning rates of its runs are, for people.
        """
        files = [self.arrays / f"{name}{ending}" for name in kinds for ending in (".json", ".safetensors")]
        read = lambda: [load_run(self.arrays, name, kind) for name, kind in kinds.items()]
        kept = self._kept(title, files, read)
        if kept is not None:
            return kept
        with self.progress.stage(title, steps) as report:
            made, histories = make(self._stoppable(report))
            diverged = [bool(np.any(history.diverged >= 0)) for history in histories]
            finished = all(history.finished for history in histories) and not self.interrupted()
            partial = "" if finished and not any(diverged) else ".partial"
            for name, run in zip(kinds, made, strict=True):
                save_run(self.arrays, name + partial, run)
            if any(diverged):
                i = diverged.index(True)
                raise Diverged(self._divergence(title, histories[i].diverged, rates[i]))
            if not finished:
                raise KeyboardInterrupt
        for file in files:
            file.with_name(f"{file.stem}.partial{file.suffix}").unlink(missing_ok=True)
        return read()

    def _kept(self, title: str, files: Sequence[Path], read: Callable[[], list[Any]]) -> list[Any] | None:
        """What an earlier run left of a stage; None when it did not finish it, or when a file is damaged."""
        if not all(file.exists() for file in files):
            return None
        try:
            kept = read()
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            names = ", ".join(file.name for file in files)
            self.progress.note(
                f"{title}: a file of {self.arrays} is damaged ({names}: {error}); it is made again."
            )
            return None
        self.progress.note(f"{title}: finished before")
        return kept

    def _stoppable(self, report: Report) -> Report:
        """The loop ends in order on Ctrl-C; so must the next loop of the same stage."""

        def report_or_stop(step: int, loss: float) -> None:
            report(step, loss)
            self.stop_if_interrupted()

        return report_or_stop

    def stop_if_interrupted(self) -> None:
        """For long work without a report of its own, and for threads, which Ctrl-C does not reach."""
        if self.interrupted():
            raise KeyboardInterrupt

    def _divergence(self, title: str, diverged: np.ndarray, rates: Sequence[str]) -> str:
        step = int(diverged[diverged >= 0].min())
        seed, rate = (int(i) for i in np.argwhere(diverged == step)[0])
        return (
            f"{title}: the loss stopped being finite at step {step} ({rates[rate]}, seed "
            f"{self.first_seed + seed}). Choose a smaller learning rate. What was measured until then is in "
            f"{self.arrays}, in the files named .partial."
        )


@contextmanager
def noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed: also where the training loop took it for a wish to end, or it was lost in a
    callback, where Python drops exceptions (and would print their stack trace).
    """
    pressed = False
    tell = sys.unraisablehook

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    def dropped(what: "sys.UnraisableHookArgs") -> None:
        if what.exc_type is not KeyboardInterrupt:
            tell(what)

    # Not ours to change: another handler, or a thread.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, notice)
        sys.unraisablehook = dropped
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = tell


def read_claims(file: Path) -> list[Claim]:
    """Claims that :func:`minitf.analysis.claims.as_json` wrote. Raises ValueError, TypeError or KeyError."""
    rows = json.loads(file.read_bytes())
    if not isinstance(rows, list):
        raise ValueError("claims are a list")
    return [_claim_from(row) for row in rows]


def _claim_from(row: dict[str, Any]) -> Claim:
    fields = {k: v for k, v in row.items() if k not in ("id", "statement", "holds")}
    fields["value"] = np.array(fields["value"], np.float64)  # null, a value that is not finite, becomes NaN
    return claim(row["id"], row["statement"], **fields)
