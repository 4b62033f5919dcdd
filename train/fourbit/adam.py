"""Adam and AdamW with moments of four bits (Li, Chen and Zhu, NeurIPS 2023, algorithms 1 and 3) for optax.

A step decodes a weight's moments, takes in the gradient, moves by the exact new moments, and codes them again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int, Key

from minitf.parameters import path_name
from minitf.train.fourbit.coding import MomentCoding
from minitf.train.fourbit.layout import Path
from minitf.train.fourbit.moments import Moments, Setting, decoded, empty, encoded, step
from minitf.train.fourbit.quantized import Quantized


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
    stochastic: bool = False,
    seed: int | Int[Array, ""] | Key[Array, ""] = 0,
    **coding: Any,
) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` whose moments are kept as codes.

    With b2 = .999 and the nearest of few levels, the codes of the second moment stop changing; lower ``b2``,
    ``block_de0`` or ``stochastic`` keep them changing.

    An element whose gradient is not finite, or has a square that is not, keeps its moments, and its update is NaN:
    it shows, and no scale is lost. (Small weights, which move as optax's to the bit, do so by 0 where the square
    alone is not finite.) ``optax.apply_if_finite`` around the optimizer leaves out steps that show.
    Within ``optax.MultiSteps`` moments are coded once for each real update: what is coded between is not kept.
    Where that takes too long, add up gradients first and update once.

    Nothing that is not an array is in the state; to go on with another ``coding``, see :func:`as_adam`.

    Args:
        b1, b2, epsilon: as Adam's; they may be traced.
        stochastic: round to a neighboring level at random, with the number as mean.
        seed: of that, a number or a key. What is drawn is a function of it, the step and the weight's number.
        coding: fields of :class:`~minitf.train.fourbit.coding.MomentCoding`.

    Raises:
        ValueError: a setting that has no meaning, naming what would have; when initialized or updated, a
            ``matrix`` of another size.
    """
    how = MomentCoding(**coding)
    setting = Setting(b1, b2, epsilon, how)

    def initial(path: Path, leaf: Any) -> Moments:
        if how.in_float32(path, leaf):
            return Moments(jnp.zeros(leaf.shape, jnp.float32), jnp.zeros(leaf.shape, jnp.float32))
        return empty(how.layout(path, leaf), how)

    def init(parameters: Any) -> Adam4BitState:
        return Adam4BitState(jnp.zeros((), jnp.int32), jax.tree_util.tree_map_with_path(initial, parameters))

    def update(gradients: Any, state: Adam4BitState, parameters: Any = None) -> tuple[Any, Adam4BitState]:
        del parameters
        count = optax.safe_increment(state.count)
        key = jax.random.fold_in(_key(seed), count) if stochastic else None
        leaves, tree = jax.tree_util.tree_flatten_with_path(gradients)
        moments = jax.tree.leaves(state.moments, is_leaf=_is_moments)
        small = {n for n, old in enumerate(moments) if isinstance(old.mean, jax.Array)}
        # All at once, as optax does, whose last bits depend on that.
        done = dict(zip(sorted(small), _in_float32(leaves, moments, small, state.count, setting), strict=True))
        for number, (path, gradient) in enumerate(leaves):
            if number not in small:
                own = None if key is None else jax.random.fold_in(key, number)
                done[number] = step(gradient, moments[number], count, own, how.layout(path, gradient), setting)
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

    ``mask`` is optax's, of the weights that decay; ``settings`` are the others of :func:`scale_by_adam_4bit`.
    """
    return optax.chain(
        scale_by_adam_4bit(b1, b2, epsilon, **settings),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )


def as_adam(state: Adam4BitState, parameters: Any, **coding: Any) -> optax.ScaleByAdamState:
    """The state of ``optax.scale_by_adam`` that codes stand for, float32.

    To go on from a checkpoint with another block, other levels or none: ``as_adam`` with the coding that made it,
    then :func:`from_adam` with the new one.

    Args:
        state: of :func:`scale_by_adam_4bit`.
        parameters: the weights, or their shapes.
        coding: as the state was made with.

    Raises:
        ValueError: the state is of other weights, or has not the shapes that this coding gives. (Levels of as many
            bits, such as linear and de0, cannot be told apart.)
    """
    how = MomentCoding(**coding)
    _check_weights(parameters, state.moments)

    def of_weight(path: Path, leaf: Any, moments: Moments) -> Moments:
        if not isinstance(moments.mean, Quantized):
            _check_shape(path, leaf, moments.mean)
            return moments
        layout = how.layout(path, leaf)
        if not _alike(moments, jax.eval_shape(lambda: empty(layout, how))):
            raise ValueError(
                f"the moments of {path_name(path)}, of shape {tuple(leaf.shape)}, were not coded with "
                f"bits={how.bits}, block={how.block} and second={how.second!r}; say what they were coded with"
            )
        return jax.tree.map(lambda x: x.reshape(leaf.shape), decoded(moments, layout, how))

    exact = jax.tree_util.tree_map_with_path(of_weight, parameters, state.moments)
    one = lambda name: jax.tree.map(lambda m: getattr(m, name), exact, is_leaf=_is_moments)
    return optax.ScaleByAdamState(count=state.count, mu=one("mean"), nu=one("square"))


def from_adam(state: optax.ScaleByAdamState, parameters: Any, **coding: Any) -> Adam4BitState:
    """The state of :func:`scale_by_adam_4bit` with the nearest codes to a state of ``optax.scale_by_adam``.

    ``parameters`` are the weights, or their shapes; ``coding`` is the new one. Raises ValueError for other weights
    than those of the state.
    """
    how = MomentCoding(**coding)
    _check_weights(parameters, state.mu)

    def of_weight(path: Path, leaf: Any, mean: Array, square: Array) -> Moments:
        _check_shape(path, leaf, mean)
        if how.in_float32(path, leaf):
            return Moments(mean.astype(jnp.float32), square.astype(jnp.float32))
        return encoded(mean, square, how.layout(path, leaf), how)

    moments = jax.tree_util.tree_map_with_path(of_weight, parameters, state.mu, state.nu)
    return Adam4BitState(state.count, moments)


def _is_moments(x: Any) -> bool:
    return isinstance(x, Moments)


def _check_weights(parameters: Any, moments: Any) -> None:
    trees: list[Any] = [jax.tree.structure(parameters), jax.tree.structure(moments, is_leaf=_is_moments)]
    if trees[0] != trees[1]:
        raise ValueError("the state is not that of these weights: their trees are not the same")


def _check_shape(path: Path, leaf: Any, mean: Array) -> None:
    if leaf.shape != mean.shape:
        raise ValueError(f"{path_name(path)} is {leaf.shape} and its moments are {mean.shape}")


def _alike(one: Any, other: Any) -> bool:
    """Whether two trees have the same arrays: by place, shape and dtype."""
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    return bool(shapes(one) == shapes(other))


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
