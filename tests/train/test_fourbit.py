import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization, struct
from fourbit_weights import BLOCK, FIRST, LEVELS, few_bits, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf import ModelConfig
from minitf.declaration import initialize
from minitf.train import fourbit
from minitf.train.fourbit import layout, quantized
from minitf.train.fourbit.adam import adamw_4bit, scale_by_adam_4bit, state_bytes
from minitf.train.fourbit.quantized import dequantize


def weights():
    """With whole blocks along the last axis, of odd sizes, stacked, and none."""
    return {
        "matrix": jnp.zeros((12, 32)),
        "odd": jnp.zeros((7, 11)),
        "none": None,
        "layers": {"w": jnp.zeros((2, 5, 16))},
    }


def trained(optimizer, steps, like=None, seed=0):
    """The last update and state."""
    like = weights() if like is None else like
    state, update, step = optimizer.init(like), None, jax.jit(optimizer.update)
    for number in range(steps):
        update, state = step(gradients(number, like, seed), state)
    return update, state


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


@pytest.mark.parametrize("second", ["rank1_linear", "block_linear", "factored"])
def test_slices_one_after_another_take_the_step_of_the_whole(second, monkeypatch):
    like = {"matrix": jnp.zeros((24, 32)), "layers": {"wide": jnp.zeros((2, 12, 16)), "odd": jnp.zeros((3, 5, 7))}}
    update, state = trained(few_bits(second), 4, like)
    monkeypatch.setattr(layout, "SLICE_NUMBERS", 50)
    monkeypatch.setattr(layout, "LEAST_SLICE_NUMBERS", 0)
    assert layout.slices(layout.Layout(True, 2, (12, 16)), BLOCK) == 4
    sliced_update, sliced = trained(few_bits(second), 4, like)
    if second != "factored":  # whose means are added up in another order
        assert same(sliced, state)
    # An update is below some 1 in size, and a mean that cancels has the rounding of what cancelled.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), sliced_update, update)


def check_bits_of_small_weights(jit):
    like = {"a": jnp.zeros((12, 32)), "b": jnp.zeros(75)}
    ours, theirs = scale_by_adam_4bit(b2=0.95), optax.scale_by_adam(b2=0.95)
    state, expected_state = ours.init(like), theirs.init(like)
    for number in range(5):
        update, state = jit(ours.update)(gradients(number, like), state)
        expected, expected_state = jit(theirs.update)(gradients(number, like), expected_state)
        assert same(update, expected)
    assert same(jax.tree.map(lambda m: m.mean, state.moments, is_leaf=is_moments), expected_state.mu)
    assert same(jax.tree.map(lambda m: m.square, state.moments, is_leaf=is_moments), expected_state.nu)


def test_small_weights_are_moved_as_by_optax_bit_for_bit():
    check_bits_of_small_weights(lambda f: f)


@pytest.mark.optimized
def test_small_weights_are_moved_as_by_optax_bit_for_bit_when_compiled():
    check_bits_of_small_weights(jax.jit)


def is_moments(x):
    return isinstance(x, fourbit.Moments)


def test_size_is_that_of_one_layer_and_excluded_weights_are_never_quantized():
    state = scale_by_adam_4bit(smallest=79, exclude=lambda path, leaf: leaf.shape == (12, 32)).init(weights())
    kinds = {name: isinstance(m.mean, fourbit.Quantized) for name, m in tensors_at(state.moments).items()}
    # A layer of "w" has 80 numbers.
    assert kinds == {"['matrix']": False, "['odd']": False, "['layers']['w']": True}


def tensors_at(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_moments)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def decoded_squares(state, second="rank1_linear"):
    kind = "rank1" if second.startswith("rank1") else "block"
    name, shape = "['matrix']", (12, 32)
    return np.asarray(
        dequantize(tensors_at(state.moments)[name].square, shape, LEVELS[second], block=BLOCK, scale=kind)
    )


