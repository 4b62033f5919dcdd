"""Weights rewritten so that a model is simpler to read and says the same: only ever where it is asked for.

A norm's gain and offset are linear, and belong to the maps that read the norm as much as to the norm itself; a
bias on the values reaches every query alike; LayerNorm does not see what all components of the stream have in
common. So each of these can be moved or removed.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from minitf.config import ModelConfig
from minitf.declaration import Declaration, check_fit, declare
from minitf.filter import in_statistics_dtype
from minitf.parameters import Norm, Parameters, Transform, Weight, named, path_name

Model = tuple[Parameters, ModelConfig]


def fold(
    parameters: Parameters,
    config: ModelConfig,
    *,
    norms: bool = False,
    value_biases: bool = False,
    center_writers: bool = False,
    center_unembedding: bool = False,
) -> Model:
    """The same model in other weights: whatever is asked for, in the order of the options.

    A tied embedding becomes two maps, of which one changes alone; where an offset or a bias needs a place that the
    model has not, the configuration gets ``biases`` or ``unembedding_bias``, with zeros where nothing is to be
    added. The dtype stays; in half precision its rounding shows.

    Args:
        norms: gain and offset of the norms before the sub-layers, and of the final one, go into the maps that read
            them: the gains left are exactly one, the offsets exactly zero. Logits, associations and the residual
            stream stay as they are, and so do the norm of the embedding and those of queries and keys; the context
            vectors lose gain and offset.
        value_biases: what the values' biases add to each step goes into the output bias, and they become zero.
            Logits, associations and stream stay; the heads' own steps lose their share. Where a row of an
            association does not sum to one (under an edit, or in padding that sees no key), the models differ.
        center_writers: what is written to the stream, from the embedding to the last bias, gets mean zero over
            ``width``. Logits and associations stay; the stream loses its mean, which LayerNorm takes away anyway.
        center_unembedding: the output vectors and their biases get mean zero over ``vocabulary``. Associations and
            probabilities stay, but all logits of a position move by one number.

    Raises:
        ValueError: nothing is asked for, the parameters are not the configuration's, or the model is one whose
            output would change; the message says why.
    """
    check_fit(parameters, config)
    if isinstance(parameters.layers, tuple) and config.mixer is None:
        raise ValueError("folding takes the layers stacked: minitf.parameters.stack_layers makes them so")
    if not (norms or value_biases or center_writers or center_unembedding):
        raise ValueError("nothing is asked for: set norms, value_biases, center_writers or center_unembedding")
    if config.mixer is not None:
        raise ValueError("folding knows the weights of softmax attention alone; this model names its mixers")
    model = (parameters, config)
    model = _fold_norms(*model) if norms else model
    model = _fold_value_biases(*model) if value_biases else model
    model = _center_writers(*model) if center_writers else model
    return _center_unembedding(*model) if center_unembedding else model


def _fold_norms(parameters: Parameters, config: ModelConfig) -> Model:
    if config.norm not in ("layer", "rms"):
        raise ValueError(f"norm is {config.norm!r}, which has no gain or offset to fold")
    if config.post_norm:
        raise ValueError(
            "norm_placement is 'post': what such a norm gives is the residual stream, and not only what maps read"
        )
    if config.attention == "table":
        raise ValueError("table attention has no maps to fold a gain into: its values are what the norm gives")
    biases = {"biases": True, "unembedding_bias": True} if config.norm == "layer" else {}
    parameters, config = _with_room(parameters, config, tied=False, **biases)
    layers, transform, last = parameters.layers, parameters.unembedding_transform, parameters.final_norm
    layers = replace(
        layers,
        attention_norm=_plain(layers.attention_norm),
        attention=_into(layers.attention_norm, layers.attention, "query", "key", "value"),
        feed_forward_norm=_plain(layers.feed_forward_norm),
        feed_forward=_into(layers.feed_forward_norm, layers.feed_forward, "into", "gate"),
    )
    if config.unembedding_transform:
        weight, bias = _folded(last, transform.weight, transform.bias)
        last, transform = transform.norm, Transform(weight, bias, _plain(transform.norm))
    parameters = _into(last, parameters, "unembedding")
    final_norm = _plain(parameters.final_norm)
    return replace(parameters, layers=layers, final_norm=final_norm, unembedding_transform=transform), config


def _into(norm: Norm, maps: Any, *names: str) -> Any:
    """The maps of these names, where there are such, with a norm's gain and offset in them and in their biases."""
    folded: dict[str, Weight] = {}
    for name in names:
        if getattr(maps, name) is not None:
            weight, bias = _folded(norm, getattr(maps, name), getattr(maps, f"{name}_bias"))
            folded |= {name: weight, f"{name}_bias": bias}
    return replace(maps, **folded)


