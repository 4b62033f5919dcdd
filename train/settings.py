"""Settings as plain tables, the same in a TOML file and as ``group.field=value`` on a command line."""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from minitf.config import KINDS, ModelConfig
from minitf.train.config import SWEPT, TrainConfig

PRESETS = Path(__file__).parent / "presets"
# Groups whose fields depend on what is named in them; those who read them check them.
OPEN = ("model", "task", "sweep")


def preset_names() -> list[str]:
    """The names of all presets."""
    return sorted(file.stem for file in PRESETS.glob("*.toml"))


def about_preset(name: str) -> str:
    """What a preset trains: the comment that its file begins with."""
    text = (PRESETS / f"{name}.toml").read_text("utf-8")
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines)


def read_preset(name: str) -> dict[str, Any]:
    """A preset's tables. Raises ValueError for a name that is none."""
    if name not in preset_names():
        raise ValueError(
            f"there is no preset {name!r}{_near(name, preset_names())}; there are {', '.join(preset_names())}"
        )
    return _tables_in(PRESETS / f"{name}.toml")


def tables_of(preset: str, file: Path | None, above: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a preset, over them those of a file (and of the preset that it names), over all those above.

    Raises ValueError: no such preset, a file that is missing, unreadable or not TOML, by name.
    """
    said = {} if file is None else _tables_in(file)
    own = str(said.pop("preset", ""))
    said = laid_over(said, above)
    tables: dict[str, Any] = {}
    for name in filter(None, (preset, own)):
        tables = laid_over(tables, read_preset(name))
    training = said.get("training")
    if isinstance(training, Mapping) and training.get("start_from"):
        # What is trained and how its text is encoded is then that model's, and not the preset's.
        tables.pop("model", None)
        tables["data"] = {k: v for k, v in tables.get("data", {}).items() if k not in ("encoding", "vocabulary")}
    return laid_over(tables, said)


def _tables_in(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not TOML: {error}") from error


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The tables ``below``, with what ``above`` says in place of what they say.

    Another task's settings, or another mixer's, are not mixed with those there were.
    """
    joined = dict(below)
    swept = below.get("sweep")
    if isinstance(swept, Mapping):
        # Who says a number means it, and not the values that a file has for it.
        joined["sweep"] = {name: values for name, values in swept.items() if value_of(above, name) is None}
    for group, fields in above.items():
        known = joined.get(group)
        if not isinstance(known, Mapping) or not isinstance(fields, Mapping):
            joined[group] = fields
        elif group == "task" and fields.get("name", known.get("name")) != known.get("name"):
            joined[group] = dict(fields)
        else:
            joined[group] = {**known, **fields}
    return joined


def value_of(tables: Mapping[str, Any], name: str) -> Any:
    """The value that tables have for ``group.field``; None where they have none."""
    group, _, key = name.partition(".")
    fields = tables.get(group)
    return fields.get(key) if isinstance(fields, Mapping) else None


def from_words(words: Iterable[str]) -> dict[str, Any]:
    """The tables that ``group.field=value`` words say; values are as in TOML, and bare words are text.

    So they are in a list of several (``[temperature,wind]``), whose quotes a shell takes away.

    Raises ValueError for a word of another form, and for a table that is not TOML.
    """
    tables: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        group, dot, key = name.partition(".")
        if not (equals and dot and key and group):
            raise ValueError(f"{word!r} is no setting; write group.field=value, such as optimizer.rate=3e-4")
        tables.setdefault(group, {})[key] = _value(name, text)
    return tables


def _value(name: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if re.fullmatch(r"[+-]?(\.[0-9]+|[0-9]+\.)([eE][+-]?[0-9]+)?", text):
            return float(text)
        inside = text[1:-1]
        if text[:1] + text[-1:] in ("{}", "[]") and "{" in text and "=" in inside:
            raise ValueError(
                f"{name} is {text}, which is not TOML; a table and text in it are written "
                '{kind = "Convolution", taps = 4}, with quotes for the shell around all of it'
            ) from None
        if text[:1] != "[" or text[-1:] != "]" or "," not in inside or set("[]'\"") & set(inside):
            return text
        return [_value(name, one.strip()) for one in inside.removesuffix(",").split(",")]


def sweep_from(words: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """What ``optimizer.rate=1e-4:1e-2:8`` (eight, evenly spaced in their logarithm) or ``=1e-3,3e-3`` asks for.

    ``lr`` stands for ``optimizer.rate``. Raises ValueError for what cannot be swept or read.
    """
    found: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, _, text = word.partition("=")
        name = {"lr": "optimizer.rate", "rate": "optimizer.rate"}.get(name, name)
        if name not in SWEPT:
            raise ValueError(f"{name!r} cannot be swept{_near(name, SWEPT)}; what can is {', '.join(SWEPT)}")
        if name in found:
            raise ValueError(f"{name} is swept twice; write its values in one: {name}=1e-4,1e-3")
        found[name] = _swept_values(word, text)
    return found


def _swept_values(word: str, text: str) -> tuple[float, ...]:
    try:
        if ":" in text:
            low, high, count = text.split(":")
            first, last, many = float(low), float(high), int(count)
            if not (0 < first < math.inf and 0 < last < math.inf and many >= 2):
                raise ValueError
            step = math.log(last / first) / (many - 1)
            return tuple(float(f"{first * math.exp(step * i):.6g}") for i in range(many))
        return tuple(float(value) for value in text.split(","))
    except ValueError:
        raise ValueError(
            f"{word!r} is no sweep; write optimizer.rate=1e-4:1e-2:8 for eight values from 1e-4 to 1e-2, or the "
            "values with commas"
        ) from None


def as_config(tables: Mapping[str, Any]) -> TrainConfig:
    """The checked configuration of plain tables.

    Raises ValueError for a group or field that does not exist (with the nearest that does), or a value of another
    type or out of range.
    """
    hints = typing.get_type_hints(TrainConfig)
    groups: dict[str, Any] = {}
    for group, fields in tables.items():
        if group not in hints:
            raise ValueError(f"there is no group {group!r}{_near(group, hints)}; there are {', '.join(hints)}")
        if not isinstance(fields, Mapping):
            raise ValueError(f"{group} is {fields!r}; it must be a table of settings")
        if group == "sweep":
            groups[group] = {name: _fitted(f"sweep.{name}", v, tuple[float, ...]) for name, v in fields.items()}
            wrong = [name for name in groups[group] if name not in SWEPT]
            if wrong:
                raise ValueError(f"{wrong[0]!r} cannot be swept; what can is {', '.join(SWEPT)}")
        else:
            groups[group] = dict(fields) if group in OPEN else _settings(group, fields, hints[group])
    return TrainConfig(**groups)


def _settings(group: str, fields: Mapping[str, Any], kind: type) -> Any:
    hints = typing.get_type_hints(kind, include_extras=True)
    for name in fields:
        if name not in hints:
            raise ValueError(f"there is no {group}.{name}{meant(name, hints)}; {group} has {', '.join(hints)}")
    values = {name: _fitted(f"{group}.{name}", value, hints[name]) for name, value in fields.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(told_of(group, error, hints)) from error


def told_of(group: str, error: ValueError, names: Container[str]) -> str:
    """What is wrong with a group's settings: most sentences begin with the name of one."""
    said = str(error)
    return f"{group}{'.' if said.split(' ', maxsplit=1)[0] in names else ': '}{said}"


def meant(name: str, known: Iterable[str]) -> str:
    """What may be meant by a name that a group lacks: the same of another group, or the nearest of its own."""
    kinds = {**typing.get_type_hints(TrainConfig), "model": ModelConfig}
    fields = {
        group: typing.get_type_hints(kind) for group, kind in kinds.items() if dataclasses.is_dataclass(kind)
    }
    elsewhere = [group for group, names in {**fields, "task": ("name",)}.items() if name in names]
    if len(elsewhere) == 1:
        return f" (did you mean {elsewhere[0]}.{name}?)"
    return _near(name, known)


def _fitted(name: str, value: Any, kind: Any) -> Any:
    """A value as its field's type has it."""
    options, origin = get_args(kind), get_origin(kind)
    if origin is Annotated:
        return _fitted(name, value, options[1])
    if origin in (typing.Union, types.UnionType):
        known = [one for one in options if one is not type(None)]
        return None if value is None else _fitted(name, value, known[0])
    if origin is tuple:
        if isinstance(value, str) and value[:1] + value[-1:] == "[]":
            # Of a list of one word the quotes are the shell's.
            value = [one.strip() for one in value[1:-1].split(",")]
        many = value if isinstance(value, list | tuple) else [value]
        return tuple(_fitted(name, one, options[0]) for one in many)
    if origin is Literal and value not in options:
        raise ValueError(f"{name} is {value!r}{_near(str(value), options)}; choose one of {', '.join(options)}")
    if kind is float and type(value) is int:
        return float(value)
    if kind in _TYPES and type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; it must be {_TYPES[kind]}")
    return value


_TYPES = {**KINDS, str: "text"}


def as_tables(config: TrainConfig) -> dict[str, Any]:
    """The whole configuration as plain tables, such as JSON and TOML can hold; :func:`as_config` reads it."""
    plain = {
        group: dict(vars(value)) if dataclasses.is_dataclass(value) else dict(value)
        for group, value in vars(config).items()
    }
    without_none = {
        group: {name: _listed(value) for name, value in fields.items() if value is not None}
        for group, fields in plain.items()
    }
    return {group: fields for group, fields in without_none.items() if fields or group not in OPEN}


def by_name(config: TrainConfig) -> dict[str, Any]:
    """The same as one table: ``{"optimizer.rate": 0.001, ...}``."""
    return {
        f"{group}.{name}": value for group, fields in as_tables(config).items() for name, value in fields.items()
    }


def _listed(value: Any) -> Any:
    return [_listed(one) for one in value] if isinstance(value, tuple | list) else value


def as_toml(tables: Mapping[str, Any]) -> str:
    """Tables as a TOML file, to be read with ``--config``."""
    parts = []
    for group, fields in tables.items():
        lines = [f"{_key(name)} = {_toml(value)}" for name, value in fields.items()]
        parts.append("\n".join([f"[{group}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(name)} = {_toml(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else f"{value}".replace("infinity", "inf")
    # JSON's numbers, truth values and text are TOML's too (text once it holds no bare delete character).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml(name)


def _near(word: str, known: Iterable[Any]) -> str:
    close = difflib.get_close_matches(word, [str(one) for one in known], 1)
    return f" (did you mean {close[0]}?)" if close else ""