@pytest.mark.parametrize("second", list(LEVELS))
def test_no_second_moment_is_zero_once_there_was_a_gradient(second):
    like = {"matrix": jnp.zeros((12, 32))}
    optimizer = few_bits(second)
    one = {"matrix": jnp.zeros((12, 32)).at[3, 5].set(1e-3).at[7, 20].set(10.0)}
    step = jax.jit(optimizer.update)
    _, state = step(one, optimizer.init(like))
    squares = decoded_squares(state, second)
    if second == "rank1_linear":
        reached = np.ix_([3, 7], [5, 20])
    else:
        reached = (np.array([3, 7])[:, None], np.array([range(16), range(16, 32)]))
    assert np.all(squares[reached] > 0) and np.count_nonzero(squares) == squares[reached].size
    for number in range(3):
        _, state = step(gradients(number, like), state)
    assert np.all(decoded_squares(state, second) > 0)


@pytest.mark.parametrize("second", ["rank1_linear", "block_de0", "factored"])
def test_without_a_gradient_nothing_moves_and_all_moments_stay_exactly_zero(second):
    optimizer = few_bits(second)
    zero, step = weights(), jax.jit(optimizer.update)
    update, state = step(zero, optimizer.init(zero))
    update, state = step(zero, state)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(update))
    assert all(np.all(np.asarray(m.mean.scales[0]) == 0) for m in tensors_at(state.moments).values())
    if second in LEVELS:
        assert np.all(decoded_squares(state, second) == 0)


def test_layers_are_treated_one_by_one():
    stack = {"layers": {"w": jnp.zeros((3, 6, 16))}}
    large = {"layers": {"w": gradients(0, stack)["layers"]["w"] * jnp.array([1.0, 1e3, 1.0])[:, None, None]}}
    optimizer = few_bits()
    step = jax.jit(optimizer.update)
    update, _ = step(large, optimizer.init(stack))
    for i in range(3):
        one = {"w": large["layers"]["w"][i]}
        alone, _ = step(one, optimizer.init(one))
        assert np.array_equal(alone["w"], update["layers"]["w"][i])


def test_heads_are_folded_so_that_rows_and_columns_are_those_of_a_map():
    config = ModelConfig(vocabulary=11, layers=2, width=32, heads=4, length=8, biases=True)
    shapes = jax.eval_shape(lambda: few_bits().init(initialize(config, jax.random.key(0))))
    moments = shapes.moments.layers.attention
    of = lambda m: [x.shape for x in m.square.scales]
    assert of(moments.query) == [(2, 32), (2, 32)] and of(moments.output) == [(2, 32), (2, 32)]
    assert of(moments.query_bias) == [(2, 2)]
    assert of(shapes.moments.layers.feed_forward.into) == [(2, 32), (2, 128)]
    assert of(shapes.moments.embedding) == [(11,), (32,)]


def test_a_gradient_that_is_not_finite_shows_in_its_update_and_leaves_all_moments_alone():
    for second in ("rank1_linear", "factored"):
        optimizer = few_bits(second)
        state, step = optimizer.init(weights()), jax.jit(optimizer.update)
        _, state = step(gradients(0, weights()), state)
        bad = jax.tree.map(
            lambda g: g.reshape(-1).at[1].set(jnp.nan).at[5].set(jnp.inf).reshape(g.shape), gradients(1, weights())
        )
        zero = jax.tree.map(
            lambda g: g.reshape(-1).at[1].set(0).at[5].set(0).reshape(g.shape), gradients(1, weights())
        )
        update, after = step(bad, state)
        other, _ = step(zero, state)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
        flat = lambda tree: [np.asarray(x).reshape(-1) for x in jax.tree.leaves(tree)]
        for found, expected in zip(flat(update), flat(other), strict=True):
            assert np.array_equal(np.flatnonzero(np.isnan(found)), [1, 5])
            if second != "factored":
                assert np.array_equal(np.delete(found, [1, 5]), np.delete(expected, [1, 5]))


def test_a_square_that_overflows_leaves_moments_alone_and_shows_in_weights_that_are_coded():
    optimizer, large = few_bits("rank1_linear"), jax.tree.map(lambda g: g.reshape(-1), weights())
    state = optimizer.init(large)
    update, after = optimizer.update(jax.tree.map(lambda g: jnp.zeros_like(g).at[5].set(-1e25), large), state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after))
    for moved, kept in zip(
        jax.tree.leaves(update), jax.tree.leaves(after.moments, is_leaf=is_moments), strict=True
    ):
        assert moved[5] == 0 if isinstance(kept.mean, jax.Array) else np.isnan(moved[5])


