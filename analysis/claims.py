"""Claims: statements of a paper beside what was measured, with a verdict that the numbers decide.

A claim is data. Nobody writes its verdict: ``holds`` follows from value, direction and threshold, and a claim
whose verdict contradicts its numbers cannot be built.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy import special

from minitf.files import write_atomically

Direction = Literal["<", ">", "within", "=="]
Value = float | tuple[float, ...]
Interval = tuple[float, float]
Threshold = float | tuple[float, ...] | tuple[Interval, ...]
Numbers = float | int | Sequence[Any] | np.ndarray | np.floating


def _frozen(numbers: Numbers) -> Any:
    """Numbers of any container as plain floats in tuples."""
    array = np.asarray(numbers, dtype=np.float64) + 0.0  # nothing has no sign
    if array.ndim == 0:
        return float(array)
    if array.ndim == 1:
        return tuple(float(x) for x in array)
    return tuple(tuple(float(x) for x in row) for row in array)


def verdict(value: Numbers, threshold: Numbers, direction: str) -> bool:
    """Whether every value meets the threshold.

    ``<`` and ``>`` are strict and ``==`` is exact; their threshold is one number for all values, or one per
    value. ``within`` takes an interval ``[low, high]``, ends included, or one interval per value. A value
    that is not finite meets nothing.

    Raises ValueError for an unknown direction and for a threshold that is not finite or has another shape.
    """
    values, limits = np.asarray(value, np.float64), np.asarray(threshold, np.float64)
    if direction not in get_args(Direction):
        raise ValueError(f"direction is {direction!r}; it must be one of {', '.join(get_args(Direction))}")
    if values.ndim > 1 or values.size == 0:
        raise ValueError(f"value has shape {values.shape}; a claim's value is a number or a list of numbers")
    per_value: tuple[int, ...] = (2,) if direction == "within" else ()
    if limits.shape not in (per_value, values.shape + per_value):
        raise ValueError(
            f"threshold has shape {limits.shape} for a value of shape {values.shape} and direction "
            f"{direction!r}; it must be {per_value} or {values.shape + per_value}"
        )
    if not np.all(np.isfinite(limits)):
        raise ValueError(f"threshold {threshold} is not finite; nothing could be compared with it")
    if not np.all(np.isfinite(values)):
        return False
    if direction == "within":
        return bool(np.all((limits[..., 0] <= values) & (values <= limits[..., 1])))
    comparison = {"<": np.less, ">": np.greater, "==": np.equal}[direction]
    return bool(np.all(comparison(values, limits)))


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement with its measured value and verdict; make it with :func:`claim`.

    ``value`` is a number or several, ``statistic`` says what they are, ``n`` counts the independent samples
    (seeds, or 1 for a deterministic computation), ``ci95`` is the interval of the mean over them, if any.
    ``expected`` is False for a claim that is known not to reproduce. Raises ValueError when ``holds`` is not
    what the numbers say.
    """

    id: str
    statement: str
    source: str
    statistic: str
    value: Value
    threshold: Threshold
    direction: Direction
    holds: bool
    n: int
    ci95: Interval | tuple[Interval, ...] | None
    note: str
    expected: bool = True

    def __post_init__(self) -> None:
        if self.holds != verdict(self.value, self.threshold, self.direction):
            raise ValueError(
                f"claim {self.id} says holds={self.holds}, but {self.value} {self.direction} "
                f"{self.threshold} is {not self.holds}; the verdict must follow from the numbers"
            )
        if self.n < 1:
            raise ValueError(f"claim {self.id} has n={self.n}; a claim rests on at least one sample")


def claim(
    id: str,
    statement: str,
    *,
    source: str,
    statistic: str,
    value: Numbers,
    direction: Direction,
    threshold: Numbers,
    n: int = 1,
    ci95: Numbers | None = None,
    note: str = "",
    expected: bool = True,
) -> Claim:
    """A claim whose verdict is decided from value, direction and threshold (see :func:`verdict`)."""
    return Claim(
        id=id,
        statement=statement,
        source=source,
        statistic=statistic,
        value=_frozen(value),
        threshold=_frozen(threshold),
        direction=direction,
        holds=verdict(value, threshold, direction),
        n=int(n),
        ci95=None if ci95 is None else _frozen(ci95),
        note=note,
        expected=expected,
    )


def mean_ci95(samples: Sequence[float] | np.ndarray) -> tuple[float, Interval | None]:
    """The mean of independent samples and its 95 % interval by Student's t.

    One sample has a mean and no interval (None). Raises ValueError for no sample at all.
    """
    x = np.asarray(samples, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"samples have shape {x.shape}; a non-empty list of numbers is needed")
    mean = float(x.mean())
    if x.size == 1:
        return mean, None
    half = float(special.stdtrit(x.size - 1, 0.975) * x.std(ddof=1) / math.sqrt(x.size))
    return mean, (mean - half, mean + half)


def is_settled(one: Claim) -> bool:
    """Whether everything in the interval of a claim's value meets the threshold, or nothing: of several, each.

    What has no interval is what it is.
    """
    if one.ci95 is None:
        return True
    values = np.atleast_1d(one.value)
    intervals = np.reshape(one.ci95, (len(values), 2))
    limits = np.broadcast_to(one.threshold, (len(values), 2) if one.direction == "within" else (len(values),))
    ends = zip(values, intervals, limits, strict=True)
    return all(
        verdict(value, limit, one.direction)
        == verdict(low, limit, one.direction)
        == verdict(high, limit, one.direction)
        for value, (low, high), limit in ends
    )


def unmet(claims: Iterable[Claim]) -> list[Claim]:
    """The claims that were expected to hold and do not."""
    return [c for c in claims if c.expected and not c.holds]


def surprises(claims: Iterable[Claim]) -> list[Claim]:
    """The claims that were expected to fail and hold."""
    return [c for c in claims if not c.expected and c.holds]


def _strict(item: object) -> object:
    """For strict JSON: tuples become lists, and numbers that are not finite become null."""
    if isinstance(item, tuple):
        return [_strict(x) for x in item]
    if isinstance(item, float) and not math.isfinite(item):
        return None
    return item


def as_json(claims: Iterable[Claim]) -> str:
    """The claims as a strict JSON list of objects, one per claim, keys in the order of :class:`Claim`."""
    rows = [{k: _strict(v) for k, v in vars(c).items()} for c in claims]
    return json.dumps(rows, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def save_claims(path: str | Path, claims: Iterable[Claim]) -> None:
    """Write ``claims.json`` in one go: a reader sees the old file or the whole new one.

    Raises ValueError when two claims share an id, OSError when the folder cannot be written.
    """
    claims = list(claims)
    ids = [c.id for c in claims]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise ValueError(f"the claim ids {', '.join(twice)} occur more than once; each claim needs its own")
    write_atomically(Path(path), as_json(claims).encode())
