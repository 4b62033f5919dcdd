import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from minitf import filter


def rows(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_a_linear_filter_multiplies_and_adds_its_bias():
    x, weight, bias = rows(5, 3), rows(3, 4, seed=1), rows(4, seed=2)
    exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    np.testing.assert_allclose(filter.linear(x, weight), exact, atol=1e-6)
    np.testing.assert_allclose(filter.linear(x, weight, bias), exact + np.asarray(bias), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_a_linear_filter_has_the_slopes_of_a_product_also_along_a_direction_of_many_and_of_a_slope(tied):
    x, weight, direction = rows(2, 5, 3), rows(2, 3, 4, seed=1), rows(2, 3, 4, seed=2)
    table = (lambda w: jnp.swapaxes(w, -1, -2)) if tied else (lambda w: w)

    def found(product):
        loss = lambda x, w: jnp.sum(jnp.sin(product(x, table(w))))
        slope = jax.grad(loss, argnums=(0, 1))
        moved = lambda x, w, d: jax.jvp(lambda w: slope(x, w), (w,), (d,))
        return jax.vmap(moved)(x, table(weight), table(direction))

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *map(found, (filter.linear, jnp.matmul))
    )


@pytest.mark.parametrize("tied", [False, True])
def test_on_a_cpu_every_product_of_a_training_step_adds_up_along_the_last_axis_of_its_left_side(tied):
    """Else XLA takes up to twice as long for it."""
    x, weight = rows(40, 16), rows(24, 16, seed=1) if tied else rows(16, 24, seed=1)
    loss = lambda x, w: jnp.sum(jnp.sin(filter.linear(jnp.cos(x), w.T if tied else w)))
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, weight).compile().as_text()
    assert set(re.findall(r"lhs_contracting_dims=\{(\d)\}", program)) == {"1"}


def test_a_filter_takes_rows_and_nothing_else():
    with pytest.raises(TypeCheckError):
        filter.linear(rows(2, 5, 3), rows(3, 4))


def test_embedding_is_the_product_of_one_hot_rows_and_the_table():
    tokens, table = jnp.array([2, 0, 2]), rows(4, 3)
    np.testing.assert_array_equal(filter.embed(tokens, table), np.eye(4)[[2, 0, 2]] @ np.asarray(table))
    np.testing.assert_allclose(filter.embed(tokens, table, 3.0), 3 * np.asarray(table)[[2, 0, 2]], rtol=1e-6)


def test_unembedding_gives_the_inner_product_with_every_tokens_vector():
    context, table = rows(5, 3), rows(3, 4, seed=1)
    np.testing.assert_allclose(filter.unembed(context, table), np.asarray(context) @ np.asarray(table), atol=1e-6)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_sinusoids_alternate_sine_and_cosine_at_falling_frequencies(width):
    table = filter.sinusoidal_positions(6, width)
    assert table.shape == (6, width)
    for position in range(6):
        for column in range(width):
            angle = position / 10000 ** (2 * (column // 2) / width)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert table[position, column] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [2, 4, 6])
def test_rotation_keeps_lengths_and_makes_scores_depend_on_distance_alone(interleaved, rotated):
    q, k = rows(1, 1, 6), rows(1, 1, 6, seed=1)
    turn = lambda x, position: filter.rotate(x, jnp.array([position]), rotated, 100.0, interleaved)
    score = lambda t, s: jnp.sum(turn(q, t) * turn(k, s))
    for shift in (1, 7):
        np.testing.assert_allclose(score(3 + shift, 1 + shift), score(3, 1), atol=1e-5)
    assert abs(float(score(3, 1) - score(3, 2))) > 1e-3
    np.testing.assert_allclose(jnp.linalg.norm(turn(q, 9)), jnp.linalg.norm(q), rtol=1e-6)
    np.testing.assert_array_equal(turn(q, 0), q)
    np.testing.assert_array_equal(turn(q, 9)[..., rotated:], q[..., rotated:])


def test_the_two_ways_to_pair_components_differ_by_a_permutation():
    x, positions = rows(4, 2, 6), jnp.arange(4)
    order = np.array([0, 2, 4, 1, 3, 5])
    halves = filter.rotate(x[..., order], positions, 6, 10000.0, interleaved=False)
    neighbours = filter.rotate(x, positions, 6, 10000.0, interleaved=True)
    np.testing.assert_allclose(halves, neighbours[..., order], atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "layer", "rms"])
@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(scale=st.floats(0.5, 100), shift=st.floats(-3, 3))
def test_a_norm_forgets_scale_and_layer_norm_also_shift(kind, scale, shift):
    def norm(x):
        centered = filter.center(x, kind)
        return filter.normalize(centered, filter.norm_scale(centered, kind, 0.0))

    x = rows(4, 8)
    np.testing.assert_allclose(norm(x * scale), norm(x), atol=1e-5)
    if kind == "layer":
        np.testing.assert_allclose(norm(x + shift), norm(x), atol=1e-5)
    length = {"l2": 1.0, "layer": math.sqrt(8), "rms": math.sqrt(8)}[kind]
    np.testing.assert_allclose(jnp.linalg.norm(norm(x), axis=-1), length, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "l2", "layer", "rms"])
