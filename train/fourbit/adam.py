"""Adam and AdamW with moments of four bits (Li, Chen and Zhu, NeurIPS 2023, algorithms 1 and 3) for optax.

A step decodes a weight's moments, takes in the gradient, moves by the exact new moments, and codes them again.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from minitf.parameters import path_name
from minitf.train.fourbit.codebooks import dynamic_exponent, linear
from minitf.train.fourbit.layout import Layout, Path, heads_folded, layers_stacked
from minitf.train.fourbit.moments import Moments, Setting, empty, step

SECOND = (
    *("rank1_linear", "rank1_de0", "block_linear", "block_de0", "factored"),
    *("block_de", "block_linear_with_zero"),
)
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
    second: str = "rank1_linear",
    signed_scale: bool = False,
    exclude: Select = lambda path, leaf: False,
    stochastic: bool = False,
    seed: int | Int[Array, ""] | Key[Array, ""] = 0,
    stacked: Select = layers_stacked,
    matrix: Callable[[Path, tuple[int, ...]], tuple[int, ...]] = heads_folded,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` whose moments are kept as codes.

    The first moment has signed dynamic-exponent levels with a scale for each block. With b2 = .999 and the nearest
    of few levels, the codes of the second stop changing; lower ``b2``, ``block_de0`` or ``stochastic`` keep them
    changing.

    An element whose gradient is not finite, or has a square that is not, keeps its moments, and its update is NaN:
    it shows, and no scale is lost. ``optax.apply_if_finite`` around the optimizer leaves out such steps wholly.
    Within ``optax.MultiSteps`` moments are coded once for each real update: what is coded between is not kept.
    Where that takes too long, add up gradients first and update once.

    Nothing that is not an array is in the state; other settings (``block``, ``second``, ...) need a new one.

    Args:
        b1, b2, epsilon: as Adam's; they may be traced.
        bits: of a code, 4 or 8.
        block: how many consecutive numbers of a weight have one scale; even.
        smallest: weights of at most so many numbers (of a layer, when stacked) keep moments in float32, and are
            moved as by ``optax.scale_by_adam``.
        second: scales and levels of the second moment. ``rank1`` has a scale for each row and column, ``block``
            one for each block, which needs no reduction across devices when weights are sharded along leading
            axes; ``linear`` has even levels, ``de0`` those of the dynamic exponent without 0. ``factored`` keeps
            means of rows and columns in float32 (Adafactor), all axes but the last taken as rows. Vectors have
            block scales always, and linear levels when factored. ``block_de`` and ``block_linear_with_zero`` have
            0 as a level and diverge; they are here to show it.
        signed_scale: a block's scale has the sign of its largest number. Without, negative extremes shrink to
            .8875 of themselves in every step, for lack of a level -1.
        exclude: (path, weight) of those to keep in float32, whatever their size.
        stochastic: round to a neighboring level at random, with the number as mean.
        seed: of that, a number or a key. What is drawn is a function of it, the step and the weight's number.
        stacked: (path, weight) whose first axis is one of layers, each treated by itself.
        matrix: (path, shape) to the shape that one layer's weight is taken as; it must have as many numbers.

    Raises:
        ValueError: a setting that has no meaning, naming what would have; when initialized or updated, a
            ``matrix`` of another size.
    """
    _check(bits, block, smallest, second)
    scale, levels = second_moment(second, bits)
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
            raise ValueError(f"matrix makes {folded} of {path_name(path)}, whose shape {one} has another size")
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
        key = jax.random.fold_in(_key(seed), count) if stochastic else None
        leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
        moments = jax.tree.leaves(state.moments, is_leaf=lambda x: isinstance(x, Moments))
        small = {n for n, old in enumerate(moments) if isinstance(old.mean, jax.Array)}
        # All at once, as optax does, whose last bits depend on that.
        done = dict(zip(sorted(small), _in_float32(leaves, moments, small, state.count, setting), strict=True))
        for number, (path, gradient) in enumerate(leaves):
            if number not in small:
                own = None if key is None else jax.random.fold_in(key, number)
                done[number] = step(gradient, moments[number], count, own, layout(path, gradient), setting)
        ordered = [done[number] for number in range(len(leaves))]
        updates = [moved.astype(g.dtype) for (moved, _), (_, g) in zip(ordered, leaves, strict=True)]
        kept = jax.tree.unflatten(tree, [new for _, new in ordered])
        return jax.tree.unflatten(tree, updates), Adam4BitState(count, kept)

    return optax.GradientTransformation(init, update)


def adamw_4bit(
    rate: float | Float[Array, ""] | Callable[[Any], Any],
    b1: Any = 0.9,
    b2: Any = 0.999,
    epsilon: Any = 1e-8,
    *,
    weight_decay: Any = 0.01,
    mask: Any = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """AdamW with moments of four bits; the decay is decoupled and multiplied by the rate, which may be traced.

    ``mask`` is optax's, of the weights that decay; ``settings`` are those of :func:`scale_by_adam_4bit`.
    """
    return optax.chain(
        scale_by_adam_4bit(b1, b2, epsilon, **settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def state_bytes(parameters: Any, optimizer: optax.GradientTransformation) -> int:
    """Bytes of an optimizer's state, from arrays or shapes (``jax.eval_shape``) of the weights."""
    state = jax.eval_shape(optimizer.init, parameters)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _in_float32(
    leaves: list, moments: list, small: set[int], count: Array, setting: Setting
) -> list[tuple[Array, Moments]]:
    """The small weights, by optax; ``count`` is that of the steps before."""
    gradients = [leaves[n][1].astype(jnp.float32) for n in sorted(small)]
    old = [moments[n] for n in sorted(small)]
    before = optax.ScaleByAdamState(count=count, mu=[m.mean for m in old], nu=[m.square for m in old])
    moved, after = optax.scale_by_adam(setting.b1, setting.b2, setting.epsilon).update(gradients, before)
    done = []
    for gradient, move, was, mean, square in zip(gradients, moved, old, after.mu, after.nu, strict=True):
        finite = jnp.isfinite(gradient * gradient)
        kept = Moments(jnp.where(finite, mean, was.mean), jnp.where(finite, square, was.square))
        done.append((move, kept))
    return done


def _key(seed: Any) -> Key[Array, ""]:
    is_key = jnp.issubdtype(jnp.asarray(seed).dtype, jax.dtypes.prng_key)
    return seed if is_key else jax.random.key(seed)


def second_moment(second: str, bits: int) -> tuple[Any, Any]:
    """The kind of scales and the levels that a name of ``SECOND`` stands for."""
    scale, _, name = second.partition("_")
    levels = {
        "": partial(linear, bits),
        "linear": partial(linear, bits),
        "linear_with_zero": partial(linear, bits, zero=True),
        "de": partial(dynamic_exponent, bits, signed=False),
        "de0": partial(dynamic_exponent, bits, signed=False, zero=False),
    }
    return scale, levels[name]()


def _check(bits: int, block: int, smallest: int, second: str) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}; a code takes 4 or 8")
    if block < 2 or block % 2:
        raise ValueError(f"block is {block}; it must be an even number of at least 2")
    if smallest < 0:
        raise ValueError(f"smallest is {smallest}; it must be at least 0")
    if second not in SECOND:
        raise ValueError(f"second is {second!r}; it must be one of {', '.join(SECOND)}")
