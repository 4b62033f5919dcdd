"""Synthetic tasks by name, each a frozen dataclass of its settings; see :class:`Task`."""

import difflib
import typing
from collections.abc import Mapping
from typing import Any

from minitf.train.tasks.addition import Addition
from minitf.train.tasks.copy import Copy
from minitf.train.tasks.grammar import Grammar
from minitf.train.tasks.induction import Induction
from minitf.train.tasks.linear_regression import LinearRegression
from minitf.train.tasks.memorisation import Memorisation
from minitf.train.tasks.modular_addition import ModularAddition
from minitf.train.tasks.recall import Recall
from minitf.train.tasks.task import Objective, Task

__all__ = [
    "TASKS",
    "Addition",
    "Copy",
    "Grammar",
    "Induction",
    "LinearRegression",
    "Memorisation",
    "ModularAddition",
    "Objective",
    "Recall",
    "Task",
    "make",
]

TASKS: Mapping[str, Any] = {
    "modular-addition": ModularAddition,
    "copy": Copy,
    "induction": Induction,
    "recall": Recall,
    "linear-regression": LinearRegression,
    "grammar": Grammar,
    "addition": Addition,
    "memorisation": Memorisation,
}

_KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def make(name: str, settings: Mapping[str, Any]) -> Task:
    """The task of that name; settings left out have their defaults. A whole number will do for a real one.

    Raises ValueError for an unknown name or setting (saying the nearest that there is), a value of another type,
    and for what the task itself refuses.
    """
    if not name:
        raise ValueError(f"task.name is missing; the tasks are {', '.join(TASKS)}")
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}{_nearest(name, TASKS)}; the tasks are {', '.join(TASKS)}")
    kinds = typing.get_type_hints(TASKS[name])
    checked = {}
    for setting, value in settings.items():
        if setting not in kinds:
            raise ValueError(
                f"the task {name} has no setting {setting!r}{_nearest(setting, kinds)}; its settings are "
                f"{', '.join(kinds)}"
            )
        kind = kinds[setting]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"{setting} of the task {name} is {value!r}; it must be {_KINDS[kind]}")
        checked[setting] = kind(value)
    return TASKS[name](**checked)


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
