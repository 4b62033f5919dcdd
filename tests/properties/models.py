"""Random small models of every architecture, and the few ways in which the properties run them."""

import functools
import math
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from minitf import ModelConfig
from minitf.changes import identity_edit
from minitf.declaration import declare
from minitf.model import walk
from minitf.parameters import path_name
from minitf.rotary import RotaryScaling

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
# Rotary positions for longer texts, so that among few pairs some are slowed and some are not.
SCALINGS = (
    RotaryScaling("linear", 4.0),
    RotaryScaling("llama3", 8.0, 16),
    RotaryScaling("yarn", 4.0, 64, slow_turns=1.0, fast_turns=8.0, attention_factor=1.2),
)
NAMED = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT, "neox": NEOX}


def examples(count):
    """The same few examples on every run: each compiles a model of its own."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.explicit, Phase.generate],  # a smaller counterexample is not worth a hundred compilations
    )


def configs(**fixed):
    """Any ModelConfig that can be, small; ``fixed`` fields are as given.

    Drawn through one number: few examples must differ in many fields, and hypothesis varies few at a time.
    """
    return st.integers(0, 10**9).map(lambda number: random_config(random.Random(number), fixed))


def random_config(generator, fixed):
    pick = lambda *options: generator.choice(options)
    one_hot = pick(False, False, False, True)
    table = one_hot and pick(True, False)
    heads, head_width = pick(1, 2, 4), pick(4, 6)
    fields = {
        "vocabulary": 7 if one_hot else 11,
        "layers": pick(1, 2, 3),
        "width": 7 if one_hot else pick(8, 12),
        "heads": heads,
        "head_width": 0 if table else head_width,
        "key_value_heads": 0 if table else pick(0, 1, heads),
        "length": pick(LENGTH, 8),
        "embedding": "one_hot" if one_hot else "learned",
        "embedding_scale": 1.0 if one_hot else pick(1.0, 3.0),
        "embedding_norm": pick(False, True),
        "tied": not one_hot and pick(False, True),
        "biases": pick(False, True),
        "unembedding_bias": pick(False, True),
        "attention": "table" if table else "query_key",
        "causal": pick(True, True, False),
        "attend_self": pick(True, True, False),
        "position": pick("none", "learned", "sinusoidal", "alibi", "rotary"),
        "rotary_fraction": pick(1.0, 0.5),
        "rotary_interleaved": pick(False, True),
        "norm": pick("none", "l2", "layer", "rms"),
        "norm_placement": pick("pre", "post"),
        "residual": pick(True, True, False),
        "parallel": pick(False, True),
        "feed_forward": pick("none", "relu", "gelu", "gelu_tanh", "swiglu"),
        "hidden": 10,
        "rotary_scaling": pick(None, None, *SCALINGS),
    } | fixed
    try:
        return ModelConfig(**fields)
    except ValueError:
        return random_config(generator, fixed)


def random_parameters(config, seed=0, dtype=jnp.float32):
    """Weights of ordinary size everywhere: no bias is zero, no gain is one, so that each of them is tested."""
    # Rounded by numpy and put where they belong: JAX's own asarray compiles a program for every shape.
    return jax.device_put(_drawn(config, seed, jnp.dtype(dtype)))


@functools.lru_cache(maxsize=64)
def _drawn(config, seed, dtype):
    generator = np.random.default_rng(seed)
    in_dtype = lambda x: np.asarray(x, dtype)

    def draw(path, declaration):
        noise = generator.normal(size=declaration.shape)
        if declaration.distribution == "ones":
            return in_dtype(1 + 0.2 * noise)
        if declaration.distribution == "zeros":
            return in_dtype(0.3 * noise)
        inputs = math.prod(n for axis, n in declaration.axes if axis in inputs_of(path_name(path)))
        return in_dtype(noise / math.sqrt(inputs))

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
    tokens = np.random.default_rng(seed).integers(config.vocabulary, size=(batch, length))
    return jax.device_put(np.asarray(tokens, np.int32))


def shapes(config, parameters=None, tokens=None):
    """The walk's shapes: what edits are sized by."""
    if parameters is None and tokens is None:
        return _usual_shapes(config)
    parameters = random_parameters(config) if parameters is None else parameters
    tokens = random_tokens(config) if tokens is None else tokens
    return jax.eval_shape(lambda p, t: walk(p, t, config), parameters, tokens)


@functools.lru_cache(maxsize=64)
def _usual_shapes(config):
    return shapes(config, random_parameters(config))


def neutral(config):
    return identity_edit(shapes(config))


@functools.lru_cache(maxsize=64, typed=True)  # True is another answer than 1, and equal to it
def compiled(config, unroll=1):
    """The whole walk of a configuration under jit, once for all tests that ask for it."""
    return jax.jit(
        lambda parameters, tokens, edit=None: walk(parameters, tokens, config, edit=edit, unroll=unroll)
    )


@functools.lru_cache(maxsize=64, typed=True)  # True is another answer than 1, and equal to it
def compiled_logits(config, unroll=1):
    """The same, with all of the walk but the logits dropped."""
    return jax.jit(
        lambda parameters, tokens, edit=None: walk(parameters, tokens, config, edit=edit, unroll=unroll).logits
    )


# Where no bit and no cost is at stake: compiling takes longest in these tests.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def in_float64(tree):
    """The same numbers with room; to be used under ``jax.enable_x64``."""
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x, np.float64)), tree)


def largest(x):
    """The largest magnitude in an array."""
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0.0))


def relative_error(found, expected):
    """The largest difference, as a share of the largest expected magnitude."""
    return largest(np.asarray(found, np.float64) - np.asarray(expected, np.float64)) / max(
        largest(expected), 1e-30
    )


def bits(tree):
    """A tree's structure and memory: equal exactly if two trees are, down to the sign of zero."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.asarray(x).tobytes() for x in leaves]


def likeliest_after(logits_of, prompts, continued, length=0):
    """What a full pass says is likeliest at each place of the continuations, ``[prompt, step]``.

    Each prompt stands whole in a row, and after it zeros that nothing before them sees; rows have that length, or
    that of the longest.
    """
    whole = [[*prompt, *after] for prompt, after in zip(prompts, continued, strict=True)]
    tokens = np.zeros((len(whole), length or max(map(len, whole))), np.int32)
    for row, sequence in zip(tokens, whole, strict=True):
        row[: len(sequence)] = sequence
    likeliest = np.argmax(np.asarray(logits_of(tokens)), axis=-1)
    return np.stack([row[len(p) - 1 : len(s) - 1] for row, p, s in zip(likeliest, prompts, whole, strict=True)])
