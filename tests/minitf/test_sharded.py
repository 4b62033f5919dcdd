"""Records, edits, sweeps and gradients of a sharded model are those of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from minitf import ModelConfig, initialize, walk
from minitf.edits import ablate, patch, steer
from minitf.declaration import declare
from minitf.record import record

config = ModelConfig(vocabulary=32, layers=2, width=16, heads=4, length=8, biases=True)
parameters = initialize(config, jax.random.key(0))
tokens = jax.random.randint(jax.random.key(1), (4, 6), 0, 32)
others = jax.random.randint(jax.random.key(2), (4, 6), 0, 32)
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
split = {"head": "tensor", "key_value_head": "tensor", "hidden": "tensor", "vocabulary": "tensor"}

def place(weight, declaration):
    names = [split.get(axis) for axis, _ in declaration.axes]
    return jax.device_put(weight, NamedSharding(mesh, P(*names)))

sharded = jax.tree.map(place, parameters, declare(config))
spread = jax.device_put(tokens, NamedSharding(mesh, P("data")))

def questions(p, t):
    passed = walk(p, t, config)
    like = jax.eval_shape(lambda: passed)
    both = record(passed, ["layers.pattern", "layers.z", "logits"], layer=[1], position=-1)
    source = walk(p, others, config)
    edited = walk(p, t, config, edit=patch(like, "layers.z", source, layer=0, head=1)).logits
    steered = walk(p, t, config, edit=steer(like, jnp.arange(16.0), layer=0)).layers.resid_post
    without = lambda i: walk(p, t, config, edit=ablate(like, "layers.z", layer=i // 4, head=i % 4)).logits[:, -1]
    slope = jax.grad(lambda c: walk(p, t, config, edit=steer(like, jnp.ones(16), layer=1, coefficient=c))
                     .logits[0, -1, 3])(0.5)
    return both, edited, steered, jax.vmap(without)(jnp.arange(8)), slope

whole = jax.jit(questions)(parameters, tokens)
apart = jax.jit(questions)(sharded, spread)
assert len(jax.tree.leaves(apart)) == len(jax.tree.leaves(whole)) == 7
logits = jax.jit(lambda p, t: walk(p, t, config).logits)(sharded, spread)
assert len({s.device for s in logits.addressable_shards}) == 4 and not logits.sharding.is_fully_replicated
for one, other in zip(jax.tree.leaves(apart), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-5, atol=1e-5)
print("alike")
"""


def test_what_is_asked_of_a_sharded_model_is_answered_as_of_a_whole_one():
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "alike"
