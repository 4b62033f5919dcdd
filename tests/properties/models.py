"""Random small models of every architecture, and the few ways in which the properties run them."""

import functools
from dataclasses import replace

import jax
import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from minitf import ModelConfig
from minitf.model import walk
from minitf.parameters import declare, path_name

LENGTH, BATCH = 5, 2

GPT2 = ModelConfig(vocabulary=13, layers=2, width=12, heads=3, length=8, biases=True, tied=True)
LLAMA = ModelConfig(
    vocabulary=13,
    layers=2,
    width=16,
    heads=4,
    key_value_heads=2,
    length=8,
    position="rotary",
    norm="rms",
    feed_forward="swiglu",
    hidden=24,
)
BERT = ModelConfig(
    vocabulary=13,
    layers=2,
    width=12,
    heads=2,
    length=8,
    biases=True,
    causal=False,
    norm_placement="post",
    embedding_norm=True,
    feed_forward="gelu",
)
NEOX = replace(GPT2, width=16, heads=2, position="rotary", rotary_fraction=0.5, parallel=True, tied=False)


@st.composite
def configs(draw, **fixed):
    """Any ModelConfig that can be, small; ``fixed`` fields are as given."""
    pick = lambda *options: draw(st.sampled_from(options))
    heads, head_width = pick(1, 2, 4), pick(4, 6)
    one_hot = pick(False, False, False, True)
    table = one_hot and pick(True, False)
    width = 7 if one_hot else pick(8, 12)
    fields = {
        "vocabulary": 7 if one_hot else 11,
        "layers": pick(1, 2, 3),
        "width": width,
        "heads": heads,
        "head_width": 0 if table else head_width,
        "key_value_heads": 0 if table else pick(0, 1, heads),
        "length": pick(LENGTH, 8),
        "embedding": "one_hot" if one_hot else "learned",
        "embedding_scale": 1.0 if one_hot else pick(1.0, 3.0),
        "embedding_norm": draw(st.booleans()),
        "tied": not one_hot and draw(st.booleans()),
        "biases": draw(st.booleans()),
        "unembedding_bias": draw(st.booleans()),
        "attention": "table" if table else "query_key",
        "causal": pick(True, True, False),
        "attend_self": pick(True, True, False),
        "position": pick("none", "learned", "sinusoidal", "alibi", *([] if table else ["rotary"])),
        "rotary_fraction": pick(1.0, 0.5) if head_width == 4 else 1.0,
        "rotary_interleaved": draw(st.booleans()),
        "norm": pick("none", "l2", "layer", "rms"),
        "norm_placement": pick("pre", "post"),
        "residual": pick(True, True, False),
        "parallel": draw(st.booleans()),
        "feed_forward": pick("none", "relu", "gelu", "gelu_tanh", "swiglu"),
        "hidden": 10,
    } | fixed
    try:
        return ModelConfig(**fields)
    except ValueError:
        assume(False)


def random_parameters(config, seed=0, dtype=np.float32):
    """Weights of ordinary size everywhere: no bias is zero, no gain is one, so that each of them is tested."""
    generator = np.random.default_rng(seed)

    def draw(path, declaration):
        shape, name = declaration.shape, path_name(path)
        noise = generator.normal(size=shape)
        if declaration.distribution == "ones":
            return (1 + 0.2 * noise).astype(dtype)
        if declaration.distribution == "zeros":
            return (0.3 * noise).astype(dtype)
        inputs = np.prod([n for axis, n in declaration.axes if axis in inputs_of(name)])
        return (noise / np.sqrt(inputs)).astype(dtype)

    tree = declare(config)
    return jax.tree_util.tree_map_with_path(draw, tree, is_leaf=lambda x: hasattr(x, "distribution"))


def inputs_of(name):
    """The axes that a weight sums over, so that what goes through it keeps its size."""
    if name.endswith("output"):
        return ("head", "head_width")
    if name.endswith("feed_forward.out"):
        return ("hidden",)
    return () if name in ("embedding", "position") else ("width", "key_width")


def random_tokens(config, seed=0, batch=BATCH, length=LENGTH):
    return np.random.default_rng(seed).integers(config.vocabulary, size=(batch, length)).astype(np.int32)


@functools.cache
def compiled(config, unroll=1):
    """The whole walk of a configuration under jit, once for all tests that ask for it."""
    return jax.jit(lambda parameters, tokens, edit=None: walk(parameters, tokens, config, edit=edit, unroll=unroll))


def in_float64(parameters):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)


def largest(x):
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def same_bits(first, second):
    """Whether two trees hold the same numbers bit for bit, the sign of zero included."""
    one, two = jax.tree.leaves(first), jax.tree.leaves(second)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one, two, strict=True)
    )
