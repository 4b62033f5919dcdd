"""Attribution patching (Nanda 2023): activation patching to first order, everywhere at once, by one gradient."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from minitf.analysis.patching import Metric
from minitf.config import ModelConfig
from minitf.model import walk
from minitf.parameters import Parameters, split_layers
from minitf.walk import Change, Edit, Walk, get, leaf_axes, put

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
) -> dict[str, Array]:
    """Patching every number of the named leaves, to first order: ``(clean - corrupt) * d metric / d leaf``.

    One forward and one backward pass of the corrupted run; each leaf's result has the leaf's shape, and summed
    over all of a patched part it estimates the change (not the value) that
    :func:`minitf.analysis.patching.patch` finds.

    Args:
        metric: of logits, to one number.
        names: leaves that the clean walk holds, such as ``"layers.z"``.

    Raises:
        ValueError: a leaf that does not exist, that the clean walk lacks or that has another shape there.
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
        if like.shape != value.shape:
            raise ValueError(
                f"{name!r} has shape {value.shape} in the clean walk and {like.shape} in the corrupted"
            )

    def measured(added: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        edit: Edit = Edit()
        for name, value in added.items():
            edit = put(edit, name, Change(keep=jnp.ones((), value.dtype), put=value))
        passed = walk(parameters, corrupt_tokens, config, edit=edit, valid=valid)
        return metric(passed.logits), {name: get(passed, name) for name in added}

    nothing = {name: jnp.zeros(get(shapes, name).shape, get(shapes, name).dtype) for name in names}
    slope, corrupt = jax.grad(measured, has_aux=True)(nothing)
    # Forbidden scores are -inf in both walks, and their difference is no number; their slope is zero.
    return {
        name: jnp.where(slope[name] == 0, 0.0, (get(clean, name) - corrupt[name]) * slope[name]) for name in names
    }


def summed(values: Array, places: tuple[str, tuple[str, ...]]) -> Float[Array, "layer ..."]:
    """Attributions of a leaf summed over all axes but the layer and those of ``places``, as ``patch`` has them."""
    name, over = places
    axes = leaf_axes()[name]
    return jnp.sum(values, axis=tuple(i for i, axis in enumerate(axes) if axis != "layer" and axis not in over))
