"""How many cores this process has: XLA divides large operations among them."""

import os


def cores() -> int:
    """How many cores this process may use, which a scheduler or ``taskset`` can make fewer than there are."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1
