import jax
import jax.numpy as jnp
import pytest

from minitf import ModelConfig, initialize, mixers, walk
from minitf.analysis.flops import flops

A, B = jnp.ones((4, 5)), jnp.ones((5, 6))
CONFIG = ModelConfig(vocabulary=11, layers=3, width=16, heads=2, length=12)


def test_a_product_is_two_operations_for_each_of_its_terms():
    assert flops(lambda a, b: a @ b, A, B) == 2 * 4 * 5 * 6
    assert flops(lambda a: jnp.einsum("bij,bjk->bik", a, a), jnp.ones((3, 4, 4))) == 3 * 2 * 4**3


def test_other_arithmetic_is_one_operation_for_each_element_and_moving_is_free():
    assert flops(lambda a: jnp.tanh(a) + 1.0, A) == 2 * A.size
    assert flops(lambda a: a.sum(), A) == A.size
    assert flops(lambda a: jnp.concatenate([a.T.reshape(2, 10), jnp.zeros((2, 10))]), A) == 0


def test_what_no_result_needs_costs_nothing():
    def both(a, b):
        return a @ b, jnp.exp(a)

    assert flops(lambda a, b: both(a, b)[1], A, B) == A.size
    assert flops(lambda a, b: jax.jit(both)(a, b)[1], A, B) == A.size
    tokens = jnp.zeros((1, 12), jnp.int32)
    parameters = initialize(CONFIG, jax.random.key(0))
    valid = jnp.ones((1, 12), bool)  # no kernel takes these
    dropped = flops(lambda p: walk(p, tokens, CONFIG, valid=valid).logits, parameters)
    # Where nobody reads an association, mixtures are divided, which are 8 numbers, in place of 12 weights.
    divided = 3 * 2 * 12 * (12 - 8)
    unread = flops(lambda p: walk(p, tokens, CONFIG, valid=valid, association=False).logits, parameters)
    assert dropped == unread + divided
    assert dropped < flops(lambda p: walk(p, tokens, CONFIG, valid=valid), parameters)


def test_a_scan_costs_its_length_and_only_what_its_results_need():
    def body(carry, x):
        useful, useless = carry
        return (useful * 2.0, useless @ useless), jnp.exp(x)

    def run(x):
        return jax.lax.scan(body, (jnp.float32(1), jnp.ones((9, 9))), x)

    assert flops(lambda x: run(x)[1], jnp.ones(7)) == 7
    assert flops(lambda x: run(x)[0][0], jnp.ones(7)) == 7
    assert flops(lambda x: run(x)[0][1], jnp.ones(7)) == 7 * 2 * 9**3


def test_a_carry_that_another_is_made_from_counts():
    def body(carry, x):
        first, second = carry
        return (first @ first, second + first[0, 0]), None

    start = (jnp.ones((9, 9)), jnp.float32(0))
    assert flops(lambda s: jax.lax.scan(body, s, None, length=5)[0][1], start) == 5 * (2 * 9**3 + 1)


def test_of_a_branch_the_dearer_side_counts():
    dear = lambda a: a @ a
    assert flops(lambda yes, a: jax.lax.cond(yes, dear, lambda a: a, a), True, jnp.ones((3, 3))) == 2 * 27


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match="as many rounds as the data says"):
        flops(lambda x: jax.lax.while_loop(lambda v: v < 3, lambda v: v + 1, x), 0.0)


@pytest.mark.parametrize("mixer", [None, mixers.SpatialGate(), mixers.Retention()])
def test_a_forward_costs_what_the_compiler_counts_where_it_can(mixer):
    config = ModelConfig(vocabulary=64, layers=2, width=32, heads=2, length=64, mixer=mixer)
    parameters = jax.eval_shape(lambda: initialize(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    forward = lambda p, t: walk(p, t, config, association=False, unroll=True).logits
    compiled = jax.jit(forward).lower(parameters, tokens).compile().cost_analysis()["flops"]
    assert flops(forward, parameters, tokens) == pytest.approx(compiled, rel=0.05)


def test_a_gradient_is_about_three_forwards():
    parameters = initialize(CONFIG, jax.random.key(0))
    tokens = jnp.zeros((2, 12), jnp.int32)
    loss = lambda p: walk(p, tokens, CONFIG, association=False).logits.sum()
    assert 2.5 < flops(jax.grad(loss), parameters) / flops(loss, parameters) < 3.2
