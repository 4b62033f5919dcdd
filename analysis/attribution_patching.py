"""Attribution patching (Nanda 2023): activation patching to first order, everywhere at once, by one gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minitf.analysis.patching import ByLayer, Metric
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.parameters import Parameters, split_layers
from minitf.walk import Change, Edit, Walk, get, leaf_axes, put, stacked

SHALLOW = 12  # layers that are compiled one by one, at most


def attribution_patching(
    parameters: Parameters,
    corrupt_tokens: Int[Array, "batch position"],
    clean: Walk,
    metric: Metric,
    config: ModelConfig,
    names: Sequence[str],
    *,
    valid: Bool[Array, "batch position"] | None = None,
) -> dict[str, ByLayer]:
    """Patching every number of the named leaves, to first order: ``(clean - corrupt) * d metric / d leaf``.

    One forward and one backward pass of the corrupted run; each leaf's result has the leaf's shape (a tuple where
    layers differ), and summed over all of a patched part it estimates the change (not the value) that
    :func:`minitf.analysis.patching.patch` finds.

    Args:
        metric: of logits, to one number.
        names: leaves that the clean walk holds, such as ``"layers.z"``.

    Raises:
        ValueError: a leaf that does not exist, that the clean walk lacks or that has another shape there; a
            metric of several numbers.
    """
    # Backwards, what each layer leaves behind costs a scan more than it does single layers.
    parameters = split_layers(parameters, most=SHALLOW)
    shapes = jax.eval_shape(lambda p, t: walk(p, t, config, valid=valid), parameters, corrupt_tokens)
    for name in names:
        like, value = get(shapes, name), get(clean, name)
        if like is None or value is None:
            raise ValueError(
                f"{'this model has' if like is None else 'the clean walk holds'} no {name!r} to patch"
            )
        sizes, others = jax.tree.map(jnp.shape, value), jax.tree.map(jnp.shape, like)
        if sizes != others:
            raise ValueError(f"{name!r} has shape {sizes} in the clean walk and {others} in the corrupted")

    measures = jax.eval_shape(metric, shapes.logits)
    if getattr(measures, "shape", None) != ():
        raise ValueError(
            f"the metric is {measures}, and a slope is that of one number: take a sum or a mean of it"
        )

    def measured(added: dict[str, ByLayer]) -> tuple[Array, dict[str, ByLayer]]:
        edit: Edit = Edit()
        for name, value in added.items():
            change = jax.tree.map(lambda x: Change(keep=jnp.ones((), x.dtype), put=x), value)
            edit = put(edit, name, change)
        passed = walk(parameters, corrupt_tokens, config, edit=edit, valid=valid)
        return metric(passed.logits), {name: get(passed, name) for name in added}

    nothing = {name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), get(shapes, name)) for name in names}
    slope, corrupt = jax.grad(measured, has_aux=True)(nothing)
    # Forbidden scores are -inf in both walks, and their difference is no number; their slope is zero.
    to_first_order = lambda s, clean, corrupt: jnp.where(s == 0, 0.0, (clean - corrupt) * s)
    return {name: jax.tree.map(to_first_order, slope[name], get(clean, name), corrupt[name]) for name in names}


def summed(values: ByLayer, places: tuple[str, tuple[str, ...]]) -> Float[Array, "layer ..."]:
    """Attributions of a leaf summed over all axes but the layer and those of ``places``, as ``patch`` has them."""
    name, over = places
    axes = leaf_axes()[name][1:]
    rest = tuple(i for i, axis in enumerate(axes) if axis not in over)
    if not isinstance(values, tuple):
        return jnp.sum(values, axis=tuple(1 + i for i in rest))
    each = [None if value is None else jnp.sum(value, axis=rest) for value in values]
    return stacked(each, range(len(over)), jnp.nan)
