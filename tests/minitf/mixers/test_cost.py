"""What a mixer's aggregate costs grows with the sequence as it says: counted, so the same on every machine."""

import math

import jax
import jax.numpy as jnp
import pytest
from minitf_mixers import EVERY, WIDTH, filtered, model

from minitf.analysis.flops import flops
from minitf.declaration import initialize


@pytest.mark.parametrize("name", [name for name in EVERY if name != "fourier"])
def test_the_aggregates_operations_grow_as_said(name):
    def of(length):
        config = model(name, length=length)
        own = jax.eval_shape(lambda: initialize(config, jax.random.key(0)).layers.attention)
        own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), own)
        x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.float32)
        f = jax.eval_shape(lambda own, x: filtered(config.mixer, own, x, config), own, x)
        return flops(lambda own, f: config.mixer.aggregate(own, f, config), own, f)

    grown = math.log(of(8192) / of(2048)) / math.log(4)
    assert grown == pytest.approx(model(name).mixer.about(model(name)).exponent, abs=0.15)
