"""What every mixer promises: one aggregate in three forms, and metadata that is true."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minitf_mixers import ASSOCIATED, EVERY, EXAMPLE, ONE_WAY, filtered, inputs, model, stepped, weights
from properties.models import relative_error

from minitf import ModelConfig, mixers
from minitf.declaration import declare, is_declaration
from minitf.mixers.contract import under

LONG = 139  # more than two chunks of every chunked form, and no whole number of any


@functools.cache
def compiled(name, double=False):
    """All that is asked of a mixer on a long sequence, in one program for all tests that ask.

    The aggregate, the values under the association, the recurrence's; and by aggregate and, with ``double``, by
    association too: a number made of all that comes out of the gate, and its slopes.
    """
    config = model(name)
    mixer = config.mixer

    def out(associated, own, x):
        f = filtered(mixer, own, x, config)
        z = under(mixer.association(own, f, config), f.v) if associated else mixer.aggregate(own, f, config)
        return jnp.sum(jnp.sin(mixer.gate(own, z, f, config))), z

    def run(own, x):
        with_slopes = lambda associated: jax.value_and_grad(out, (1, 2), has_aux=True)(associated, own, x)
        (number, z), slopes = with_slopes(False)
        by_association = slopes_of_association = None
        if name in (*ASSOCIATED, EXAMPLE):
            if double:
                (_, by_association), slopes_of_association = with_slopes(True)
            else:
                _, by_association = out(True, own, x)
        by_step = stepped(mixer, own, x, config) if config.causal else None
        return Found(z, by_association, by_step, number, slopes, slopes_of_association)

    return jax.jit(run)


class Found(NamedTuple):
    z: Any
    by_association: Any
    by_step: Any
    number: Any
    slopes: Any
    slopes_of_association: Any


def in_single(name, scale=1):
    config = model(name)
    return compiled(name)(weights(config), scale * inputs(LONG))


def in_double(name):
    """Of one sequence: of two it takes as long again."""
    config = model(name)
    return weights(config, jnp.float64), inputs(LONG, batch=1, dtype=jnp.float64)


@pytest.mark.parametrize("name", [*EVERY, EXAMPLE])
def test_aggregate_association_and_recurrence_are_one(name):
    with jax.enable_x64():
        double = compiled(name, double=True)(*in_double(name))
    for found, most in ((double, 1e-10), (in_single(name), 1e-5)):
        for other in (found.by_association, found.by_step):
            assert other is None or relative_error(other, found.z) < most


@pytest.mark.parametrize("name", [*ASSOCIATED, EXAMPLE])
def test_what_is_said_of_the_association_is_measured(name):
    config, length, samples = model(name, length=24), 24, 8
    mixer, about = config.mixer, config.mixer.about(config)
    with jax.enable_x64():
        a, dependence = measured(config, samples)
    a = np.broadcast_to(a, (samples, *a.shape[1:]))
    assert a.shape[1] == about.heads
    mean = a.mean(axis=0)
    data = samples / (samples - 1) * (1 - np.sum(mean**2) / np.mean(np.sum(a**2, axis=(1, 2, 3))))
    if about.provenance:
        assert data > 0.01
    else:
        assert abs(data) < 1e-12
        by_lag = np.stack([np.diagonal(mean, -lag, 1, 2).mean(axis=1) for lag in range(length)], axis=1)
        lag = np.maximum(np.arange(length)[:, None] - np.arange(length)[None, :], 0)
        only_lag = np.where(np.tril(np.ones((length, length), bool)), by_lag[:, lag], 0.0)
        share = 1 - np.sum((mean - only_lag) ** 2) / np.sum(mean**2)
        assert (share > 1 - 1e-12) == about.by_lag
    rows = a.sum(axis=-1)
    if about.normalized == "exactly":
        np.testing.assert_allclose(rows, 1.0, atol=1e-12)
    elif about.normalized == "at most":
        assert rows.min() >= 0 and 0 < rows.max() < 1 + 1e-12
    else:
        assert rows.max() > 1 + 1e-9 or rows.min() < 0
    assert (np.abs(np.triu(a, 1)).max() == 0) == about.causal
    assert_depends_as_said(mixer, about.provenance, *dependence)


def near(mixer):
    return bool(getattr(mixer, "window", 0)) and "scores" in mixer.leaves


def measured(config, samples):
    """Associations of some sequences; and how those of the first change with it, by one program.

    A[t, s] and its ratio to another association of the same query, per head: how fast they change as x_t, x_s
    or what lies between moves, each along a direction that is drawn, and how much all that changes with x_s.
    """
    t, mixer = 20, config.mixer
    # Far enough apart that no token shift or short convolution is taken for another of them.
    s, further = (t - 1, t - 2) if near(mixer) else (t - mixer.reach - 1, t - 3 * mixer.reach - 4)
    between = (further + s - mixer.reach) // 2 + 1
    own, x = weights(config, jnp.float64), inputs(config.length, batch=samples, dtype=jnp.float64)
    along = np.zeros((3, *x.shape))
    for number, place in enumerate((t, s, between)):
        along[number, 0, place] = np.random.default_rng(number).normal(size=x.shape[2])

    @jax.jit
    def run(own, x, along):
        def associated(x):
            a = mixer.association(own, filtered(mixer, own, x, config), config)
            row = a[0, :, t]
            ratio = jnp.log(jnp.abs(row[:, s])) - jnp.log(jnp.abs(row[:, further]))
            return jnp.stack([row[:, s], ratio]), a

        def changes(x):
            _, change, a = jax.vmap(lambda to: jax.jvp(associated, (x,), (to,), has_aux=True))(along)
            return change, a

        change, with_key, a = jax.jvp(changes, (x,), (along[1],), has_aux=True)
        return a[0], (change, with_key)

    return jax.tree.map(np.asarray, run(own, x, along))


def assert_depends_as_said(mixer, provenance, change, with_key):
    """A[t, s] changes with x_t, with x_s, with both as a pair, with what lies between, as provenance says.

    Of two associations of one query the ratio is asked: a normalizer, whose sum runs over all keys, is not in it.
    """
    (query, _), (key, _), (_, moved) = np.abs(change).max(axis=2)
    pair, path = "pair" in provenance, "path" in provenance
    assert (query > 1e-12) == ("query" in provenance or pair or path), query
    assert (key > 1e-12) == ("key" in provenance or pair), key
    if not provenance:
        return
    # How much the query's part in the ratio changes with the key.
    assert (np.abs(with_key[0, 1]).max() > 1e-9) == pair
    if not near(mixer):
        assert (moved > 1e-12) == path


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64():
        run, (own, x) = compiled(name, double=True), in_double(name)
        # Smaller, so that nothing is so steep that finite differences miss it.
        at = jax.tree.map(lambda w: 0.3 * np.asarray(w), own), np.asarray(x)
        rng = np.random.default_rng(1)
        along = jax.tree.map(lambda y: rng.normal(size=y.shape), at)
        trained = jax.tree.map(lambda d: d.trained, declare(model(name)).layers.attention, is_leaf=is_declaration)
        along = (jax.tree.map(lambda d, yes: d * yes, along[0], trained), along[1])
        gradient = jax.tree.map(np.asarray, run(*at).slopes)
        moved = lambda h: float(run(*jax.tree.map(lambda y, d: y + h * d, at, along)).number)
        # In error by the third derivative times the step squared, and by rounding over the step.
        by_itself = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert not any(jax.tree.leaves(jax.tree.map(lambda g, yes: np.any(g) and not yes, gradient[0], trained)))
    by_gradient = sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, along)))
    assert by_gradient == pytest.approx(by_itself, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", [*ONE_WAY, EXAMPLE])
def test_what_is_handed_on_is_as_large_as_said(name):
    config = model(name)
    kept = jax.eval_shape(lambda: config.mixer.start(config, 1, config.length, jnp.float32))
    assert sum(x.size for x in jax.tree.leaves(kept)) == config.mixer.about(config).state


@pytest.mark.parametrize("name", ASSOCIATED)
def test_slopes_through_the_association_are_those_through_the_aggregate(name):
    with jax.enable_x64():
        found = compiled(name, double=True)(*in_double(name))
    pairs = zip(*map(jax.tree.leaves, (found.slopes_of_association, found.slopes)), strict=True)
    for one, other in pairs:
        assert relative_error(one, other) < 1e-8


@pytest.mark.parametrize("name", EVERY)
def test_what_is_large_stays_finite_slopes_too_and_the_forms_agree(name):
    """Saturated gates, keys that leave nothing of others, exponents beyond float32."""
    found = in_single(name, scale=100)
    assert np.isfinite(found.z).all()
    for other in (found.by_association, found.by_step):
        # Exponents of some 10^4, whose last digits are in the weights.
        assert other is None or relative_error(other, found.z) < 1e-4
    for slope in jax.tree.leaves(found.slopes):
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["aft full", "aft simple", "aft local", "aft conv"])
def test_a_large_key_says_nothing_of_the_positions_before_it(name):
    config = model(name)
    mixer, own = config.mixer, weights(config)
    f = jax.jit(lambda x: filtered(mixer, own, x, config))(inputs(LONG))
    aggregate = jax.jit(lambda f: mixer.aggregate(own, f, config))
    usual = aggregate(f)
    for place in (5, 77, LONG - 1):
        large = aggregate(f.replace(k=f.k.at[:, place].set(110.0)))
        alone = f.q * f.v[:, place][:, None]
        np.testing.assert_allclose(large[:, :place], usual[:, :place], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(large[:, place:], alone[:, place:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["aft full", "aft local", "aft conv"])
def test_places_that_say_the_opposite_of_keys_leave_no_row_without_a_number(name):
    own = weights(model(name))
    found = compiled(name)({**own, "places": 200 * own["places"]}, 100 * inputs(LONG))
    assert np.isfinite(found.z).all()
    for slope in jax.tree.leaves(found.slopes):
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["rwkv6", "mamba2", "mamba", "mingru"])
def test_what_fades_at_once_leaves_what_comes_after_it_exact(name):
    """One position after which nothing is left: differences of sums that hold it would have no digits."""
    config = model(name)
    mixer = config.mixer
    named, much = {"rwkv6": ("fade", -1e6), "mingru": ("log_keep", -1e6)}.get(name, ("step", 1e6))

    @jax.jit
    def run(own, x):
        f = filtered(mixer, own, x, config)
        f = f.replace(extras={**f.extras, named: f.extras[named].at[:, 70].set(much)})
        return mixer.aggregate(own, f, config), under(mixer.association(own, f, config), f.v)

    found, expected = run(weights(config), inputs(LONG))
    assert relative_error(found[:, 71:], expected[:, 71:]) < 1e-5


@pytest.mark.parametrize(
    ("kind", "setting", "value", "message"),
    [
        (mixers.Mamba, "taps", 0, "must be at least 1"),
        (mixers.Mamba, "rank", -1, "must be at least 0"),
        (mixers.Mamba2, "states", 0, "must be at least 1"),
        (mixers.Rwkv6, "rank", 0, "must be at least 1"),
        (mixers.TokenNetwork, "hidden", -1, "must be at least 0"),
        (mixers.Convolution, "taps", 2.0, "must be a whole number"),
        (mixers.Mamba, "states", "4", "must be a whole number"),
        (mixers.Softmax, "window", 2.5, "must be a whole number"),
    ],
)
def test_settings_that_cannot_be_are_told_by_name(kind, setting, value, message):
    mixer = kind()
    # Past the type checks of these tests, which nobody else has on.
    object.__setattr__(mixer, setting, value)
    with pytest.raises(ValueError, match=f"{kind.__name__}: {setting} is {value!r}; it {message}"):
        ModelConfig(vocabulary=11, width=8, heads=2, length=8, mixer=mixer)
