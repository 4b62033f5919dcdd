"""The models in a run's checkpoints, to be looked at on their own: how a model came to be, step by step.

A checkpoint holds all of a training's state, of many models side by side; what its models are lies beside it.
"""

import dataclasses
import functools
import json
import os
from operator import getitem
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from minitf import pretrained
from minitf.config import ModelConfig, from_plain, to_plain
from minitf.declaration import declare, declared, is_declaration
from minitf.families import native
from minitf.families.mapping import check_finite
from minitf.files import write_atomically
from minitf.parameters import Parameters, named
from minitf.pretrained import Pretrained, own_tokenizer
from minitf.train.checkpoints import digests, quiet, said_by
from minitf.train.step import State
from minitf.vocabulary import Vocabulary

ABOUT = "model.json"


@dataclasses.dataclass(frozen=True)
class Place:
    """A model in the checkpoints of a run: after ``step`` steps, the ``number``-th of many, None of one alone."""

    folder: Path
    step: int
    number: int | None = None


def place_of(path: Path) -> Place | None:
    """The model that ``checkpoints/STEP`` names, of many ``checkpoints/STEP/NUMBER``; None where it names none."""
    for folder, numbers in ((path.parent, [path.name]), (path.parent.parent, [path.parent.name, path.name])):
        if all(number.isdecimal() for number in numbers) and (folder / ABOUT).is_file():
            return Place(folder, *map(int, numbers))
    return None


def describe(
    folder: Path, config: ModelConfig, vocabulary: Vocabulary | None, models: int | None, state: State
) -> None:
    """Write what the checkpoints in ``folder`` hold, of ``models`` side by side, None of one. Raises OSError.

    ``state`` is as they hold it, or its shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if vocabulary is not None:
        vocabulary.save(folder)
    about = {
        "model": to_plain(config),
        "models": models,
        "part": "parameters" if state.average is None else "average",
        "arrays": len(jax.tree.leaves(state)),
    }
    write_atomically(folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())


def load(source: str | os.PathLike[str]) -> Pretrained:
    """A model of a run's checkpoints, RUN/checkpoints/STEP (and /NUMBER where many train together), or any other.

    Raises ValueError as :func:`read`, and as :func:`minitf.pretrained.load`, which reads the others.
    """
    place = place_of(Path(source))
    if place is None:
        return pretrained.load(source)
    config, parameters = read(place)
    return Pretrained(native.NAME, config, parameters, own_tokenizer(place.folder))


def read(place: Place) -> tuple[ModelConfig, Parameters]:
    """A model as it was then: its running mean, where the run kept one.

    Raises:
        ValueError: there is no such checkpoint or model; it is damaged, or its numbers are not finite.
    """
    about = _about(place.folder / ABOUT)
    config, models = about.config, about.models
    there = sorted(int(path.name) for path in place.folder.iterdir() if path.name.isdecimal())
    if place.step not in there:
        raise ValueError(f"{place.folder} holds no checkpoint of step {place.step}; there are {_listed(there)}")
    step = place.folder / str(place.step)
    if (place.number is None) != (models is None) or (models and not 0 <= (place.number or 0) < models):
        which = f"name one of its {models} models, from {step / '0'} on" if models else f"its one model is {step}"
        named_as = step if place.number is None else step / str(place.number)
        raise ValueError(f"{named_as} is not a model of this run: {which}")
    weights = _restored(step, about)
    own = weights if models is None else jax.tree.map(lambda x: x[place.number], weights)
    for name, value in named(own).items():
        check_finite(np.asarray(value), f"{step}: the weight {name}")
    return config, own


@dataclasses.dataclass(frozen=True)
class _About:
    """What a folder of checkpoints holds; ``part`` of a state of so many ``arrays`` is the weights."""

    config: ModelConfig
    models: int | None
    part: str
    arrays: int


def _about(file: Path) -> _About:
    try:
        told = json.loads(file.read_bytes())
        return _About(from_plain(told["model"]), told["models"], told["part"], told["arrays"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}, which says what the checkpoints beside it hold, is damaged: {error}") from error


def _restored(step: Path, about: _About) -> Parameters:
    """The weights alone, whole, on one device, wherever they lay when they were written."""
    here = SingleDeviceSharding(jax.devices()[0])
    many = () if about.models is None else (about.models,)
    shape = lambda one: jax.ShapeDtypeStruct((*many, *one.shape), jnp.float32, sharding=here)
    places = {_path(name): shape(one) for name, one in declared(about.config).items()}
    of_all = jax.ShapeDtypeStruct((about.arrays,), jnp.uint32, sharding=here)
    wanted = {"state": {about.part: _nested(places)}, "digests": of_all}
    quiet()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                step.absolute() / "default",
                args=ocp.args.PyTreeRestore(
                    item=wanted,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # what Orbax and TensorStore raise of damaged files has no common type
        raise ValueError(f"the checkpoint {step} cannot be read: {said_by(error)}") from error
    found = [functools.reduce(getitem, path, restored["state"][about.part]) for path in places]
    # A state's leaves are its step, the parameters, moments, the running mean, and how many steps were skipped.
    first = 1 if about.part == "parameters" else about.arrays - 1 - len(found)
    if not np.array_equal(digests(found), restored["digests"][first : first + len(found)]):
        raise ValueError(f"the checkpoint {step} is damaged: its numbers are not those that were written")
    return jax.tree.unflatten(jax.tree.structure(declare(about.config), is_leaf=is_declaration), found)


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _nested(leaves: dict[tuple[Any, ...], Any]) -> Any:
    """Tables in tables, and lists where numbers count, as Orbax has them."""
    groups: dict[Any, dict[tuple[Any, ...], Any]] = {}
    for (first, *rest), leaf in leaves.items():
        groups.setdefault(first, {})[tuple(rest)] = leaf
    inner = {name: group[()] if () in group else _nested(group) for name, group in groups.items()}
    return list(inner.values()) if all(isinstance(name, int) for name in inner) else inner


def _listed(steps: list[int]) -> str:
    first = ", ".join(map(str, steps[:8]))
    return f"those of steps {first}{f', ... {steps[-1]}' if len(steps) > 8 else ''}" if steps else "none"
