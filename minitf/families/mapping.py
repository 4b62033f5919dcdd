"""Names and layouts of weights, theirs and ours: one table, read in both directions.

A layout is written as the axes of their array, those that they merge in parentheses:
``"width (part head head_width)"`` is GPT-2's ``c_attn.weight``, three of our weights side by side. The names of
the axes are those of :func:`minitf.declaration.declare`, which also knows the sizes; so the shape that a file must
have, the way in and the way out all follow from that one line.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from minitf.config import ModelConfig
from minitf.declaration import Declaration, declare, declared
from minitf.parameters import Parameters, named, path_name

Json = dict[str, Any]


class Tensor(NamedTuple):
    """One tensor of theirs, ``{}`` for the layer; the weights of ours that it holds; and its axes."""

    theirs: str
    ours: tuple[str, ...]
    axes: str


@dataclass(frozen=True)
class Family:
    """How one family writes a model down.

    ``config`` reads their config.json and raises ValueError on whatever minitf cannot express; ``json`` writes
    it. ``prefix`` may be missing from all names of a file. ``ignorable`` are patterns of tensors that do nothing
    or that another task uses; ``copies`` are further names of a tensor, which must hold the same numbers or be
    absent; ``renamed`` are (pattern, replacement) from older names.
    """

    config: Callable[[Json], ModelConfig]
    json: Callable[[ModelConfig], Json]
    tensors: tuple[Tensor, ...]
    prefix: str
    ignorable: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()


class Place(NamedTuple):
    """One tensor of a file: its name, our weights in it, the layer (None outside layers), and its axes."""

    name: str
    ours: tuple[str, ...]
    layer: int | None
    axes: tuple[tuple[tuple[str, int], ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their array."""
        return tuple(math.prod(size for _, size in group) for group in self.axes)

    @property
    def fine_axes(self) -> tuple[tuple[str, int], ...]:
        """Their axes with nothing merged."""
        return tuple(axis for group in self.axes for axis in group)


def places(family: Family, config: ModelConfig) -> list[Place]:
    """Every tensor that a file of this model holds; what the model lacks (a bias, a tied map) is left out.

    Raises:
        ValueError: the family has no place for a weight of this model.
    """
    declarations = declared(config)
    present = [tensor for tensor in family.tensors if tensor.ours[0] in declarations]
    homeless = set(declarations) - {ours for tensor in present for ours in tensor.ours}
    if homeless:
        raise ValueError(f"this family has no place for the weights {_listed(homeless)}")
    found = []
    for tensor in present:
        sizes = dict(declarations[tensor.ours[0]].axes) | {"part": len(tensor.ours)}
        axes = tuple(
            tuple((axis, sizes[axis]) for axis in group.strip("()").split())
            for group in re.findall(r"\([^)]*\)|\S+", tensor.axes)
        )
        layers = range(config.layers) if "{}" in tensor.theirs else (None,)
        found += [Place(tensor.theirs.format(layer), tensor.ours, layer, axes) for layer in layers]
    return found


def read(
    family: Family, config: ModelConfig, arrays: Mapping[str, np.ndarray], dtype: Any, where: str
) -> Parameters:
    """Our parameters from their arrays (which may be opened lazily), in ``dtype``.

    Raises:
        ValueError: an unknown, missing or misshapen tensor, a tied one that differs from what it is tied to, NaN
            or infinity, always with the tensor's name.
    """
    if config.layers > len(arrays):
        # Every place is made of as many layers as the configuration says, before it is looked for.
        raise ValueError(f"{where}: {len(arrays)} tensors are not those of {config.layers} layers")
    declarations = declared(config)
    wanted = {place.name: place for place in places(family, config)}
    theirs = _matched(family, config, list(arrays), wanted, where)
    for name, place in wanted.items():
        shape = tuple(arrays[theirs[name]].shape)
        if shape != place.shape:
            raise ValueError(
                f"{where}: the tensor {theirs[name]} has the shape {shape}, but with this configuration it "
                f"would be {place.shape}"
            )
    weights = {name: np.empty(d.shape, dtype) for name, d in declarations.items()}
    for name, place in wanted.items():
        array = np.asarray(arrays[theirs[name]])
        parts = _split(array, place, declarations)
        for ours, part in zip(place.ours, parts, strict=True):
            target = weights[ours] if place.layer is None else weights[ours][place.layer]
            target[...] = _cast(part, dtype, f"{where}: the tensor {theirs[name]}")
    copies = {copy: original for copy, original in family.copies.items() if copy not in wanted}
    _check_copies(copies, arrays, theirs, where)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(weights.pop(path_name(path))),
        declare(config),
        is_leaf=lambda x: isinstance(x, Declaration),
    )


