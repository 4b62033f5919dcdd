"""Adam and AdamW with moments of four bits (Li, Chen and Zhu, NeurIPS 2023, algorithms 1 and 3) for optax.

A step decodes a weight's moments, takes in the gradient, moves by the exact new moments, and codes them again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Key

from minitf.train.fourbit.codebooks import dynamic_exponent, linear
from minitf.train.fourbit.layout import Layout, Path, heads_folded, layers_stacked
from minitf.train.fourbit.moments import Moments, Setting, empty, step

Second = Literal[
    "rank1_linear",
    "rank1_de0",
    "block_linear",
    "block_de0",
    "factored",
    "block_de",
    "block_linear_with_zero",
]
Select = Callable[[Path, Any], bool]


@struct.dataclass
class Adam4BitState:
    """``count`` steps were taken, int32; ``moments`` is the tree of the weights with :class:`Moments` for each."""

    count: Any
    moments: Any


def scale_by_adam_4bit(
    b1: Any = 0.9,
    b2: Any = 0.999,
    epsilon: Any = 1e-8,
    *,
    bits: int = 4,
    block: int = 128,
    smallest: int = 4096,
    second: Second = "rank1_linear",
    signed_scale: bool = False,
    exclude: Select = lambda path, leaf: False,
    stochastic: bool | int | Key[Array, ""] = False,
    stacked: Select = layers_stacked,
    matrix: Callable[[Path, tuple[int, ...]], tuple[int, ...]] = heads_folded,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` whose moments are kept as codes.

    The first moment has signed dynamic-exponent levels with a scale for each block. With b2 = .999 and the nearest of
    few levels, the codes of the second stop changing; lower ``b2``, ``block_de0`` or ``stochastic`` against that.

    An element whose gradient is not finite, or has a square that is not, keeps its moments, and its update is NaN:
    it shows, and no scale is lost. ``optax.apply_if_finite`` around the optimizer leaves out such steps wholly.
    Within ``optax.MultiSteps`` moments are coded once for each real update: what the steps between code is not kept.
    Where that costs too much time, add up gradients first, and update once.

    Nothing that is not an array is in the state; other settings (``block``, ``second``, ...) need a new one.

    Args:
        b1, b2, epsilon: as Adam's; they may be traced.
        bits: of a code, 4 or 8.
        block: how many consecutive numbers of a weight have one scale; even.
        smallest: weights of at most so many numbers (of a layer, when stacked) keep moments in float32, and are
            moved as by ``optax.scale_by_adam``.
        second: scales and levels of the second moment. ``rank1`` has a scale for each row and column, ``block`` one
            for each block, which needs no reduction across devices when weights are sharded along leading axes;
            ``linear`` has even levels, ``de0`` those of the dynamic exponent without 0. ``factored`` keeps means of
            rows and columns in float32 (Adafactor), all axes but the last taken as rows. Vectors have block scales
            always, and linear levels when factored. ``block_de`` and ``block_linear_with_zero`` have 0 as a level and
            diverge; they are here to show it.
        signed_scale: a block's scale has the sign of its largest number. Without, negative extremes shrink to .8875
            of themselves in every step, for lack of a level -1.
        exclude: (path, weight) of those to keep in float32, whatever their size.
        stochastic: a seed or a key rounds to a neighboring level at random, with the number as mean; the randomness
            is a function of it, of the number of the step and of the weight.
        stacked: (path, weight) whose first axis is one of layers, each treated by itself.
        matrix: (path, shape) to the shape that one layer's weight is taken as; must have as many numbers.

    Raises:
        ValueError: a setting that has no meaning, naming what would have; when initialized or updated, a ``matrix``
            of another size.
    """
    _check(bits, block, smallest, second, stochastic)
    scale, levels = _second_moment(second, bits)
    setting = Setting(
        b1=b1,
        b2=b2,
        epsilon=epsilon,
        first=dynamic_exponent(bits, signed=True),
        second=levels,
        scale=scale,
        block=block,
        signed_scale=signed_scale,
    )

    def layout(path: Path, leaf: Any) -> Layout:
        one = leaf.shape[1:] if stacked(path, leaf) else leaf.shape
        layers = leaf.shape[0] if stacked(path, leaf) else 1
        folded = tuple(matrix(path, one))
        if math.prod(folded) != math.prod(one):
            raise ValueError(f"matrix makes {folded} of a weight of shape {one}, which has another number of elements")
        if setting.scale == "factored" and len(folded) > 2:
            folded = (math.prod(folded[:-1]), folded[-1])
        return Layout(stacked(path, leaf), layers, folded)

    def initial(path: Path, leaf: Any) -> Moments:
        place = layout(path, leaf)
        if math.prod(place.shape) <= smallest or exclude(path, leaf):
            return Moments(jnp.zeros(leaf.shape, jnp.float32), jnp.zeros(leaf.shape, jnp.float32))
        return empty(place, setting)

    def init(parameters: Any) -> Adam4BitState:
        return Adam4BitState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(initial, parameters))

    def update(gradients: Any, state: Adam4BitState, parameters: Any = None) -> tuple[Any, Adam4BitState]:
        del parameters
        count = optax.safe_increment(state.count)
        key = _key(stochastic, count)
        leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
        updates, moments = [], []
        for number, ((path, gradient), old) in enumerate(
            zip(leaves, tree.flatten_up_to(state.moments), strict=True)
        ):
            own = None if key is None else jax.random.fold_in(key, number)
            if isinstance(old.mean, jax.Array):
                moved, new = _in_float32(gradient, old, state.count, setting)
            else:
                moved, new = step(gradient, old, count, own, layout(path, gradient), setting)
            updates.append(moved.astype(gradient.dtype))
            moments.append(new)
        return tree.unflatten(updates), Adam4BitState(count, tree.unflatten(moments))

    return optax.GradientTransformation(init, update)


