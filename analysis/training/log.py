"""What was measured: lines of JSON for stretches of steps, and arrays; readable while a run goes on, and after it
died.

What a killed run did not finish is dropped when it goes on, and so is what belongs to steps that it takes again.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from minitf.files import write_atomically

STEPS_IN_A_LINE = 10


class Log:
    """A file of lines, each a JSON object with a ``step``; numbers that are not finite are null."""

    def __init__(self, file: Path, step: int, writes: bool = True) -> None:
        """Go on from ``step``: later lines are dropped, from the start all. Without ``writes`` it does nothing.

        Raises OSError.
        """
        self.file, self.writes = file, writes
        if not writes:
            return
        kept = [line for line in read(file) if line["step"] <= step] if step else []
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(_line(line) for line in kept)
        if not file.exists() or file.read_text("utf-8") != text:
            write_atomically(file, text.encode())

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append, and hand it to the operating system, which keeps it when the run is killed. Raises OSError."""
        if not self.writes:
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, lines)))


def read(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; none where there is no file."""
    if not file.exists():
        return []
    lines = []
    for line in file.read_text("utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    return lines


def lines_of(first: int, measures: dict[str, np.ndarray], done: int, skips: bool) -> Iterator[dict[str, Any]]:
    """Lines of the steps ``first`` to ``done``: means over ten steps each, of each model's ``[..., step]``.

    Where a run ``skips`` steps that are not finite, means are of the others, and how many were is told.
    """
    for start in range(first, done, STEPS_IN_A_LINE):
        end = min(start + STEPS_IN_A_LINE, done)
        some = {name: values[..., start - first : end - first] for name, values in measures.items()}
        lost = ~np.all([np.isfinite(values) for values in some.values()], axis=0)
        line = {"step": end, "steps": end - start}
        if skips and lost.any():
            line["skipped"] = np.sum(lost, axis=-1)
            some = {name: np.ma.masked_where(lost, values) for name, values in some.items()}
        yield line | {name: np.ma.filled(values.mean(axis=-1), np.nan) for name, values in some.items()}


def _line(values: dict[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in values.items()}) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if np.isfinite(value) else None
    return value


def statistics_in(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of statistics; none where there is no such file, or it is damaged."""
    try:
        arrays = safetensors.numpy.load_file(file)
    except (FileNotFoundError, safetensors.SafetensorError):
        return {}
    return arrays if "step" in arrays else {}


class Looks:
    """Statistics at some steps, as arrays ``[record, ...]`` in a file; those after ``step`` are dropped.

    Of a ``damaged`` file nothing is left, and those of later steps are kept anew: no run stops for them.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file, self.steps, self.found = file, [], []
        arrays = statistics_in(file) if step else {}
        self.damaged = bool(step) and file.exists() and not arrays
        if arrays:
            self.steps = [one for one in arrays.pop("step").tolist() if one <= step]
            self.found = [{name: x[place] for name, x in arrays.items()} for place in range(len(self.steps))]

    def add(self, step: int, found: dict[str, np.ndarray]) -> None:
        """Of one more step."""
        self.steps.append(step)
        self.found.append(found)

    def write(self) -> None:
        """All there are. Raises OSError."""
        if self.steps:
            arrays = {name: np.stack([one[name] for one in self.found]) for name in self.found[0]}
            arrays["step"] = np.array(self.steps)
            write_atomically(self.file, safetensors.numpy.save(arrays))
