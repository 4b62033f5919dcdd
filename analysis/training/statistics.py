"""What a walk looks like while a model trains: a few numbers of each layer and head, on the same sequences."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from minitf import ModelConfig, Parameters, walk
from minitf.analysis import patterns
from minitf.analysis.geometry import encoding_geometry
from minitf.analysis.patching import ByLayer
from minitf.declaration import declared
from minitf.filter import in_statistics_dtype
from minitf.layer import mixer_of
from minitf.parameters import named
from minitf.train.batch import Batch
from minitf.train.objective import with_inputs
from minitf.walk import Edit, stacked

NUMBERS_AT_ONCE = 2**28  # of walks, a GiB of float32


def statistics(
    parameters: Parameters, batch: Batch, config: ModelConfig, filler: int | None = None
) -> dict[str, Array]:
    """Means over a batch, each by its name; ``LABELS`` says what they are and which axes they have.

    Places of the token ``filler`` are left out; the attention of a model that sees both ways sees them, so there
    they count. The attention's numbers are of layers in which heads have shares of what they see; heads that a
    layer does not have are NaN, and without any such layer they are left out.
    """
    edit = with_inputs(Edit(), parameters, batch)
    walked = walk(parameters, batch.tokens, config, edit=edit)
    geometry = encoding_geometry(walked, config)
    streams = jnp.concatenate([walked.layers.resid_pre, walked.end[None]])
    counted = None if filler is None else batch.tokens != filler
    over_places = lambda x: jnp.mean(x, axis=(-2, -1), where=counted)
    found = {
        "stream_norm": over_places(jnp.linalg.norm(in_statistics_dtype(streams), axis=-1)),
        "stream_rank": participation(streams.reshape(len(streams), -1, config.width), counted),
        "relative_step": over_places(geometry.relative_step),
        "turn": over_places(geometry.turning_angle),
        "efficiency": over_places(geometry.efficiency),
        **weight_ranks(parameters, config),
    }
    return found | _of_attention(walked.layers.pattern, config, counted if config.causal else None)


def _of_attention(
    pattern: ByLayer | None, config: ModelConfig, valid: Bool[Array, "batch position"] | None
) -> dict[str, Array]:
    """Entropy and distance ``[layer, head]``, of rows that sum to at most one: of others they mean nothing."""
    layers = [config.layer(number) for number in range(config.layers)]
    known = [mixer_of(layer).about(layer) for layer in layers]
    shares = [about.granularity == "head" and about.normalized != "no" for about in known]
    if pattern is None or not any(shares):
        return {}
    if all(shares) and not isinstance(pattern, tuple):
        attention = patterns.statistics(pattern, config, valid)
        return {"entropy": attention.entropy_share, "distance": attention.distance}
    own: Any = pattern  # a layer that has shares has a pattern
    each = [
        patterns.statistics(own[i][None], layers[i], valid) if share else None for i, share in enumerate(shares)
    ]
    joined = lambda name: stacked([None if x is None else getattr(x, name)[0] for x in each], (0,), jnp.nan)
    return {"entropy": joined("entropy_share"), "distance": joined("distance")}


def looker(
    batch: Batch, config: ModelConfig, batched: bool, filler: int | None = None, where: Any = None
) -> Callable[[Parameters], dict[str, Array]]:
    """A compiled function of the parameters to the statistics of one model, or of many.

    On a CPU they come one after another, elsewhere as many at a time as have room for their walks. ``where``, a
    sharding, says where they lie.
    """
    one = lambda parameters: statistics(parameters, batch, config, filler)
    at_once = None if jax.default_backend() == "cpu" else walks_at_once(batch.tokens.size, config)
    all_of = lambda many: jax.lax.map(one, many, batch_size=at_once) if batched else one(many)
    return jax.jit(all_of, out_shardings=where)


def walks_at_once(tokens: int, config: ModelConfig) -> int:
    """How many models' walks of so many tokens have about ``NUMBERS_AT_ONCE`` numbers."""
    of_layer = 12 * config.width + 2 * config.heads * config.length
    return max(NUMBERS_AT_ONCE // (tokens * config.layers * of_layer), 1)


def participation(
    rows: Float[Array, "*axes row width"], counted: Bool[Array, "*places"] | None = None
) -> Float[Array, "*axes"]:
    """The participation ratio ``(sum of l)^2 / sum of l^2`` of the eigenvalues l of the covariance of rows.

    ``counted`` says which rows count, over as many places as there are rows; all if None.
    It counts dimensions: n equal ones give n. (Without the eigenvalues: both sums are traces.)
    """
    x = in_statistics_dtype(rows)
    which = None if counted is None else counted.reshape(-1, 1)
    x = x - jnp.mean(x, axis=-2, keepdims=True, where=which)
    x = x if which is None else x * which
    return _spread(jnp.swapaxes(x, -1, -2) @ x)


def _spread(gram: Float[Array, "*axes n n"]) -> Float[Array, "*axes"]:
    """The participation ratio of the eigenvalues of a symmetric matrix, 0 where all are."""
    total, square = jnp.trace(gram, axis1=-2, axis2=-1), jnp.sum(gram**2, axis=(-2, -1))
    return jnp.where(square > 0, total**2 / jnp.where(square > 0, square, 1.0), 0.0)


def weight_ranks(parameters: Parameters, config: ModelConfig) -> dict[str, Float[Array, " layer"]]:
    """Of every linear map inside equal layers, over how many directions it is spread: ``(sum s^2)^2 / sum s^4``.

    Heads count as one matrix, as wide as all of them.
    """
    if isinstance(parameters.layers, tuple):
        return {}
    found: dict[str, Any] = {}
    declarations = declared(config)
    for name, weight in named(parameters).items():
        declaration = declarations[name]
        if not name.startswith("layers.") or declaration.sides is None:
            continue
        summed = declaration.sides[0]
        rows = math.prod(declaration.shape[place] for place in summed)
        order = (0, *summed, *(place for place in range(1, weight.ndim) if place not in summed))
        matrix = in_statistics_dtype(weight).transpose(order).reshape(weight.shape[0], rows, -1)
        turned = jnp.swapaxes(matrix, -1, -2)
        found[f"rank_{name.rpartition('.')[2]}"] = _spread(
            matrix @ turned if rows <= matrix.shape[2] else turned @ matrix
        )
    return found


# What each is, for people, and what its last axes count.
LABELS = {
    "entropy": ("entropy of attention, as a share of the largest possible", ("layer", "head")),
    "distance": ("how far back attention looks, in positions", ("layer", "head")),
    "stream_norm": ("length of the residual stream's vectors", ("station",)),
    "stream_rank": ("dimensions that the residual stream fills (participation ratio)", ("station",)),
    "relative_step": ("length of a sub-layer's step, as a share of where it starts", ("move",)),
    "turn": ("angle between one step and the next, radians", ("turn",)),
    "efficiency": ("how straight the walk is: 1 is a straight line", ()),
    "rank": ("directions over which a layer's weights are spread", ("layer",)),
}
