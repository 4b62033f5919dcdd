"""Ending in order: a signal asks for it, and the training loop ends when what is under way is done and kept."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from minitf.analysis.run_folder import Problem


class Terminated(Problem):
    """SIGTERM: everything is kept."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def noticing_signals() -> Iterator[Callable[[], int | None]]:
    """The signal that asked to end, or None: SIGTERM, or Ctrl-C, which pressed again ends at once.

    In other threads than the main one, and where a signal has another handler already, nothing is changed.
    """
    asked: int | None = None

    def notice(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked == signal.SIGINT == number:
            raise KeyboardInterrupt
        asked = number

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [
            number
            for number, handler in usual.items()
            if signal.getsignal(number) is handler or signal.getsignal(number) == handler
        ]
    before = {number: signal.signal(number, notice) for number in ours}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
