"""The words of a command line in the order in which the parser understands them as people do."""

import collections
import dataclasses
import itertools
import re
from typing import Any

# GROUP.FIELD=VALUE
SETTING = re.compile(r"[a-z_]+(\.[a-z0-9_]+)+=")
# As other programs have it: --GROUP.FIELD VALUE
DASHED = re.compile(r"--([a-z_]+(?:\.[a-z0-9_]+)+)(?:=(.*))?", re.DOTALL)


def in_order(words: list[str], command: Any) -> list[str]:
    """The words behind a command's name; ``command`` is the dataclass of its options.

    Raises ValueError where a setting is written as an option.
    """
    fields = {field.name: field.default for field in dataclasses.fields(command)}
    flags = {f"--{name}" for name, default in fields.items() if isinstance(default, bool)}
    several = {f"--{name}" for name, default in fields.items() if isinstance(default, tuple)}
    return _gathered(_settings_first(words, flags) if "settings" in fields else words, several)


def _settings_first(words: list[str], flags: set[str]) -> list[str]:
    """The same words, with settings in front of all options.

    Wherever people write ``model.layers=6``, also behind ``--text a.txt``, which takes any number of words, it is
    meant as a setting. What follows an option directly is its value, and so are, after ``--sweep``, several values
    of what can be swept.
    """
    from minitf.train.config import SWEPT

    _check_dashes(words)
    found: list[str] = []
    rest: list[str] = []
    option = before = ""
    for word in words:
        if word.startswith("--"):
            option = word.partition("=")[0]
        is_value = before.startswith("--") and "=" not in before and before not in flags
        is_swept = option == "--sweep" and word.partition("=")[0] in SWEPT and any(sign in word for sign in ",:")
        (found if SETTING.match(word) and not is_value and not is_swept else rest).append(word)
        before = word
    return [*found, *rest]


def _check_dashes(words: list[str]) -> None:
    """Raises ValueError where a setting is written as an option."""
    for word, after in itertools.pairwise([*words, "--"]):
        if dashed := DASHED.fullmatch(word):
            name, value = dashed.groups()
            value = value if value is not None else "VALUE" if after.startswith("--") else after
            raise ValueError(f"{word!r} is a setting, not an option: write {name}={value}")


def _gathered(words: list[str], several: set[str]) -> list[str]:
    """The same words, with those of an option that takes several and is given again in one place.

    ``--ablate 0.1 --ablate 1.3`` leaves out both heads; the parser alone would forget the first, and say nothing.
    """
    end = words.index("--") if "--" in words else len(words)
    parts: list[list[str]] = [[]]
    for word in words[:end]:
        if word.startswith("--"):
            parts.append([word])
        else:
            parts[-1].append(word)
    options = [(part[0] if part else "").partition("=") for part in parts]
    given = collections.Counter(option for option, _, _ in options)
    # A value that begins as an option does is one only where it is written as this one's.
    left = {option for option, _, value in options if value.startswith("-")}
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    for part, (option, equals, value) in zip(parts, options, strict=True):
        if option in several - left and given[option] > 1:
            values.setdefault(option, []).extend([value] if equals else part[1:])
            rest += part[1:] if equals else []
        else:
            rest += part
    return [*rest, *(word for option, found in values.items() for word in (option, *found)), *words[end:]]