def test_a_step_that_is_all_not_finite_leaves_moments_as_they_are():
    optimizer = few_bits("block_linear", smallest=78)
    _, state = trained(optimizer, 2)
    step = jax.jit(optimizer.update)
    _, after = step(jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), weights()), state)
    assert same(
        jax.tree.map(lambda m: m.square, after.moments, is_leaf=is_moments),
        jax.tree.map(lambda m: m.square, state.moments, is_leaf=is_moments),
    )
    assert same(after.moments["odd"], state.moments["odd"]) and not isinstance(
        state.moments["odd"].mean, fourbit.Quantized
    )


def test_within_apply_if_finite_such_a_step_did_not_happen():
    optimizer = optax.apply_if_finite(few_bits(), 3)
    like = {"matrix": jnp.zeros((12, 32)), "odd": jnp.zeros((7, 11))}
    _, state = trained(optimizer, 2, like)
    bad = gradients(2, like) | {"odd": jnp.full((7, 11), jnp.nan)}
    update, after = jax.jit(optimizer.update)(bad, state)
    assert same(after.inner_state, state.inner_state)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(update))


def test_within_multi_steps_only_the_real_update_is_coded():
    inner, like = few_bits(), {"matrix": jnp.zeros((12, 32))}
    optimizer = optax.MultiSteps(inner, 3)
    state, step = optimizer.init(like), jax.jit(optimizer.update)
    for number in range(3):
        update, state = step(gradients(number, like), state)
        if number < 2:
            assert same(state.inner_opt_state, inner.init(like)) and np.all(np.asarray(update["matrix"]) == 0)
    mean = jax.tree.map(lambda *g: sum(g) / 3, *(gradients(number, like) for number in range(3)))
    expected, alone = inner.update(mean, inner.init(like))
    assert int(state.inner_opt_state.count) == 1
    # The mean is one of three numbers in another order.
    np.testing.assert_allclose(update["matrix"], expected["matrix"], rtol=1e-5)
    np.testing.assert_allclose(
        state.inner_opt_state.moments["matrix"].mean.scales[0], alone.moments["matrix"].mean.scales[0], rtol=1e-5
    )


def test_runs_side_by_side_with_traced_seeds_and_rates_are_those_alone():
    like = {"layers": {"odd": jnp.zeros((3, 5, 7))}}

    def run(seed, rate, gradient):
        optimizer = adamw_4bit(rate, block=BLOCK, smallest=0, stochastic=True, seed=seed)
        return optimizer.update(gradient, optimizer.init(like), like)

    seeds, rates = jnp.arange(2), jnp.array([0.1, 0.7])
    together = [gradients(0, like, seed) for seed in range(2)]
    updates, states = jax.jit(jax.vmap(run))(seeds, rates, jax.tree.map(lambda *x: jnp.stack(x), *together))
    alone = jax.jit(run)
    for i in range(2):
        update, state = alone(seeds[i], rates[i], together[i])
        assert same(jax.tree.map(lambda x: x[i], states), state)  # noqa: B023
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-6), updates, update)  # noqa: B023


def test_rounding_at_random_is_a_function_of_seed_step_and_weight():
    like = {"a": jnp.zeros((12, 32)), "b": jnp.zeros((12, 32))}
    gradient = {name: gradients(0, {"a": like["a"]})["a"] for name in like}

    @jax.jit
    def codes(seed, steps=1):
        optimizer = few_bits(stochastic=True, seed=seed)
        state = optimizer.init(like).replace(count=jnp.int32(steps - 1))
        return optimizer.update(gradient, state)[1].moments

    assert same(codes(0), codes(0)) and same(codes(3), codes(jax.random.key(3)))
    differ = lambda one, other: np.mean(np.asarray(one.mean.codes) != np.asarray(other.mean.codes)) > 0.1
    assert differ(codes(0)["a"], codes(1)["a"])
    assert differ(codes(0)["a"], codes(0)["b"])
    assert differ(codes(0)["a"], codes(0, steps=2)["a"])


