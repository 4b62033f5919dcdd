"""The forward pass from a layer on: what an edit at that layer can change, without the layers before it."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

from minitf.config import ModelConfig
from minitf.model import Stream, _fit_edit, _layer, _places, finish, run_layers
from minitf.parameters import Parameters
from minitf.walk import Edit, LayerWalk, Walk, apply


def walk_from(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int,
    *,
    edit: Edit | None = None,
    valid: Bool[Array, "batch position"] | None = None,
    unroll: int | bool = 1,
) -> Walk:
    """Run layers ``layer``.. from their start, and return the walk of those layers.

    From ``walk(...).layers.resid_pre[layer]`` it is the rest of that walk: ``start`` is the stream, and
    ``layers`` holds the layers that ran. Under ``jit`` what the caller drops is not computed.

    Args:
        parameters: of the whole model.
        layer: the first layer that runs; ``config.layers`` runs the end alone.
        edit: changes, sized by the layers that run (its layer 0 is ``layer``).
        valid, unroll: as :func:`minitf.walk`.

    Raises:
        ValueError: there is no such layer, or an edit does not fit the layers that run.
    """
    if not 0 <= layer <= config.layers:
        raise ValueError(
            f"the walk cannot go on from layer {layer}; this model has layers 0 to {config.layers - 1}"
        )
    _check_stream(stream, config)
    edit, layers = edit or Edit(), LayerWalk()
    if edit.token_embedding is not None or edit.position_embedding is not None:
        raise ValueError("a resumed walk has no embeddings to edit; edit its start")
    if layer < config.layers:
        rest = dataclasses.replace(config, layers=config.layers - layer)
        edit = _fit_edit(edit, rest)
    elif jax.tree.leaves(edit.layers):
        raise ValueError("no layer is left to run, so none can be edited")
    start = end = apply(edit.start, stream)
    if layer < config.layers:
        weights = jax.tree.map(lambda x: x[layer:], parameters.layers)
        places = _places(stream.shape[1], config, valid)
        end, layers = run_layers(weights, start, rest, edit.layers, places, unroll=unroll)
    return finish(parameters, start, layers, end, config, edit)


def layer_walk(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int | Int[Array, ""],
    *,
    edit: LayerWalk | None = None,
    valid: Bool[Array, "batch position"] | None = None,
) -> LayerWalk:
    """Run one layer alone; its walk, and the edit, have no ``layer`` axis. A traced ``layer`` serves for sweeps.

    Raises ValueError for a layer that does not exist.
    """
    if isinstance(layer, int) and not 0 <= layer < config.layers:
        raise ValueError(f"there is no layer {layer}; this model has layers 0 to {config.layers - 1}")
    _check_stream(stream, config)
    weights = jax.tree.map(lambda x: x[layer], parameters.layers)
    return _layer(stream, weights, config, edit or LayerWalk(), _places(stream.shape[1], config, valid))


def end_from(
    parameters: Parameters,
    stream: Float[Array, "batch position width"],
    config: ModelConfig,
    layer: int | Int[Array, ""],
    *,
    valid: Bool[Array, "batch position"] | None = None,
) -> Float[Array, "batch position width"]:
    """The end of the walk from the start of ``layer`` on, unedited.

    ``layer`` may be traced: one program serves for every layer of a sweep, and runs only the layers that are left.
    It cannot be differentiated by reverse mode then; :func:`walk_from` can.
    """
    _check_stream(stream, config)

    def one(number: Int[Array, ""], stream: Stream) -> Stream:
        return layer_walk(parameters, stream, config, number, valid=valid).resid_post

    return jax.lax.fori_loop(layer, config.layers, one, stream)


def _check_stream(stream: Stream, config: ModelConfig) -> None:
    length, width = stream.shape[1:]
    if width != config.width:
        raise ValueError(f"the stream is {width} wide; this model's is {config.width}")
    if length > config.length:
        raise ValueError(f"{length} positions are more than the model's length of {config.length}")