def write(family: Family, config: ModelConfig, parameters: Parameters) -> dict[str, np.ndarray]:
    """Their arrays from our parameters, in the dtype in which they are: nothing but names and order changes."""
    declarations = declared(config)
    values = {name: np.asarray(value) for name, value in named(parameters).items()}
    return {place.name: _joined(place, values, declarations) for place in places(family, config)}


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises ValueError, naming the array, where it holds NaN or infinity."""
    finite = np.isfinite(array)
    if not finite.all():
        wrong = array.size - int(finite.sum())
        raise ValueError(f"{what} holds {wrong} numbers that are NaN or infinite, out of {array.size}")


def _cast(part: np.ndarray, dtype: Any, what: str) -> np.ndarray:
    if not jnp.issubdtype(part.dtype, jnp.floating):
        raise ValueError(f"{what} is of {part.dtype.name}; weights are floating-point numbers")
    check_finite(part, what)
    with np.errstate(over="ignore"):
        cast = part.astype(dtype)
    if not np.isfinite(cast).all():
        raise ValueError(f"{what} has numbers that are too large for {np.dtype(dtype).name}; choose another dtype")
    return cast


def _matched(
    family: Family, config: ModelConfig, names: list[str], wanted: Mapping[str, Place], where: str
) -> dict[str, str]:
    """Their name in the file for each name of the table (and for each copy that is there)."""
    bare = not any(name.startswith(family.prefix) for name in names)
    theirs: dict[str, str] = {}
    unknown = []
    for name in names:
        known = _table_name(family, name, bare, wanted)
        if known in wanted or known in family.copies:
            if known in theirs:
                raise ValueError(f"{where}: the tensors {theirs[known]} and {name} are two names of one weight")
            theirs[known] = name
        elif not _ignorable(family, known, config):
            unknown.append(name)
    if unknown:
        raise ValueError(f"{where} has tensors that this model does not have: {_listed(unknown)}")
    missing = [name for name in wanted if name not in theirs]
    if missing:
        raise ValueError(f"{where} lacks tensors that this model has: {_listed(missing)}")
    return theirs


def _table_name(family: Family, name: str, bare: bool, wanted: Mapping[str, Place]) -> str:
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    known = name in wanted or name in family.copies
    return family.prefix + name if bare and not known else name


def _ignorable(family: Family, name: str, config: ModelConfig) -> bool:
    for pattern in family.ignorable:
        match = re.fullmatch(pattern, name)
        # A buffer of a layer that the model does not have is a sign that the files do not belong together.
        if match and ("layer" not in match.groupdict() or int(match["layer"]) < config.layers):
            return True
    return False


def _check_copies(
    copies: Mapping[str, str], arrays: Mapping[str, np.ndarray], theirs: dict[str, str], where: str
) -> None:
    for copy, original in copies.items():
        if copy not in theirs or original not in theirs:
            continue
        one, other = (np.asarray(arrays[theirs[name]]) for name in (copy, original))
        if one.shape != other.shape or one.dtype != other.dtype or one.tobytes() != other.tobytes():
            raise ValueError(
                f"{where}: {theirs[copy]} should be the same as {theirs[original]}, to which the configuration "
                "ties it, but the two differ"
            )


def _ours_axes(ours: str, declared: Mapping[str, Declaration], fine: tuple[tuple[str, int], ...]) -> list[int]:
    """Where in the fine axes each axis of our weight stands."""
    names = [name for name, _ in fine]
    ours_names = [name for name, _ in declared[ours].axes if name != "layer"]
    # Fused maps exist where every head has its own keys: there, a key's head is a head.
    return [names.index(name if name in names else name.removeprefix("key_value_")) for name in ours_names]


def _split(array: np.ndarray, place: Place, declared: Mapping[str, Declaration]) -> list[np.ndarray]:
    fine = place.fine_axes
    array = array.reshape([size for _, size in fine])
    if len(place.ours) == 1:
        return [array.transpose(_ours_axes(place.ours[0], declared, fine))]
    part = [name for name, _ in fine].index("part")
    return [
        array.transpose([part, *_ours_axes(ours, declared, fine)])[index] for index, ours in enumerate(place.ours)
    ]


def _joined(place: Place, values: Mapping[str, np.ndarray], declared: Mapping[str, Declaration]) -> np.ndarray:
    fine = place.fine_axes
    weights = [values[ours] if place.layer is None else values[ours][place.layer] for ours in place.ours]
    order = _ours_axes(place.ours[0], declared, fine)
    if len(weights) > 1:
        order = [[name for name, _ in fine].index("part"), *order]
    stacked = weights[0] if len(weights) == 1 else np.stack(weights)
    return np.ascontiguousarray(stacked.transpose(np.argsort(order))).reshape(place.shape)


def _listed(names: Any) -> str:
    names = sorted(names)
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return ", ".join(names[:6]) + more


def norm(theirs: str, ours: str, axis: str = "width") -> tuple[Tensor, Tensor]:
    """A norm's gain and offset; a model without offsets has only the gain."""
    return (
        Tensor(f"{theirs}.weight", (f"{ours}.gain",), axis),
        Tensor(f"{theirs}.bias", (f"{ours}.offset",), axis),
    )


def linear(theirs: str, ours: str, axes: str, bias: str) -> tuple[Tensor, Tensor]:
    """A map and its bias, with the axes of either."""
    return Tensor(f"{theirs}.weight", (ours,), axes), Tensor(f"{theirs}.bias", (f"{ours}_bias",), bias)


def fused(theirs: str, axes: str, bias: str) -> tuple[Tensor, Tensor]:
    """Queries, keys and values in one map: ``part`` is the axis of the three."""
    ours = tuple(f"layers.attention.{name}" for name in ("query", "key", "value"))
    return (
        Tensor(f"{theirs}.weight", ours, axes),
        Tensor(f"{theirs}.bias", tuple(f"{name}_bias" for name in ours), bias),
    )


def projections(theirs: str, names: tuple[str, str, str]) -> Iterator[Tensor]:
    """Queries, keys and values, each in a map of its own with the outputs first; ``{}`` is the layer."""
    for ours, name in zip(("query", "key", "value"), names, strict=True):
        head = "head" if ours == "query" else "key_value_head"
        yield from linear(
            theirs + name, f"layers.attention.{ours}", f"({head} head_width) width", f"({head} head_width)"
        )
