"""A dataclass of arrays and plain values, as two files that anyone can open."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from minitf.files import write_atomically


def save_run(folder: Path, name: str, run: Any) -> None:
    """Write a dataclass as ``name.safetensors`` (arrays) and ``name.json`` (the rest)."""
    arrays, rest = {}, {}
    for field in dataclasses.fields(run):
        value = getattr(run, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = np.ascontiguousarray(value)
        else:
            rest[field.name] = value
    write_atomically(folder / f"{name}.safetensors", safetensors.numpy.save(arrays))
    write_atomically(folder / f"{name}.json", json.dumps(rest, indent=1).encode())


def load_run(folder: Path, name: str, kind: type) -> Any:
    """Read what :func:`save_run` wrote."""
    arrays = safetensors.numpy.load_file(folder / f"{name}.safetensors")
    rest = json.loads((folder / f"{name}.json").read_text())
    return kind(**arrays, **{k: tuple(v) if isinstance(v, list) else v for k, v in rest.items()})
