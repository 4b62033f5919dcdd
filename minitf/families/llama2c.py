"""llama2.c's checkpoints (Karpathy 2023, the format that its run.c reads): one binary file, float32.

Seven little-endian int32 (width, hidden, layers, heads, key heads, vocabulary, length; a vocabulary below zero
says that the unembedding is a map of its own), then the weights, outputs before inputs, then two rotary tables
that nobody reads. Rotary pairs are neighbors.
"""

import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from minitf.config import ModelConfig
from minitf.families.mapping import Family, Json, Tensor, places, read
from minitf.parameters import Parameters

_HEADER = struct.Struct("<7i")
_NAMES = ("width", "hidden", "layers", "heads", "key_value_heads", "vocabulary", "length")
_NEWER = 0x616B3432  # "ak42", with which the later versions of the format begin


def config(json: Json) -> ModelConfig:
    """The configuration of a header's numbers. Raises ValueError where no model has them."""
    return ModelConfig(
        **json | {"vocabulary": abs(json["vocabulary"]), "tied": json["vocabulary"] > 0},
        position="rotary",
        rotary_interleaved=True,
        norm="rms",
        norm_epsilon=1e-5,
        feed_forward="swiglu",
    )


def json(config: ModelConfig) -> Json:
    """The header's numbers."""
    found = {name: getattr(config, name) for name in _NAMES}
    sign = 1 if config.tied else -1
    return found | {
        "hidden": config.hidden_size,
        "key_value_heads": config.groups,
        "vocabulary": sign * config.vocabulary,
    }


# In the order of the file; {} stands for the layer, of which all follow one another.
FAMILY = Family(
    config,
    json,
    (
        Tensor("token_embedding", ("embedding",), "vocabulary width"),
        Tensor("attention_norm.{}", ("layers.attention_norm.gain",), "width"),
        Tensor("wq.{}", ("layers.attention.query",), "(head head_width) width"),
        Tensor("wk.{}", ("layers.attention.key",), "(key_value_head head_width) width"),
        Tensor("wv.{}", ("layers.attention.value",), "(key_value_head head_width) width"),
        Tensor("wo.{}", ("layers.attention.output",), "width (head head_width)"),
        Tensor("feed_forward_norm.{}", ("layers.feed_forward_norm.gain",), "width"),
        Tensor("w1.{}", ("layers.feed_forward.into",), "hidden width"),
        Tensor("w2.{}", ("layers.feed_forward.out",), "width hidden"),
        Tensor("w3.{}", ("layers.feed_forward.gate",), "hidden width"),
        Tensor("final_norm", ("final_norm.gain",), "width"),
        Tensor("unembedding", ("unembedding",), "vocabulary width"),
    ),
    prefix="",
)


def load(path: Path, dtype: Any = jnp.float32) -> tuple[ModelConfig, Parameters]:
    """Configuration and parameters of a ``.bin`` file.

    Raises:
        ValueError: another format, a header that no model can have, a file of another length than its header
            says, NaN or infinity.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    found = _header(path, raw)
    arrays, place = {}, _HEADER.size
    for name, shape in _shapes(found):
        size = 4 * math.prod(shape)
        if place + size <= len(raw):
            arrays[name] = np.frombuffer(raw, "<f4", size // 4, place).reshape(shape)
        place += size
    if place != len(raw):
        raise ValueError(
            f"{path} should have {place} bytes by its header, but it has {len(raw)}: the file is "
            f"{'cut off' if len(raw) < place else 'longer than it should be'}"
        )
    del arrays["rotary_tables"]
    return found, read(FAMILY, found, arrays, dtype, str(path))


def _header(path: Path, raw: bytes) -> ModelConfig:
    if len(raw) < _HEADER.size:
        raise ValueError(f"{path} has {len(raw)} bytes; a llama2.c checkpoint begins with {_HEADER.size}")
    numbers = _HEADER.unpack_from(raw)
    if numbers[0] == _NEWER:
        raise ValueError(
            f"{path} is a later version of llama2.c's format; minitf reads the one of run.c (version 0)"
        )
    # No such model was ever near these sizes: larger numbers are another kind of file.
    if any(not 0 < abs(n) < 2**24 for n in numbers):
        raise ValueError(f"{path} is no llama2.c checkpoint: its first numbers are {numbers}, meant as {_NAMES}")
    try:
        return config(dict(zip(_NAMES, numbers, strict=True)))
    except ValueError as error:
        raise ValueError(f"{path} is no llama2.c checkpoint: {error}") from error


def _shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    wanted: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for place in places(FAMILY, config):
        wanted.setdefault(place.name.split(".")[0], []).append((place.name, place.shape))
    wanted["rotary_tables"] = [("rotary_tables", (2, config.length, config.head_size // 2))]
    order = [tensor.theirs.split(".")[0] for tensor in FAMILY.tensors]
    order.insert(order.index("unembedding"), "rotary_tables")
    return [item for name in order for item in wanted.get(name, [])]


def as_llama(config: ModelConfig, parameters: Parameters) -> tuple[ModelConfig, Parameters]:
    """The same model as Llama's published weights have it: rotary pairs half a head apart, not neighbors.

    The components of every query and key change places; all scores, and so all that follows, stay the same. It is
    what :func:`minitf.pretrained.save` needs, and it is done only where asked for.
    """
    size = config.head_size
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    attention = parameters.layers.attention
    attention = replace(attention, query=attention.query[..., order], key=attention.key[..., order])
    layers = replace(parameters.layers, attention=attention)
    return replace(config, rotary_interleaved=False), replace(parameters, layers=layers)