def test_the_parts_of_a_norm_are_its_two_functions_and_so_are_their_slopes(kind):
    def apart(x):
        centered = filter.center(x, kind)
        return centered, filter.norm_scale(centered, kind, 1e-5)

    with jax.enable_x64(True):
        x = jnp.asarray(rows(5, 8), jnp.float64) + 3.0
        (found, back), (expected, back_apart) = (
            jax.vjp(f, x) for f in (lambda x: filter.norm_parts(x, kind, 1e-5), apart)
        )
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-14)
        slopes = (jnp.asarray(rows(5, 8, seed=1), jnp.float64), jnp.arange(5.0))
        np.testing.assert_allclose(back(slopes)[0], back_apart(slopes)[0], rtol=1e-12)


def test_gain_and_offset_come_after_the_division():
    x, scale = jnp.array([[2.0, 4.0]]), jnp.array([2.0])
    found = filter.normalize(x, scale, jnp.array([10.0, 100.0]), jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(found, [[11.0, 202.0]])


def test_a_zero_row_stays_zero_and_its_gradient_finite():
    def norm(x, kind):
        centered = filter.center(x, kind)
        return filter.normalize(centered, filter.norm_scale(centered, kind, 1e-5))

    for kind in ("l2", "layer", "rms"):
        x = jnp.zeros((2, 4))
        np.testing.assert_array_equal(norm(x, kind), x)
        assert np.isfinite(jax.grad(lambda x, k=kind: jnp.sum(norm(x, k)))(x)).all()


def test_epsilon_is_added_inside_the_root_and_never_to_an_l2_length():
    x = jnp.array([[3.0, 4.0]])
    assert float(filter.norm_scale(x, "rms", 0.5)[0]) == pytest.approx(math.sqrt(12.5 + 0.5))
    assert float(filter.norm_scale(x, "l2", 0.5)[0]) == 5.0


@pytest.mark.parametrize(
    ("kind", "formula"),
    [
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("swiglu", lambda x: 3.0 * x / (1 + math.exp(-x))),
    ],
)
def test_activations_are_the_published_formulas(kind, formula):
    x = jnp.linspace(-4, 4, 33)[:, None]
    found = filter.activate(x, kind, jnp.full_like(x, 3.0) if kind == "swiglu" else None)
    np.testing.assert_allclose(found[:, 0], [formula(float(v)) for v in x[:, 0]], atol=1e-6)


def test_a_filter_is_the_same_at_every_position():
    x, weight = rows(6, 4), rows(4, 4, seed=1)
    order = np.array([3, 1, 5, 0, 2, 4])
    for f in (
        lambda x: filter.linear(x, weight),
        lambda x: filter.normalize(filter.center(x, "layer"), filter.norm_scale(x, "rms", 1e-5)),
        lambda x: filter.activate(x, "gelu"),
    ):
        np.testing.assert_allclose(f(x[order]), f(x)[order], atol=1e-6)
        influence = jax.jacobian(lambda x, f=f: f(x).sum(-1))(x)
        assert not np.asarray(influence.sum(-1))[~np.eye(6, dtype=bool)].any()