@struct.dataclass
class Inner:
    matrix: object
    nothing: object = None


def test_any_tree_of_weights_is_stepped_with_its_state_given_away_and_read_back():
    like = (Inner(jnp.ones((12, 32))), [Inner(jnp.ones(75)), None])
    matrices = lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    optimizer = adamw_4bit(0.1, block=BLOCK, smallest=80, weight_decay=0.1, mask=matrices)
    state = optimizer.init(like)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    step = jax.jit(optimizer.update, donate_argnums=1)
    _, state = step(like, state, like)
    read = serialization.from_bytes(optimizer.init(like), serialization.to_bytes(state))
    assert same(read, state)
    update, after = step(like, state, like)
    update_read, after_read = step(like, read, like)
    assert same(update, update_read) and same(after, after_read)
    # Equal gradients move by the rate, and what decays by a tenth of it more; 1 - .999 ** 2 cancels to 3e-5.
    assert np.asarray(update[0].matrix) == pytest.approx(-0.11, rel=3e-5)
    assert np.asarray(update[1][0].matrix) == pytest.approx(-0.1, rel=3e-5)


CODINGS = [
    {"bits": bits, "block": block, "second": second, "signed_scale": True, "smallest": smallest}
    for bits, block, second, smallest in [
        (4, 16, "rank1_linear", 0),
        (4, 64, "block_linear", 0),
        (4, 16, "factored", 100),
        (8, 32, "rank1_linear", 0),
    ]
]


def decoded_state(state, coding):
    return jax.jit(lambda state: fourbit.as_adam(state, weights(), **coding))(state)


def coded_state(state, coding):
    return jax.jit(lambda state: fourbit.from_adam(state, weights(), **coding))(state)


@pytest.mark.parametrize("coding", CODINGS)
def test_moments_decoded_and_coded_again_are_what_they_were(coding):
    _, state = trained(scale_by_adam_4bit(b2=0.9, **coding), 4)
    exact = decoded_state(state, coding)
    assert jax.tree.map(jnp.shape, exact.mu) == jax.tree.map(jnp.shape, weights())
    again = coded_state(exact, coding)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        if one.dtype == jnp.uint8:
            # Means of rows and columns, and what was halfway, round once more.
            assert np.mean(np.asarray(one) != np.asarray(other)) < 0.01
        else:
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_decoded_moments_are_those_of_the_codes():
    _, state = trained(few_bits(), 4)
    exact = fourbit.as_adam(state, weights(), smallest=0, block=BLOCK)
    np.testing.assert_array_equal(exact.nu["matrix"], decoded_squares(state))
    layer = jax.tree.map(lambda x: x[1], tensors_at(state.moments)["['layers']['w']"].mean)
    np.testing.assert_array_equal(exact.mu["layers"]["w"][1], dequantize(layer, (5, 16), FIRST, block=BLOCK))


@pytest.mark.parametrize("coding", CODINGS)
def test_an_adam_goes_on_as_one_of_few_bits_and_back(coding):
    """Up to what coding once costs, small weights to the bit; the next step is Adam's on what was decoded."""
    adam = optax.scale_by_adam(b2=0.9)
    _, before = trained(adam, 4)
    state = coded_state(before, coding)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), scale_by_adam_4bit(**coding).init(weights())
    )
    back = decoded_state(state, coding)
    assert int(back.count) == 4
    for one, other in ((back.mu, before.mu), (back.nu, before.nu)):
        for name, kept in tensors_at(state.moments).items():
            found, exact = (np.asarray(tensors_at(tree)[name]) for tree in (one, other))
            if not isinstance(kept.mean, fourbit.Quantized):
                np.testing.assert_array_equal(found, exact)
            elif coding["second"] == "factored" and one is back.nu:
                np.testing.assert_allclose(found.mean(axis=-1), exact.mean(axis=-1), rtol=1e-5)
            else:
                assert np.abs(found - exact).max() <= 0.15 * np.abs(exact).max()
    if coding["second"] == "factored":  # which never has the matrix that Adam would step with
        return
    update, _ = jax.jit(scale_by_adam_4bit(b2=0.9, **coding).update)(gradients(4, weights()), state)
    expected, _ = jax.jit(adam.update)(gradients(4, weights()), back)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), update, expected)


