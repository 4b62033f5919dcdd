import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from properties.models import configs, examples, quick_jit

from minitf import ModelConfig, count, initialize, mixers
from minitf.declaration import declare
from minitf.parameters import named, path_name

WIDE = ModelConfig(vocabulary=300, layers=2, width=64, heads=4, length=100, biases=True, feed_forward="swiglu")


def declarations(config):
    found = jax.tree_util.tree_leaves_with_path(declare(config), is_leaf=lambda x: hasattr(x, "distribution"))
    return {path_name(path): declaration for path, declaration in found}


@examples(25)
@given(config=configs())
def test_declaration_count_shapes_and_names_agree(config):
    declared = declarations(config)
    made = jax.eval_shape(lambda key: initialize(config, key), jax.random.key(0))
    weights = named(made)
    assert list(weights) == list(declared)
    for name, weight in weights.items():
        assert weight.shape == declared[name].shape
        assert all(axis.isidentifier() for axis, _ in declared[name].axes)
        assert (declared[name].axes[0] == ("layer", config.layers)) == name.startswith("layers.")
    assert count(config) == sum(weight.size for weight in weights.values())


def test_the_parameters_of_gpt2_are_as_many_as_published():
    gpt2 = ModelConfig(vocabulary=50257, layers=12, width=768, heads=12, length=1024, tied=True, biases=True)
    assert count(gpt2) == 124_439_808


def test_the_parameters_of_llama_7b_are_as_many_as_published():
    llama = ModelConfig(
        vocabulary=32000,
        layers=32,
        width=4096,
        heads=32,
        hidden=11008,
        position="rotary",
        norm="rms",
        feed_forward="swiglu",
    )
    assert count(llama) == 6_738_415_616


@pytest.mark.parametrize("initializer", ["normal", "fan_in"])
def test_weights_start_with_the_declared_distribution(initializer):
    config = ModelConfig(**vars(WIDE) | {"initializer": initializer})
    weights, declared = named(quick_jit(lambda k: initialize(config, k))(jax.random.key(0))), declarations(config)
    for name, drawn in weights.items():
        weight, kind, scale = np.asarray(drawn, np.float64), declared[name].distribution, declared[name].scale
        if kind in ("zeros", "ones"):
            np.testing.assert_array_equal(weight, float(kind == "ones"))
            continue
        deviation = scale if initializer == "normal" else scale / math.sqrt(3)
        assert kind == ("normal" if initializer == "normal" else "uniform")
        # Five standard errors of the mean, and of the deviation, of this many draws.
        assert abs(weight.mean()) < 5 * deviation / math.sqrt(weight.size), name
        assert abs(weight.std() / deviation - 1) < 5 / math.sqrt(2 * weight.size), name
        if kind == "uniform":
            assert 0.99 * scale < np.abs(weight).max() <= scale


def test_normal_weights_are_gpt2s_and_output_maps_shrink_with_depth():
    declared = declarations(WIDE)
    assert declared["layers.attention.query"].scale == declared["embedding"].scale == 0.02
    for name in ("layers.attention.output", "layers.feed_forward.out"):
        assert declared[name].scale == pytest.approx(0.02 / 2)


def test_fan_in_bounds_are_one_over_the_root_of_the_inputs():
    declared = declarations(ModelConfig(**vars(WIDE) | {"initializer": "fan_in", "head_width": 8, "hidden": 48}))
    bound = lambda name: declared[name].scale
    assert bound("layers.attention.query") == bound("layers.feed_forward.into") == bound("unembedding") == 1 / 8
    assert bound("layers.attention.output") == pytest.approx(1 / math.sqrt(4 * 8))
    assert bound("layers.feed_forward.out") == pytest.approx(1 / math.sqrt(48))


def test_zeros_are_zero_but_gains_are_one():
    config = ModelConfig(vocabulary=5, width=4, heads=2, length=3, initializer="zeros")
    for name, weight in named(initialize(config, jax.random.key(0))).items():
        np.testing.assert_array_equal(weight, float(name.endswith("gain")), err_msg=name)


def test_equal_keys_give_equal_weights_and_no_two_weights_are_alike():
    make = quick_jit(lambda key: named(initialize(WIDE, key)))
    one, again, other = make(jax.random.key(1)), make(jax.random.key(1)), make(jax.random.key(2))
    drawn = [name for name, d in declarations(WIDE).items() if d.distribution == "normal"]
    for name in drawn:
        np.testing.assert_array_equal(one[name], again[name])
        assert not np.array_equal(one[name], other[name])
    starts = {name: np.asarray(one[name]).ravel()[:4] / declarations(WIDE)[name].scale for name in drawn}
    for name in drawn:
        for rest in drawn:
            assert name == rest or not np.allclose(starts[name], starts[rest])


def test_drawn_together_weights_are_those_drawn_one_by_one():
    hybrid = dataclasses.replace(WIDE, mixer=(mixers.Mamba(), mixers.SpatialGate()))
    for config in (hybrid, dataclasses.replace(WIDE, initializer="fan_in")):
        together = named(initialize(config, jax.random.key(3)))
        for number, (name, declared) in enumerate(declarations(config).items()):
            alone = declared.draw(jax.random.fold_in(jax.random.key(3), number), jnp.float32)
            np.testing.assert_allclose(together[name], alone, rtol=3e-7, err_msg=name)


def test_every_kind_of_key_and_precision_draws_the_declared_numbers():
    declared = declarations(WIDE)
    rounding = {jnp.float32: 3e-7, jnp.bfloat16: 2**-8}
    for key, dtype in ((jax.random.key(1, impl="rbg"), jnp.float32), (jax.random.key(1), jnp.bfloat16)):
        made = named(initialize(WIDE, key, dtype))
        name, number = "unembedding", list(declared).index("unembedding")
        alone = declared[name].draw(jax.random.fold_in(key, number), dtype)
        made, alone = (np.asarray(x, np.float32) for x in (made[name], alone))
        np.testing.assert_allclose(made, alone, rtol=rounding[dtype])


def test_a_key_that_is_no_typed_key_is_refused():
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        initialize(WIDE, jnp.zeros(2, jnp.uint32))


def test_weights_have_the_asked_for_precision():
    config = ModelConfig(vocabulary=5, width=4, heads=2, length=3, biases=True)
    for dtype in (jnp.float32, jnp.bfloat16):
        made = jax.eval_shape(lambda k, d=dtype: initialize(config, k, d), jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype(dtype)}
