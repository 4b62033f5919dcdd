"""In bfloat16 everything works as in float32, to the 8 bits that bfloat16 has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, LLAMA, quick_jit, random_parameters, random_tokens, relative_error, shapes

from minitf import walk
from minitf.analysis.patching import patch
from minitf.edits import ablate, steer
from minitf.record import record
from minitf.walk import leaves

BITS = 2.0**-8


def single(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_every_leaf_is_that_of_float32_to_a_few_bits(config):
    half, tokens = random_parameters(config, dtype=jnp.bfloat16), random_tokens(config)
    run = quick_jit(lambda p, t: walk(p, t, config))
    found, expected = run(half, tokens), run(single(half), tokens)
    for (name, one), (_, other) in zip(leaves(found), leaves(expected), strict=True):
        # A norm's scale is a statistic, and is never taken in half precision.
        assert one.dtype == (jnp.float32 if name.endswith("norm_scale") else jnp.bfloat16), name
        finite = np.isfinite(np.asarray(other))
        error = relative_error(np.asarray(one.astype(jnp.float32))[finite], np.asarray(other)[finite])
        assert error < 16 * BITS, (name, error)


def test_edits_records_sweeps_and_gradients_run_in_bfloat16():
    half, tokens = random_parameters(GPT2, dtype=jnp.bfloat16), random_tokens(GPT2)
    like = jax.eval_shape(lambda: walk(half, tokens, GPT2))

    def questions(parameters):
        without = lambda head: walk(parameters, tokens, GPT2, edit=ablate(like, "layers.z", layer=1, head=head))
        effects = jax.vmap(lambda head: record(without(head), "logits", position=-1).logits)(jnp.arange(3))
        lean = lambda dose: walk(
            parameters, tokens, GPT2, edit=steer(like, jnp.ones(12, jnp.bfloat16), layer=0, coefficient=dose)
        ).logits[0, -1, 3]
        return effects, jax.grad(lambda dose: lean(dose).astype(jnp.float32))(jnp.float32(0.5))

    effects, slope = quick_jit(questions)(half)
    expected, expected_slope = quick_jit(questions)(single(half))
    assert effects.dtype == jnp.bfloat16
    assert relative_error(effects.astype(jnp.float32), expected.astype(jnp.float32)) < 16 * BITS
    assert abs(float(slope) - float(expected_slope)) < 0.1 * max(1.0, abs(float(expected_slope)))


def test_a_patching_sweep_runs_in_bfloat16():
    half = random_parameters(GPT2, dtype=jnp.bfloat16)
    run = quick_jit(lambda p, t: walk(p, t, GPT2))
    metric = lambda logits: logits[:, -1, 1].astype(jnp.float32)
    sweep = lambda p: patch(p, run(p, random_tokens(GPT2, 0)), run(p, random_tokens(GPT2, 1)), metric, GPT2)
    assert shapes(GPT2).layers.z.shape[3] == sweep(half).shape[1]
    assert relative_error(sweep(half), sweep(single(half))) < 16 * BITS
