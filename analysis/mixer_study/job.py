"""The command ``minitf mixers``: every mixer on every task, a cell at a time, claims, and a report.

A cell is kept as soon as it is done, so an interrupted run goes on with the next one, and a finished one takes
more rows and tasks.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from minitf.analysis.claims import Claim, save_claims
from minitf.analysis.mixer_study import claims as study_claims
from minitf.analysis.mixer_study import tasks as study_tasks
from minitf.analysis.mixer_study.cell import Cell, train_cell
from minitf.analysis.mixer_study.page import page, results
from minitf.analysis.mixer_study.replaced import Replaced, replace_all
from minitf.analysis.mixer_study.rows import QUICK, ROWS, model_for, possible
from minitf.analysis.mixer_study.tasks import Task
from minitf.analysis.page_parts import script_json
from minitf.analysis.run_folder import (
    Problem,
    check_run_folder,
    open_run_folder,
    told_to_people,
    writing_results,
)
from minitf.analysis.stages import Stages, noticing_interrupts
from minitf.cores import cores
from minitf.files import write_atomically
from minitf.train import corpus
from minitf.train.loop import Report
from minitf.train.progress import Progress

ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
# What may change when a run goes on: which cells it makes, not what is in one.
FREE = ("mixers", "tasks", "rows")
TASKS = ("text", "classification", "recall", "addition", "memorisation")
ALL = "all"
RATES, QUICK_RATES = (3e-4, 1e-3, 3e-3), (1e-3,)
SEEDS, QUICK_SEEDS = 5, 3
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What to train.

    Attributes:
        full: every mixer, five seeds, three learning rates, long training; else a few, three seeds, one rate.
        mixers: names of rows, instead of the preset's; ``all`` for every one.
        tasks: names of tasks.
        seeds: how many, instead of the preset's.
        seed: the first one.
        steps: of training on every task, instead of the preset's.
        text: files or folders, instead of the documentation that comes with Python.
    """

    full: bool = False
    mixers: tuple[str, ...] = ()
    tasks: tuple[str, ...] = TASKS
    seeds: int | None = None
    seed: int = 0
    steps: int | None = None
    text: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, given, known in (("mixer", self.mixers, (*ROWS, ALL)), ("task", self.tasks, TASKS)):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise ValueError(f"there is no {what} {unknown[0]!r}; choose from: {'; '.join(known)}")
        for name in ("seeds", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**31 - MOST_SEEDS:
            raise ValueError(f"seed is {self.seed}; it must be at least 0, and below 2^31 - {MOST_SEEDS}")
        if (self.seeds or 0) > MOST_SEEDS:
            raise ValueError(f"seeds is {self.seeds}; it must be at most {MOST_SEEDS}")

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows that run; softmax attention always, which all are compared with."""
        chosen = self.mixers or ((ALL,) if self.full else QUICK)
        return tuple(name for name in ROWS if ALL in chosen or name in {"softmax", *chosen})

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of which each row has its best."""
        return RATES if self.full else QUICK_RATES

    @property
    def seed_count(self) -> int:
        """How many seeds run."""
        return self.seeds or (SEEDS if self.full else QUICK_SEEDS)

    def steps_of(self, task: Task) -> int:
        """At how many steps rows of equal size are compared."""
        return self.steps or (task.steps if self.full else task.quick_steps)


def run(
    config: StudyConfig, out: Path, *, overwrite: bool = False, resume: bool = False, quiet: bool = False
) -> list[Claim]:
    """Train and measure everything; write ``report.html``, ``mixers.json``, ``claims.json``; returns the claims.

    With ``resume`` the rows and tasks may be others than before: what the folder has of them is read, not made
    again, and all that it has is in the report.

    Raises:
        Problem: folder or text cannot be used; its message is for people.
        KeyboardInterrupt: interrupted; finished cells stay in ``out`` and ``resume`` goes on from there.
    """
    with Progress(quiet) as progress, noticing_interrupts() as interrupted:
        with progress.stage("tasks"), told_to_people():
            texts = corpus.read_paths(config.text) if config.text else corpus.python_documentation()
            recorded = {**_plain(config), **corpus.identity(texts)}
            # Told before the tasks are made, which takes a while; nothing is written before they are.
            check_run_folder(out, recorded, overwrite=overwrite, resume=resume, changed=FREE)
            every = study_tasks.every_task(texts)
            _check_possible(config, every, progress.note)
        folder = open_run_folder(out, recorded, overwrite=overwrite, resume=resume, changed=FREE)
        stages = Stages(folder / "arrays", progress, interrupted, config.seed)
        with writing_results(folder):
            wanted = _wanted(config, every, stages.arrays)
            rows = tuple(dict.fromkeys(row for row, _ in wanted))
            tasks = {name: every[name] for name in TASKS if ("softmax", name) in wanted}
            cells, replaced = _train(config, wanted, tasks, stages)
            claims = study_claims.claims(cells, replaced, tasks)
            shown = {**recorded, "mixers": rows, "tasks": tuple(tasks), "rows": rows}
            with progress.stage("report"):
                save_claims(folder / "claims.json", claims)
                found = json.loads(script_json(results(rows, cells, replaced, tasks)))
                write_atomically(folder / "mixers.json", (json.dumps(found, indent=1) + "\n").encode())
                write_atomically(folder / "report.html", page(found, cells, tasks, claims, shown).encode())
            return claims


def _check_possible(config: StudyConfig, tasks: Mapping[str, Task], say: Callable[[str], None]) -> None:
    """Tell which mixers that are asked for cannot do a task. Raises Problem for one that can do none of them."""
    for row in config.mixers:
        if row == ALL:
            continue
        cannot = [name for name in config.tasks if not possible(row, tasks[name])]
        told = f"{row} sees later tokens, and so the answers of {', '.join(cannot)}"
        if len(cannot) == len(config.tasks):
            raise Problem(f"{told}: choose other tasks for it")
        if cannot:
            say(f"{told}: it is not trained on that")


def _wanted(config: StudyConfig, tasks: Mapping[str, Task], arrays: Path) -> list[tuple[str, str]]:
    """Row and task of each cell that is asked for or was finished before; row by row, softmax attention first."""

    def asked(row: str, task: str) -> bool:
        return row in config.rows and task in config.tasks

    def there(row: str, task: str) -> bool:
        return asked(row, task) or (arrays / f"{_name(row, task)}.json").exists()

    # The others are compared with softmax attention.
    shown = [name for name in TASKS if there("softmax", name)]
    return [(row, name) for row in ROWS for name in shown if possible(row, tasks[name]) and there(row, name)]


def _train(
    config: StudyConfig, wanted: Sequence[tuple[str, str]], tasks: Mapping[str, Task], stages: Stages
) -> tuple[dict[tuple[str, str], Cell], dict[str, Replaced]]:
    """All cells, as many at a time as the machine has cores for."""
    cells: dict[tuple[str, str], Cell] = {}
    replaced: dict[str, Replaced] = {}
    with ThreadPoolExecutor(_at_once()) as threads:
        waiting = [threads.submit(_cell, config, row, tasks[name], stages) for row, name in wanted]
        try:
            for (row, name), one in zip(wanted, waiting, strict=True):
                found = one.result()
                cells[row, name] = found[0]
                if len(found) > 1:
                    replaced[name] = found[1]
        finally:
            for one in waiting:
                one.cancel()
    return cells, replaced


def _at_once() -> int:
    """One; or, on a CPU whose programs have one thread each, as many as there are cores.

    Programs that share XLA's pool can wait in it for one another, for ever (solves and FFTs do).
    """
    alone = ONE_THREAD in os.environ.get("XLA_FLAGS", "") and jax.default_backend() == "cpu"
    return min(cores(), 8) if alone else 1


def _cell(config: StudyConfig, row: str, task: Task, stages: Stages) -> Sequence[Any]:
    """The cell; of softmax attention also what its association is worth, replaced in the trained models."""
    name = _name(row, task.name)
    kinds: dict[str, type] = {name: Cell}
    if row == "softmax":
        kinds[f"{task.name}_replaced"] = Replaced
    stages.stop_if_interrupted()

    def make(report: Report) -> tuple[list[Any], list[Any]]:
        cell, parameters = train_cell(
            row,
            task,
            seeds=config.seed_count,
            rates=config.rates,
            steps=config.steps_of(task),
            seed=config.seed,
            report=report,
        )
        if row != "softmax":
            return [cell], []
        pause = stages.stop_if_interrupted
        return [cell, replace_all(parameters, model_for(row, task), task, config.seed, pause=pause)], []

    return stages.runs(kinds, f"{task.name}: {row}", make, steps=config.steps_of(task))


def _name(row: str, task: str) -> str:
    """Of a cell's files."""
    return f"{task}_{re.sub('[^a-zA-Z0-9]+', '-', row)}"


def _plain(config: StudyConfig) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        "rows": config.rows,
        "rates": config.rates,
        "seeds": config.seed_count,
    }
