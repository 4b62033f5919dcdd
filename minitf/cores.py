"""How many cores this process has, among which XLA divides large operations; and equal shares."""

import math
import os

CACHE_BYTES = 2**20  # of one core, about: models that train side by side on a CPU stay within


def cores() -> int:
    """How many cores this process may use, which a scheduler or ``taskset`` can make fewer than there are."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def divisors(number: int) -> list[int]:
    """All divisors of a number from 1 on, in order."""
    small = [one for one in range(1, math.isqrt(number) + 1) if number % one == 0]
    return sorted({*small, *(number // one for one in small)})


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most ``most``, at least 1: how many fit, in equal shares."""
    return max((one for one in divisors(number) if one <= most), default=1)


def few_at_a_time(number: int, most: int) -> int:
    """How many at a time, at most ``most``: in equal shares, where those are not small: another size compiles.

    Where they would hold less than half as many as there is room for, ``most``: the last share is smaller.
    """
    equal = largest_divisor(number, most)
    return equal if 2 * equal >= min(most, number) else most