def test_codes_are_not_read_as_if_they_were_of_another_coding_or_other_weights():
    _, state = trained(few_bits(), 1)
    with pytest.raises(
        ValueError, match=r"layers.w, of shape \(2, 5, 16\), were not .*block=32 and second='rank1"
    ):
        fourbit.as_adam(state, weights(), block=32)
    with pytest.raises(ValueError, match="the state is not that of these weights"):
        fourbit.as_adam(state, {"matrix": jnp.zeros((12, 32))}, block=BLOCK)
    _, whole = trained(scale_by_adam_4bit(), 1)
    with pytest.raises(ValueError, match=r"odd is \(5, 5\) and its moments are \(7, 11\)"):
        fourbit.as_adam(whole, weights() | {"odd": jnp.zeros((5, 5))})
    before = optax.scale_by_adam().init(weights())
    with pytest.raises(ValueError, match="the state is not that of these weights"):
        fourbit.from_adam(before, {"matrix": jnp.zeros((12, 32))})
    with pytest.raises(ValueError, match=r"matrix is \(12, 16\) and its moments are \(12, 32\)"):
        fourbit.from_adam(before, weights() | {"matrix": jnp.zeros((12, 16))})


def test_updates_have_the_dtype_of_gradients():
    gradient = {"matrix": jnp.ones((12, 32), jnp.bfloat16), "small": jnp.ones(3, jnp.bfloat16)}
    optimizer = few_bits(smallest=3)
    update, state = optimizer.update(gradient, optimizer.init(gradient))
    assert {x.dtype for x in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "uint8", "int32"}


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 4, 10]), st.sampled_from([4, 8]))
def test_bytes_are_those_of_the_formula(rows, columns, block, bits):
    blocks = -(-rows * columns // block)
    shape = {"matrix": jax.ShapeDtypeStruct((rows, columns), jnp.float32)}
    of = lambda second: state_bytes(shape, few_bits(second, block=block, bits=bits))
    count, mean = 4, blocks * (block * bits // 8 + 4)
    assert of("block_linear") == count + 2 * mean
    assert of("rank1_linear") == count + mean + blocks * block * bits // 8 + 4 * (rows + columns)
    assert of("factored") == count + mean + 4 * (rows + columns)


def test_the_moments_of_gpt2_take_the_share_of_the_paper():
    config = ModelConfig(vocabulary=50257, layers=12, width=768, heads=12, length=1024, tied=True, biases=True)
    shapes = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    whole = state_bytes(shapes, optax.scale_by_adam())
    assert state_bytes(shapes, scale_by_adam_4bit()) / whole <= 0.135
    assert state_bytes(shapes, scale_by_adam_4bit(second="factored")) / whole <= 0.07


def test_a_signed_scale_keeps_the_largest_number_of_a_block_exactly():
    x = -jnp.abs(gradients(0, weights())["matrix"])
    for signed, largest in ((True, 1.0), (False, 0.8875)):
        coded = quantized.quantize(x, FIRST, block=BLOCK, signed_scale=signed)
        back = np.asarray(dequantize(coded, x.shape, FIRST, block=BLOCK)).reshape(-1, BLOCK)
        assert back.min(axis=1) == pytest.approx(largest * np.asarray(x).reshape(-1, BLOCK).min(axis=1), rel=1e-6)


@pytest.mark.parametrize(
    ("given_setting", "says"),
    [
        ({"bits": 5}, "bits is 5; a code takes 4 or 8"),
        ({"block": 7}, "block is 7; it must be an even number of at least 2"),
        ({"smallest": -1}, "smallest is -1; it must be at least 0"),
        ({"second": "rank2"}, "second is 'rank2'; it must be one of rank1_linear, .*"),
    ],
)
def test_a_setting_without_meaning_is_refused(given_setting, says):
    with pytest.raises(ValueError, match=says):
        scale_by_adam_4bit(**given_setting)


def test_a_shape_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"matrix makes \(5,\) of vector, whose shape \(75,\) has another size"):
        few_bits(matrix=lambda path, shape: (5,)).init({"vector": jnp.zeros(75)})