def _folded(norm: Norm, weight: Weight, bias: Weight) -> tuple[Weight, Weight]:
    """``(x * gain + offset) @ weight + bias`` as one map of ``x``; in all layers at once if ``layer`` leads."""

    def beside(x: Float[Array, "*layer width"]) -> Array:
        return in_statistics_dtype(x).reshape(x.shape + (1,) * (weight.ndim - x.ndim))

    if norm.offset is not None:
        shift = jnp.sum(beside(norm.offset) * weight, axis=norm.offset.ndim - 1)
        bias = (bias + shift).astype(bias.dtype)
    return (beside(norm.gain) * weight).astype(weight.dtype), bias


def _plain(norm: Norm) -> Norm:
    """A norm that only divides."""
    return Norm(
        gain=None if norm.gain is None else jnp.ones_like(norm.gain),
        offset=None if norm.offset is None else jnp.zeros_like(norm.offset),
    )


def _fold_value_biases(parameters: Parameters, config: ModelConfig) -> Model:
    if parameters.layers.attention.value_bias is None:
        raise ValueError("this model has no value biases to fold")
    if not config.attend_self:
        raise ValueError(
            "attend_self is False: the first query sees no key and gets no value's bias, as all the others do"
        )
    parameters, config = _with_room(parameters, config, biases=True)
    attention = parameters.layers.attention
    # With grouped keys, several heads carry the bias of one group, each through its own output map.
    of_heads = jnp.repeat(in_statistics_dtype(attention.value_bias), config.heads // config.groups, axis=1)
    shift = jnp.sum(of_heads[..., None] * attention.output, axis=(1, 2))
    attention = replace(
        attention,
        value_bias=jnp.zeros_like(attention.value_bias),
        output_bias=(attention.output_bias + shift).astype(attention.output_bias.dtype),
    )
    return replace(parameters, layers=replace(parameters.layers, attention=attention)), config


def _center_writers(parameters: Parameters, config: ModelConfig) -> Model:
    refusals = {
        f"norm is {config.norm!r}; only LayerNorm takes the stream's mean away": config.norm != "layer",
        "norm_placement is 'post': the norms write to the stream, and a gain cannot be centered": config.post_norm,
        "the norm of the embedding writes to the stream, and a gain cannot be centered": config.embedding_norm,
        "one-hot embeddings are no weights, and cannot be centered": config.embedding == "one_hot",
        "sinusoidal positions are no weights, and cannot be centered": config.position == "sinusoidal",
        "table attention has no map that writes to the stream": config.attention == "table",
    }
    for refusal, applies in refusals.items():
        if applies:
            raise ValueError(refusal)
    parameters, config = _with_room(parameters, config, tied=False)
    layers, attention, feed_forward = (
        parameters.layers,
        parameters.layers.attention,
        parameters.layers.feed_forward,
    )
    return replace(
        parameters,
        embedding=_centered(parameters.embedding),
        position=_centered(parameters.position),
        token_type=_centered(parameters.token_type),
        layers=replace(
            layers,
            attention=replace(
                attention,
                output=_centered(attention.output),
                output_bias=_centered(attention.output_bias),
            ),
            feed_forward=replace(
                feed_forward, out=_centered(feed_forward.out), out_bias=_centered(feed_forward.out_bias)
            ),
        ),
    ), config


def _center_unembedding(parameters: Parameters, config: ModelConfig) -> Model:
    parameters, config = _with_room(parameters, config, tied=False)
    return replace(
        parameters,
        unembedding=_centered(parameters.unembedding),
        unembedding_bias=_centered(parameters.unembedding_bias),
    ), config


def _centered(weight: Float[Array, "*axes"] | None) -> Float[Array, "*axes"] | None:
    """Less its mean over the last axis."""
    if weight is None:
        return None
    x = in_statistics_dtype(weight)
    return (x - jnp.mean(x, axis=-1, keepdims=True)).astype(weight.dtype)


def _with_room(parameters: Parameters, config: ModelConfig, **changes: Any) -> Model:
    """The same model under a configuration with more weights: an untied embedding twice, the others zero."""
    if config.tied and not changes.get("tied", True):
        parameters = replace(parameters, unembedding=parameters.embedding.T)
    config, weights = replace(config, **changes), named(parameters)
    dtype = jax.tree.leaves(parameters)[0].dtype

    def weight(path: tuple[Any, ...], declared: Declaration) -> Array:
        name = path_name(path)
        return weights[name] if name in weights else jnp.zeros(declared.shape, dtype)

    tree = declare(config)
    return jax.tree_util.tree_map_with_path(weight, tree, is_leaf=lambda x: isinstance(x, Declaration)), config
