"""Reading a config.json: every value is asked for by name, and what minitf cannot express is refused."""

from collections.abc import Mapping
from typing import Any

from minitf.families.mapping import Json

# Their names of an activation (several mean one function) and ours; the first is the one that is written.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "relu": "relu",
}


def whole(json: Json, name: str, default: Any = None) -> int:
    """A positive whole number. Raises ValueError."""
    value = _value(json, name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name} is {value!r}; it must be a positive whole number")
    return value


def number(json: Json, name: str, default: Any = None) -> float:
    """A positive number. Raises ValueError."""
    value = _value(json, name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"config.json: {name} is {value!r}; it must be a positive number")
    return float(value)


def flag(json: Json, name: str, default: Any = None) -> bool:
    """True or false. Raises ValueError."""
    value = _value(json, name, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {name} is {value!r}; it must be true or false")
    return value


def activation(json: Json, name: str, default: str, known: Mapping[str, str] = ACTIVATIONS) -> Any:
    """Our name of their activation. Raises ValueError where minitf has none."""
    value = json.get(name) or default
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"config.json: the activation {name} is {value!r}; minitf has {', '.join(known)}")
    return known[value]


def written(ours: str) -> str:
    """Their name of our activation."""
    return next((theirs for theirs, name in ACTIVATIONS.items() if name == ours), ours)


def only(json: Json, expected: Json, why: str) -> None:
    """Raise ValueError where a setting is there and is none that minitf computes."""
    for name, value in expected.items():
        found = json.get(name)
        if found is not None and found != value:
            raise ValueError(f"config.json: {name} is {found!r}, but minitf can only have {value!r}: {why}")


def _value(json: Json, name: str, default: Any) -> Any:
    value = json.get(name)
    if value is not None:
        return value
    if default is None:
        raise ValueError(f"config.json has no {name!r}, without which the model is not known")
    return default
