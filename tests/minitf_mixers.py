"""Every mixer, in each of its kinds, in a small model: what the tests of the contract go over."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from properties.models import random_parameters

from minitf import ModelConfig, mixers

WIDTH, HEADS, LENGTH = 8, 2, 150

EVERY = {
    "softmax": mixers.Softmax(),
    "window": mixers.Softmax(window=3),
    "uniform": mixers.Uniform(),
    "exponential": mixers.ExponentialAverage(),
    "frozen": mixers.Frozen(),
    "synthesizer": mixers.Synthesizer("trained"),
    "synthesizer fixed": mixers.Synthesizer("fixed"),
    "synthesizer factored": mixers.Synthesizer("factored", rank=3),
    "synthesizer dense": mixers.Synthesizer("dense"),
    "proximity": mixers.Proximity(),
    "fourier": mixers.Fourier(),
    "gmlp": mixers.SpatialGate(),
    "mlp-mixer": mixers.TokenNetwork(),
    "linear": mixers.LinearAttention(),
    "retention": mixers.Retention(),
    "delta": mixers.DeltaNet(),
    "aft full": mixers.AttentionFree("full"),
    "aft simple": mixers.AttentionFree("simple"),
    "aft local": mixers.AttentionFree("local", window=3),
    "aft conv": mixers.AttentionFree("conv", window=3),
    "rwkv4": mixers.Rwkv4(),
    "rwkv6": mixers.Rwkv6(rank=3),
    "s4d": mixers.DiagonalStateSpace(states=4),
    "mamba": mixers.Mamba(states=4),
    "mamba2": mixers.Mamba2(states=4),
    "mingru": mixers.MinimalGru(),
    "gru": mixers.Gru(),
    "lstm": mixers.Lstm(),
    "convolution": mixers.Convolution(taps=3),
}
EXAMPLE = "previous"  # that of CONTRIBUTING
ONE_WAY = [name for name in EVERY if name != "fourier"]
ASSOCIATED = [name for name in EVERY if name != "mlp-mixer"]


@functools.cache
def example():
    """The mixer that CONTRIBUTING shows, as it stands there."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall("```python\n(.*?)```", text, re.S) if "class Previous" in block)
    names = {"__name__": __name__}
    exec(code.partition("\nconfig = ")[0], names)
    return names["Previous"]()


def model(name, **fields):
    """A configuration whose layers are of that mixer."""
    return ModelConfig(
        **{
            "vocabulary": 11,
            "layers": 2,
            "width": WIDTH,
            "heads": HEADS,
            "length": LENGTH,
            "mixer": example() if name == EXAMPLE else EVERY[name],
            "causal": name != "fourier",
        }
        | fields
    )


def weights(config, dtype=jnp.float32, seed=0):
    """The mixer's weights of the first layer."""
    whole = random_parameters(config, seed, dtype).layers.attention
    return jax.tree.map(lambda x: jax.device_put(np.asarray(x)[0]), whole)


def inputs(length, batch=2, dtype=jnp.float32, seed=0):
    return jax.device_put(np.asarray(np.random.default_rng(seed).normal(size=(batch, length, WIDTH)), dtype))


def filtered(mixer, own, x, config):
    before = jnp.pad(x, ((0, 0), (mixer.reach, 0), (0, 0)))
    return mixer.filter(own, before, config, jnp.arange(x.shape[1])[None])


def stepped(mixer, own, x, config):
    """The aggregate of every position by the recurrence alone, filters and all."""
    batch, length, _ = x.shape
    state = mixer.empty_state(config, batch, length, x.dtype)
    tail = jnp.zeros((batch, mixer.reach, WIDTH), x.dtype)

    def one(carry, at):
        tail, state = carry
        now, position = at
        window = jnp.concatenate([tail, now[:, None]], axis=1)
        f = mixer.filter(own, window, config, jnp.full((batch, 1), position), state)
        z, state = mixer.step(own, f, state, jnp.full((batch,), position), config)
        return (window[:, 1:], state), z[:, 0]

    _, z = jax.lax.scan(one, (tail, state), (jnp.moveaxis(x, 1, 0), jnp.arange(length)))
    return jnp.moveaxis(z, 0, 1)
