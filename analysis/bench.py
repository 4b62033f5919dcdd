"""Benchmarks: what is measured in turns, told as ratios of medians, printed as a table and kept as JSON."""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitf.analysis.run_folder import ANEW, writing_results
from minitf.files import write_atomically

Say = Callable[[str], None]  # progress, for people


@dataclass(frozen=True)
class Row:
    """One line of the table.

    ``ours`` and ``theirs`` are in ``unit``; ``ratio`` above 1 means that we are better than the peer. Without a
    peer (or when it is not installed, as ``note`` then says) ``theirs`` and ``ratio`` are None.
    """

    name: str
    peer: str
    ratio: float | None
    ours: float | None
    theirs: float | None
    unit: str
    rounds: int
    note: str


def throughput_row(
    name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], unit: str, note: str = ""
) -> Row:
    """Medians of what is better when larger, measured in turns; the ratio is the median of the rounds' ratios."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        name,
        peer,
        statistics.median(ratios),
        statistics.median(ours),
        statistics.median(theirs),
        unit,
        len(ours),
        note,
    )


def cost_row(
    name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], unit: str, note: str = ""
) -> Row:
    """Medians of what is better when smaller, measured in turns; the ratio is the median of theirs / ours."""
    row = throughput_row(name, peer, ours, theirs, unit, note)
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Row(**{**asdict(row), "ratio": ratio})


def value_row(name: str, values: Sequence[float], unit: str, note: str = "") -> Row:
    """The median of a quantity that has no peer."""
    return Row(name, "", None, statistics.median(values), None, unit, len(values), note)


def missing_row(name: str, peer: str, ours: Sequence[float], unit: str) -> Row:
    """A row whose peer is not installed."""
    note = f"{peer} is not installed; pip install 'minitf[peers]' to compare"
    return Row(name, peer, None, statistics.median(ours) if ours else None, None, unit, len(ours), note)


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int, say: Say) -> dict[str, list[float]]:
    """Measure every side once per round, in turns, so that a busy machine is busy for all of them alike.

    Raises ValueError when there is no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; it must be at least 1")
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds):
        # Every other round runs backwards: whoever comes first has no lasting advantage.
        for name in list(sides)[:: 1 if i % 2 == 0 else -1]:
            say(f"round {i + 1} of {rounds}: {name}")
            measured[name].append(sides[name]())
    return measured


def installed(module: str) -> bool:
    """Whether a peer is there, without importing it."""
    return importlib.util.find_spec(module) is not None


@dataclass(frozen=True)
class Device:
    """What is measured on: ``kind`` is cpu, gpu or tpu; ``name`` is its maker's."""

    kind: str
    name: str


def device() -> Device:
    """The one that JAX finds, asked in another process: this one takes none of its memory."""
    say = "print(json.dumps({'kind': jax.default_backend(), 'name': jax.devices()[0].device_kind}))"
    return Device(**measured_alone(f"import jax, json; {say}"))


class Worker:
    """A process that answers lines of JSON with lines of JSON; it stays alive between turns.

    Its arguments are the interpreter's: ``-m`` and a module, or a script. Raises RuntimeError when it ends instead
    of answering.
    """

    def __init__(
        self, *arguments: str, python: str = sys.executable, environment: Mapping[str, str] | None = None
    ) -> None:
        self._process = subprocess.Popen(
            [python, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        self.greeting: dict[str, Any] = self._read()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line, wait for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        # Libraries that a worker imports may print what they like; answers are objects.
        while text and not text.startswith("{"):
            text = self._process.stdout.readline()
        if not text:
            raise RuntimeError(f"the benchmark's worker process ended with {self._process.wait()}")
        return json.loads(text)


def measured_alone(code: str) -> dict[str, Any]:
    """Run Python code in a fresh process and parse the last line it prints as JSON.

    Raises RuntimeError with what it wrote to standard error when it fails.
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"a benchmark's process failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def as_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_table(rows: Sequence[Row]) -> Table:
    """The rows for people; notes stand below the table and are numbered in it."""
    notes = _notes(rows)
    caption = "\n".join(f"[{i}] {note}" for i, note in enumerate(notes, start=1))
    table = Table(
        title="A ratio above 1 means that minitf is better.",
        title_justify="left",
        caption=Text(caption),
        caption_justify="left",
    )
    table.add_column("what")
    table.add_column("against")
    for title in ("ratio", "ours", "theirs"):
        table.add_column(title, justify="right")
    table.add_column("unit")
    table.add_column("rounds", justify="right")
    for row in rows:
        numbers = [_short(x) for x in (row.ratio, row.ours, row.theirs)]
        what = f"{row.name} [{notes.index(row.note) + 1}]" if row.note else row.name
        table.add_row(Text(what), row.peer or "-", *numbers, row.unit, str(row.rounds))
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    """The different notes, in order."""
    return list(dict.fromkeys(row.note for row in rows if row.note))


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:,.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def run_benchmarks(
    names: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    quiet: bool = False,
    rounds: int = 3,
    pythons: Sequence[str] = (),
) -> list[Row]:
    """Run the benchmarks of these names (all, when none is given), print their table, write ``out/bench.json``.

    What is measured is written as it comes; stopped early, the table of it is printed all the same.

    ``pythons`` are interpreters of environments with further peers, such as another version of TransformerLens.
    Raises ValueError for an unknown name and for an interpreter that there is not or nothing uses, OSError for a
    folder that cannot be made, Problem for a full disk.
    """
    from minitf.analysis.fourbit.bench import bench_fourbit  # noqa: PLC0415 (they use this file)
    from minitf.analysis.mixer_bench import bench_mixers  # noqa: PLC0415
    from minitf.analysis.scan_snap.bench import bench_scan_snap  # noqa: PLC0415
    from minitf.analysis.train_bench.job import bench_train  # noqa: PLC0415
    from minitf.analysis.walk_bench.job import bench_walk  # noqa: PLC0415

    known: dict[str, Callable[..., Iterator[Row]]] = {
        "scan-snap": bench_scan_snap,
        "walk": partial(bench_walk, pythons=pythons),
        "mixers": bench_mixers,
        "train": bench_train,
        "fourbit": bench_fourbit,
    }
    for name in names:
        if name not in known:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    if pythons and "walk" not in (names or known):
        raise ValueError(f"pythons are for the benchmark walk, which is not among {', '.join(names)}")
    for python in pythons:
        if shutil.which(python) is None:
            raise ValueError(f"pythons: there is no program {python!r}; it must be an interpreter, by its path")
    # On a GPU several processes share its memory, and by itself JAX takes three quarters of it in each of them.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    out.mkdir(parents=True, exist_ok=True)  # an unwritable folder is told before minutes of measuring
    rows: list[Row] = []
    with ExitStack() as stack:
        say: Say = lambda sentence: None
        if not quiet:
            stack.callback(lambda: Console().print(as_table(rows)) if rows else None)
            shown = Console(stderr=True)
            # Into a file go lines; on a screen one line stands for what is being measured.
            line = partial(shown.print, markup=False, highlight=False, soft_wrap=True)
            say = stack.enter_context(shown.status("measuring")).update if shown.is_terminal else line
        for name in names or known:
            for row in known[name](seed=seed, rounds=rounds, say=say):
                rows.append(row)
                with writing_results(out, ANEW):
                    write_atomically(out / "bench.json", as_json(rows).encode())
    return rows
