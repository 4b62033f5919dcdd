"""The logit lens: what the model would say if the encoding walk ended at a station (nostalgebraist 2020)."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from minitf import filter
from minitf.analysis.given import check_targets
from minitf.config import ModelConfig
from minitf.filter import in_statistics_dtype
from minitf.model import unembed
from minitf.parameters import Parameters
from minitf.walk import Leaf, Walk, get, leaf

Stations = Float[Array, "station batch position width"]


@struct.dataclass
class LensReading:
    """What a station says of given targets, each ``[station, batch, position]``.

    ``rank`` counts the tokens with a larger logit (0 is the prediction; ties count for the target);
    ``log_probability`` is the target's, in nats; ``divergence`` is KL(final || station), in nats.
    """

    rank: Leaf = leaf("station batch position")
    log_probability: Leaf = leaf("station batch position")
    divergence: Leaf = leaf("station batch position")


def stations(walk: Walk) -> Stations:
    """The points of the encoding walk: the first layer's start, then after each attention and feed-forward.

    Of 2 * layers + 1 stations the last is the end, as long as no edit of a ``resid_pre`` or of ``end`` comes
    between (a layer's ``resid_pre`` is the one before's ``resid_post``).

    Raises:
        ValueError: the walk lacks a station.
    """
    pre, mid, post = (_kept(walk, f"layers.{name}") for name in ("resid_pre", "resid_mid", "resid_post"))
    after = jnp.stack([mid, post], axis=1)
    return jnp.concatenate([pre[:1], after.reshape(-1, *after.shape[2:])])


def station_names(config: ModelConfig) -> list[str]:
    """The stations by name, in the order of :func:`stations`: ``start``, ``0.mid``, ``0.post``, ``1.mid``, ..."""
    return ["start", *(f"{layer}.{half}" for layer in range(config.layers) for half in ("mid", "post"))]


def output_vectors(parameters: Parameters, config: ModelConfig) -> Float[Array, "width vocabulary"]:
    """Every token's output vector, as a column: the unembedding, or the tied embedding transposed."""
    return parameters.embedding.T if config.tied else parameters.unembedding


def read(
    parameters: Parameters, stream: Float[Array, "batch position width"], config: ModelConfig
) -> Float[Array, "batch position vocabulary"]:
    """The logits of points of the residual stream: the final norm, where there is one, and the unembedding."""
    return unembed(parameters, as_context(parameters, stream, config), config)


def as_context(
    parameters: Parameters, stream: Float[Array, "batch position width"], config: ModelConfig
) -> Float[Array, "batch position width"]:
    """Points of the residual stream under the final norm: the context vectors they would be if the walk ended."""
    if not config.pre_norm:
        return stream
    rows, scale = filter.norm_parts(stream.reshape(-1, config.width), config.norm, config.norm_epsilon)
    rows = filter.normalize(rows, scale, parameters.final_norm.gain, parameters.final_norm.offset)
    return rows.astype(stream.dtype).reshape(stream.shape)


def logit_lens(
    parameters: Parameters, walk: Walk, config: ModelConfig
) -> Float[Array, "station batch position vocabulary"]:
    """The logits at every station. Large: :func:`lens` keeps three numbers in place of a vocabulary."""
    return jax.lax.map(lambda stream: read(parameters, stream, config), stations(walk))


def lens(
    parameters: Parameters, walk: Walk, targets: Int[Array, "batch position"], config: ModelConfig
) -> LensReading:
    """Rank and log-probability of the targets, and the divergence from the model's output, at every station.

    One station's logits at a time are in memory.

    Args:
        targets: one token for every position, such as the true next one.

    Raises:
        ValueError: targets of another shape than the walk's tokens, or that are no tokens of this model, or a walk
            without stations or logits.
    """
    final = jax.nn.log_softmax(in_statistics_dtype(_kept(walk, "logits")))
    check_targets(targets, final, config, "targets")

    def reading(stream: Float[Array, "batch position width"]) -> LensReading:
        says = jax.nn.log_softmax(in_statistics_dtype(read(parameters, stream, config)))
        target = jnp.take_along_axis(says, targets[..., None], axis=-1)
        return LensReading(
            rank=jnp.sum(says > target, axis=-1),
            log_probability=target[..., 0],
            divergence=divergence(final, says),
        )

    return jax.lax.map(reading, stations(walk))


def divergence(
    first: Float[Array, "*places vocabulary"], second: Float[Array, "*places vocabulary"]
) -> Float[Array, "*places"]:
    """KL(first || second) of two distributions given as log-probabilities, in nats."""
    probability = jnp.exp(first)
    return jnp.sum(jnp.where(probability > 0, probability * (first - second), 0.0), axis=-1)


def _kept(walk: Walk, name: str) -> Array:
    value = get(walk, name)
    if value is None:
        raise ValueError(f"the lens reads {name!r}, which this walk does not hold; keep it in the walk")
    return value
