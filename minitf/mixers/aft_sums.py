"""The sums of AFT with positions: products of two exponentials wherever all keys are seen by all queries.

``sum_s exp(k_s + w_ts) v_s`` over the keys up to t has an exponential of every triple t, s and channel. Where
every query of a group sees every key of another, ``exp(k_s)`` and ``exp(w_ts)`` can be taken apart, with their
largest exponents kept aside, and a product of two matrices is enough. (Among keys that some of the queries do not
see, a large one would leave nothing of those that they do.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.mixers.contract import past
from minitf.mixers.weighted_mean import EMPTY, Sums, together, weighted_sums

FEW = 16  # positions among which every pair is looked at
# Of what the largest product of two exponentials would be. Less is taken for nothing, also where all of a row is
# less: where a key exceeds the others by so much (69 nats) that the places oppose.
LEAST = 1e-30

Blocks = Float[Array, "batch block position channel"]
Places = Float[Array, "block group query key"]


def evenly_halved(length: int) -> int:
    """The next length from ``length`` on that halves evenly down to a few positions."""
    halvings = max(-(-length // FEW) - 1, 0).bit_length()
    return -(-length >> halvings) << halvings


def in_blocks(x: Float[Array, "batch position channel"], size: int) -> Float[Array, "batch block size channel"]:
    """Blocks of that size; after the end, where no query that counts looks, zeros."""
    batch, length, channels = x.shape
    return jnp.pad(x, ((0, 0), (0, -length % size), (0, 0))).reshape(batch, -1, size, channels)


def up_to_each(k: Blocks, v: Blocks, w: Places) -> Sums:
    """Over the keys of the same block up to each query; groups share out the channels.

    In halves: every query of the second sees all of the first. Inside each the same again.
    """
    batch, blocks, size, channels = k.shape
    if size <= FEW:
        return _every_pair(k, v, w)
    half = size // 2
    tiles = w.reshape(blocks, -1, 2, half, 2, half)
    own = jnp.stack([tiles[:, :, 0, :, 0], tiles[:, :, 1, :, 1]], axis=1).reshape(2 * blocks, -1, half, half)
    halves = lambda x: x.reshape(batch, 2 * blocks, half, channels)
    inside = jax.tree.map(
        lambda x: x.reshape(batch, blocks, 2, half, channels), up_to_each(halves(k), halves(v), own)
    )
    first: Sums = jax.tree.map(lambda x: x[:, :, 0], inside)
    second = together(
        jax.tree.map(lambda x: x[:, :, 1], inside), _of_all(k[:, :, :half], v[:, :, :half], tiles[:, :, 1, :, 0])
    )
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=2), first, second)


def from_the_block_before(k: Blocks, v: Blocks, w: Places) -> Sums:
    """Over all keys of the block before; nothing, for the first."""
    return _later(_of_all(k[:, :-1], v[:, :-1], w[1:]), 1)


def from_further_back(k: Blocks, v: Blocks) -> Sums:
    """Over all keys of the blocks before that, where w is zero."""
    # A block is a key itself: its sums are running sums over so few.
    of_block = jax.nn.logsumexp(k, axis=2), jnp.sum(jax.nn.softmax(k, axis=2) * v, axis=2)
    sums = weighted_sums(*of_block, jnp.zeros(k.shape[-1:], k.dtype))
    return _later(jax.tree.map(lambda x: x[:, :-2, None], sums), 2)


def _later(sums: Sums, blocks: int) -> Sums:
    """Those of each block for one that comes later; the first have nothing."""
    rest = ((0, 0), (blocks, 0), (0, 0), (0, 0))
    return jax.tree.map(lambda x, fill: jnp.pad(x, rest, constant_values=fill), sums, EMPTY)


def _of_all(k: Blocks, v: Blocks, w: Places) -> Sums:
    """Over all keys of each block, for queries that see them all."""
    batch, blocks, size, channels = k.shape
    groups = w.shape[1]
    highest = jax.lax.stop_gradient(jnp.max(k, axis=2, keepdims=True))
    most = jax.lax.stop_gradient(jnp.max(w, axis=3))
    weight, bias = jnp.exp(k - highest), jnp.exp(w - most[..., None])
    by_group = lambda x: x.reshape(batch, blocks, size, groups, -1)
    top, bottom = (
        jnp.einsum("ngts,bnsgc->bntgc", bias, by_group(x)).reshape(batch, blocks, -1, channels)
        for x in (weight * v, weight)
    )
    # The largest exponents of keys and of places may be of different keys: then little is left, or nothing.
    left = bottom > LEAST
    scale = jax.lax.stop_gradient(jnp.where(left, bottom, 1.0))
    peak = highest + _of_channels(jnp.moveaxis(most, 1, 2), channels) + jnp.log(scale)
    top, bottom = (jnp.where(left, x / scale, 0.0) for x in (top, bottom))
    return top, bottom, jnp.where(left, peak, -jnp.inf)


def _every_pair(k: Blocks, v: Blocks, w: Places) -> Sums:
    """Over the keys up to each query, with an exponential for each of them and each channel: block by block."""
    channels = k.shape[-1]
    allowed = past(k.shape[2])[..., None]

    @jax.checkpoint
    def one(now: tuple[Array, Array, Array]) -> Sums:
        k, v, w = now
        exponents = jnp.where(allowed, k[:, None] + _of_channels(jnp.moveaxis(w, 0, 2), channels), -jnp.inf)
        highest = jax.lax.stop_gradient(jnp.max(exponents, axis=2))
        weight = jnp.exp(exponents - highest[:, :, None])
        return jnp.sum(weight * v[:, None], axis=2), jnp.sum(weight, axis=2), highest

    found = jax.lax.map(one, (jnp.moveaxis(k, 1, 0), jnp.moveaxis(v, 1, 0), w))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


def _of_channels(x: Float[Array, "*axes group"], channels: int) -> Float[Array, "*axes channel"]:
    """What a group has, for each of its channels."""
    return jnp.repeat(x, channels // x.shape[-1], axis=-1)
