"""The geometry of the walk: how far and which way each sub-layer moves a token, and what controls say.

The encoding walk of a position is the points ``h_0 ... h_J`` with moves ``d_j = h_j - h_(j-1)``, two a layer
(attention, then feed-forward; one where there is no feed-forward). Angles are in radians. For independent
isotropic moves in many dimensions turning angles are pi / 2 and the efficiency is about ``J ** -0.5``.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from minitf import initialize
from minitf.analysis.lens import lens, output_vectors
from minitf.config import ModelConfig
from minitf.edits import around_a_circle
from minitf.filter import in_statistics_dtype
from minitf.parameters import Parameters, split_layers, stack_layers
from minitf.walk import Leaf, Walk, leaf, station_steps

Tokens = Int[Array, "batch position"]


@struct.dataclass
class EncodingGeometry:
    """One number per move, or per walk; :func:`by_sublayer` splits those with a ``move`` axis.

    relative_step: ``|d_j| / |h_(j-1)|``.
    turning_angle: between a move and the next.
    point_angle: between the points before and after a move.
    radial: cosine of a move with the point that it leaves; above 0 the walk moves outward.
    progress: ``(h_j - h_0) . (h_J - h_0) / |h_J - h_0|^2`` after each move; the last is 1.
    efficiency: ``|h_J - h_0| / sum |d_j|``; 1 is a straight line.

    A ratio whose denominator is 0 is 0, and an angle with a zero vector is pi / 2.
    """

    relative_step: Leaf = leaf("move batch position")
    turning_angle: Leaf = leaf("turn batch position")
    point_angle: Leaf = leaf("move batch position")
    radial: Leaf = leaf("move batch position")
    progress: Leaf = leaf("move batch position")
    efficiency: Leaf = leaf("batch position")


def encoding_geometry(walk: Walk, config: ModelConfig) -> EncodingGeometry:
    """The geometry of every position's encoding walk.

    Raises ValueError where the walk lacks ``layers.resid_pre``, ``resid_mid`` or ``resid_post``.
    """
    layers = walk.layers
    if any(x is None for x in (layers.resid_pre, layers.resid_mid, layers.resid_post)):
        raise ValueError("the geometry reads layers.resid_pre, resid_mid and resid_post; keep them in the walk")
    walk = dataclasses.replace(walk, layers=jax.tree.map(in_statistics_dtype, layers))
    moves = station_steps(walk)
    moves = moves[0::2] if config.feed_forward == "none" else moves
    start = walk.layers.resid_pre[:1]
    after = start + jnp.cumsum(moves, axis=0)
    before = jnp.concatenate([start, after[:-1]])
    whole = after[-1] - start[0]
    return EncodingGeometry(
        relative_step=_ratio(_length(moves), _length(before)),
        turning_angle=angle(moves[:-1], moves[1:]),
        point_angle=angle(before, after),
        radial=_ratio(_dot(moves, before), _length(moves) * _length(before)),
        progress=_ratio(_dot(after - start, whole), _dot(whole, whole)),
        efficiency=_ratio(_length(whole), jnp.sum(_length(moves), axis=0)),
    )


def by_sublayer(
    values: Float[Array, "move ..."], config: ModelConfig
) -> tuple[Float[Array, "attention ..."], Float[Array, "feed_forward ..."]]:
    """Attention's values and the feed-forward's; turning angles are given to the move that they come after."""
    if config.feed_forward == "none":
        return values, values[:0]
    return values[0::2], values[1::2]


def angle(first: Float[Array, "*rest width"], second: Float[Array, "*rest width"]) -> Float[Array, "*rest"]:
    """The angle between two vectors, exact also where it is small (Kahan's formula), where acos is not."""
    u, v = (x / jnp.where(_length(x) == 0, 1.0, _length(x))[..., None] for x in (first, second))
    found = 2 * jnp.arctan2(_length(u - v), _length(u + v))
    return jnp.where((_length(first) == 0) | (_length(second) == 0), jnp.pi / 2, found)


def next_token_rank(
    parameters: Parameters, walk: Walk, tokens: Tokens, config: ModelConfig
) -> Int[Array, "station batch place"]:
    """The rank of the token that really comes next, at every station (0: it is the prediction there).

    The last position, whose next token is not known, is left out.
    """
    following = jnp.roll(tokens, -1, axis=1)
    return lens(parameters, walk, following, config).rank[..., :-1]


def jumps(parameters: Parameters, tokens: Tokens, config: ModelConfig) -> Float[Array, "batch place"]:
    """The lengths of the decoding walk's moves, ``|e_x(t+1) - e_x(t)|`` between tokens' output vectors."""
    vectors = in_statistics_dtype(output_vectors(parameters, config).T[tokens])
    return _length(vectors[:, 1:] - vectors[:, :-1])


def random_jump(
    parameters: Parameters, config: ModelConfig, key: Key[Array, ""], pairs: int = 1000
) -> Float[Array, ""]:
    """The mean length of a jump between two different tokens drawn at random: what jumps are compared with."""
    if config.vocabulary < 2:
        raise ValueError("a vocabulary of one token has no jumps")
    first, second = jax.random.split(key)
    a = jax.random.randint(first, (pairs,), 0, config.vocabulary)
    b = (a + jax.random.randint(second, (pairs,), 1, config.vocabulary)) % config.vocabulary
    vectors = output_vectors(parameters, config).T
    return jnp.mean(_length(in_statistics_dtype(vectors[a] - vectors[b])))


def revisits(tokens: Tokens, run: int = 1) -> Bool[Array, "batch place"]:
    """Whether the ``run`` tokens that begin at a place have been walked before in their sequence.

    The mean is the revisit rate; runs of several tokens show loops. Raises ValueError for a run that does not fit.
    """
    length = tokens.shape[1]
    if not 1 <= run <= length:
        raise ValueError(f"a run of {run} tokens does not fit sequences of {length}")
    places = length - run + 1
    equal = tokens[:, :, None] == tokens[:, None, :]
    same = jnp.ones((tokens.shape[0], places, places), bool)
    for ahead in range(run):
        same = same & equal[:, ahead : ahead + places, ahead : ahead + places]
    return jnp.any(same & jnp.tri(places, k=-1, dtype=bool), axis=-1)


def random_initialization(parameters: Parameters, config: ModelConfig, key: Key[Array, ""]) -> Parameters:
    """Control: the same model before any training, in the same dtypes."""
    fresh = initialize(config, key)
    if isinstance(parameters.layers, tuple):
        fresh = split_layers(fresh)
    return jax.tree.map(lambda fresh, like: fresh.astype(like.dtype), fresh, parameters)


def shuffled_layers(parameters: Parameters, config: ModelConfig, key: Key[Array, ""]) -> Parameters:
    """Control: the same layers in a random order in which none keeps its place.

    Raises ValueError for a model of one layer, and for layers with different mixers.
    """
    if config.layers < 2:
        raise ValueError("the layers of a model with one layer cannot be shuffled; take another control")
    if isinstance(config.mixer, tuple) and any(mixer != config.mixer[0] for mixer in config.mixer):
        raise ValueError("layers with different mixers cannot take each other's places; take another control")
    order = around_a_circle(key, config.layers)
    layers = jax.tree.map(lambda x: x[order], stack_layers(parameters).layers)
    shuffled = dataclasses.replace(parameters, layers=layers)
    return split_layers(shuffled) if isinstance(parameters.layers, tuple) else shuffled


def permuted_vocabulary(parameters: Parameters, config: ModelConfig, key: Key[Array, ""]) -> Parameters:
    """Control: every token has the embedding and the output vector of another one, drawn at random.

    The walk of tokens x in it is the original's walk of ``order[x]``, and so of text in which every token is
    consistently replaced. Raises ValueError for one-hot embeddings, which cannot be exchanged.
    """
    if config.embedding == "one_hot":
        raise ValueError("one-hot embeddings cannot be permuted; permute the tokens instead")
    order = jax.random.permutation(key, config.vocabulary)
    unembedding, bias = parameters.unembedding, parameters.unembedding_bias
    return dataclasses.replace(
        parameters,
        embedding=parameters.embedding[order],
        unembedding=None if unembedding is None else unembedding[:, order],
        unembedding_bias=None if bias is None else bias[order],
    )


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1)


def _length(x: Array) -> Array:
    return jnp.linalg.norm(x, axis=-1)


def _ratio(a: Array, b: Array) -> Array:
    return a / jnp.where(b == 0, 1.0, b) * (b != 0)
