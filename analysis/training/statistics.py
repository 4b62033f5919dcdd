"""What a walk looks like while a model trains: a few numbers of each layer and head, on the same sequences."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf import ModelConfig, Parameters, walk
from minitf.analysis import patterns
from minitf.analysis.geometry import encoding_geometry
from minitf.filter import in_statistics_dtype
from minitf.parameters import declare, is_declaration, path_name
from minitf.train.batch import Batch
from minitf.train.objective import with_inputs
from minitf.walk import Edit


def statistics(parameters: Parameters, batch: Batch, config: ModelConfig) -> dict[str, Array]:
    """Means over a batch, each by its name; ``LABELS`` says what they are and which axes they have.

    The attention's are left out where a layer has no association of heads.
    """
    edit = with_inputs(Edit(), parameters, batch)
    walked = walk(parameters, batch.tokens, config, edit=edit)
    geometry = encoding_geometry(walked, config)
    streams = jnp.concatenate([walked.layers.resid_pre, walked.end[None]])
    over_places = lambda x: jnp.mean(x, axis=(-2, -1))
    found = {
        "stream_norm": over_places(jnp.linalg.norm(in_statistics_dtype(streams), axis=-1)),
        "stream_rank": participation(streams.reshape(len(streams), -1, config.width)),
        "step": over_places(geometry.relative_step),
        "turn": over_places(geometry.turning_angle),
        "efficiency": over_places(geometry.efficiency),
        **weight_ranks(parameters, config),
    }
    pattern = walked.layers.pattern
    if pattern is not None and not isinstance(pattern, tuple) and pattern.shape[2] == config.heads:
        attention = patterns.statistics(pattern, config)
        found |= {"entropy": attention.entropy_share, "distance": attention.distance}
    return found


def participation(rows: Float[Array, "*axes row width"]) -> Float[Array, "*axes"]:
    """The participation ratio ``(sum of l)^2 / sum of l^2`` of the eigenvalues l of the rows' covariance.

    It counts dimensions: n equal ones give n. (Without the eigenvalues: both sums are traces.)
    """
    x = in_statistics_dtype(rows)
    x = x - jnp.mean(x, axis=-2, keepdims=True)
    covariance = jnp.swapaxes(x, -1, -2) @ x
    total = jnp.trace(covariance, axis1=-2, axis2=-1)
    square = jnp.sum(covariance**2, axis=(-2, -1))
    return jnp.where(square > 0, total**2 / jnp.where(square > 0, square, 1.0), 0.0)


def weight_ranks(parameters: Parameters, config: ModelConfig) -> dict[str, Float[Array, " layer"]]:
    """Of every linear map inside equal layers, over how many directions it is spread: ``(sum s^2)^2 / sum s^4``.

    Heads count as one matrix, as wide as all of them.
    """
    if isinstance(parameters.layers, tuple):
        return {}
    found: dict[str, Any] = {}
    declared = jax.tree.leaves_with_path(declare(config).layers, is_leaf=is_declaration)
    for (path, declaration), weight in zip(declared, jax.tree.leaves(parameters.layers), strict=True):
        own = [name for name, _ in declaration.axes if name != "layer"]
        if len(own) < 2:
            continue
        middle = weight.ndim - 1 if own[-1] == "width" else 2
        shape = (weight.shape[0], int(jnp.size(weight[0]) // _size(weight.shape[middle:])), -1)
        matrix = in_statistics_dtype(weight).reshape(shape)
        gram = (
            matrix @ jnp.swapaxes(matrix, -1, -2)
            if shape[1] <= matrix.shape[2]
            else (jnp.swapaxes(matrix, -1, -2) @ matrix)
        )
        total, square = jnp.trace(gram, axis1=-2, axis2=-1), jnp.sum(gram**2, axis=(-2, -1))
        name = path_name(path).rpartition(".")[2]
        found[f"rank_{name}"] = jnp.where(square > 0, total**2 / jnp.where(square > 0, square, 1.0), 0.0)
    return found


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for one in shape:
        size *= one
    return size


# What each is, for people, and what its last axes count.
LABELS = {
    "entropy": ("entropy of attention, as a share of the largest possible", ("layer", "head")),
    "distance": ("how far back attention looks, in positions", ("layer", "head")),
    "stream_norm": ("length of the residual stream's vectors", ("station",)),
    "stream_rank": ("dimensions that the residual stream fills (participation ratio)", ("station",)),
    "step": ("length of a sub-layer's step, as a share of where it starts", ("move",)),
    "turn": ("angle between one step and the next, radians", ("turn",)),
    "efficiency": ("how straight the walk is: 1 is a straight line", ()),
    "rank": ("directions over which a layer's weights are spread", ("layer",)),
}
