"""The step of sharded weights is that of whole ones, and moments lie where their weights do."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from minitf.train.fourbit import adamw_4bit

mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
weights = {"a": jnp.ones((16, 256)), "layers": {"w": jnp.ones((2, 8, 3, 128))}}
split = {"a": P("data"), "layers": {"w": P(None, "data")}}
place = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, split)
gradients = [jax.tree.map(lambda x: jax.random.normal(jax.random.key(i), x.shape), weights) for i in range(2)]

for settings in ({"second": "rank1_linear"}, {"second": "block_de0", "stochastic": True}):
    optimizer = adamw_4bit(0.1, smallest=0, **settings)
    step = jax.jit(optimizer.update)

    def run(put):
        parameters = put(weights)
        state = optimizer.init(parameters)
        for gradient in gradients:
            update, state = step(put(gradient), state, parameters)
        return update, state

    whole, apart = run(lambda tree: tree), run(place)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(apart), strict=True):
        if one.dtype == jnp.uint8:
            np.testing.assert_array_equal(one, other)
        else:
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6)
    codes = apart[1][0].moments["a"].mean.codes
    assert codes.sharding.spec[0] == "data", codes.sharding
print("alike")
"""


def test_the_step_of_sharded_weights_is_that_of_whole_ones():
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "alike"