def adamw_4bit(
    rate: Rate, weight_decay: float = 0.01, mask: Any = None, **settings: Any
) -> optax.GradientTransformation:
    """AdamW with moments of four bits; the decay is decoupled and multiplied by the rate.

    ``mask`` is optax's, of the weights that decay; ``settings`` are those of :func:`scale_by_adam_4bit`.
    """
    return optax.chain(
        scale_by_adam_4bit(**settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def state_bytes(parameters: Any, optimizer: optax.GradientTransformation) -> int:
    """Bytes of an optimizer's state, from arrays or shapes (``jax.eval_shape``) of the weights; nothing is made."""
    state = jax.eval_shape(optimizer.init, parameters)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _in_float32(gradient: Array, old: Moments, count: Array, setting: Setting) -> tuple[Array, Moments]:
    """A small weight, by optax; ``count`` is that of the steps before."""
    gradient = gradient.astype(jnp.float32)
    before = optax.ScaleByAdamState(count=count, mu=old.mean, nu=old.square)
    moved, after = optax.scale_by_adam(setting.b1, setting.b2, setting.epsilon).update(gradient, before)
    finite = jnp.isfinite(gradient * gradient)
    kept = Moments(jnp.where(finite, after.mu, old.mean), jnp.where(finite, after.nu, old.square))
    return jnp.where(finite, moved, jnp.nan), kept


def _key(stochastic: Any, count: Array) -> Key[Array, ""] | None:
    if stochastic is False:
        return None
    key = stochastic if jnp.issubdtype(jnp.asarray(stochastic).dtype, jax.dtypes.prng_key) else None
    return jax.random.fold_in(jax.random.key(stochastic) if key is None else key, count)


def _second_moment(second: str, bits: int) -> tuple[Any, Any]:
    """Its scales and its levels."""
    scale, _, name = second.partition("_")
    levels = {
        "": partial(linear, bits),
        "linear": partial(linear, bits),
        "linear_with_zero": partial(linear, bits, zero=True),
        "de": partial(dynamic_exponent, bits, signed=False),
        "de0": partial(dynamic_exponent, bits, signed=False, zero=False),
    }
    return scale, levels[name]()


def _check(bits: int, block: int, smallest: int, second: str, stochastic: Any) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; a code takes 4 or 8")
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}; it must be an even number of at least 2")
    if smallest < 0:
        raise ValueError(f"smallest is {smallest}; it must be at least 0")
    if second not in get_args(Second):
        raise ValueError(f"second is {second!r}; it must be one of {', '.join(get_args(Second))}")
    if stochastic is True:
        raise ValueError("stochastic is True; rounding at random needs a seed or a key there")
