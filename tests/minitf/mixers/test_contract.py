"""What every mixer promises: one aggregate in three forms, and metadata that is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minitf_mixers import ASSOCIATED, EVERY, EXAMPLE, ONE_WAY, filtered, inputs, model, stepped, weights
from properties.models import relative_error

from minitf import ModelConfig, mixers
from minitf.declaration import declare, is_declaration
from minitf.mixers.contract import under

LONG = 140  # more than two chunks of every chunked form


def forms(name, dtype, length):
    """The aggregate, the values under the association, and the recurrence's."""
    config = model(name)
    mixer, own, x = config.mixer, weights(config, dtype), inputs(length, dtype=dtype)

    @jax.jit
    def run(own, x):
        f = filtered(mixer, own, x, config)
        whole = mixer.association(own, f, config)
        by_step = stepped(mixer, own, x, config) if config.causal else None
        return mixer.aggregate(own, f, config), None if whole is None else under(whole, f.v), by_step

    return run(own, x)


@pytest.mark.parametrize("name", [*EVERY, EXAMPLE])
def test_aggregate_association_and_recurrence_are_one(name):
    with jax.enable_x64():
        z, by_association, by_step = forms(name, jnp.float64, LONG)
        for other in (by_association, by_step):
            assert other is None or relative_error(other, z) < 1e-10
    z, by_association, by_step = forms(name, jnp.float32, LONG)
    for other in (by_association, by_step):
        assert other is None or relative_error(other, z) < 1e-5


@pytest.mark.parametrize("name", [*ASSOCIATED, EXAMPLE])
def test_what_is_said_of_the_association_is_measured(name):
    config, length, samples = model(name, length=24), 24, 16
    mixer, about = config.mixer, config.mixer.about(config)
    with jax.enable_x64():
        own = weights(config, jnp.float64)
        x = inputs(length, batch=samples, dtype=jnp.float64)
        associate = jax.jit(lambda own, x: mixer.association(own, filtered(mixer, own, x, config), config))
        a = associate(own, x)
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
        assert_depends_as_said(mixer, own, config, about.provenance)


def assert_depends_as_said(mixer, own, config, provenance):
    """A[t, s] changes with x_t, with x_s, with both as a pair, with what lies between, as provenance says.

    Of two associations of one query the ratio is asked: a normalizer, whose sum runs over all keys, is not in it.
    """
    t, reach = 20, mixer.reach
    near = bool(getattr(mixer, "window", 0)) and "scores" in mixer.leaves
    # Far enough apart that no token shift or short convolution is taken for another of them.
    s, further = (t - 1, t - 2) if near else (t - reach - 1, t - 3 * reach - 4)
    x = inputs(config.length, batch=1, dtype=jnp.float64)

    def associated(x):
        return mixer.association(own, filtered(mixer, own, x, config), config)[0, :, t]

    def ratio(x):
        row = associated(x)
        return jnp.log(jnp.abs(row[:, s])) - jnp.log(jnp.abs(row[:, further]))

    slope = np.abs(jax.jit(jax.jacrev(lambda x: associated(x)[:, s]))(x))[:, 0].max(axis=(0, 2))
    pair, path = "pair" in provenance, "path" in provenance
    assert (slope[t] > 1e-12) == ("query" in provenance or pair or path), slope
    assert (slope[s] > 1e-12) == ("key" in provenance or pair), slope
    if not provenance:
        return
    # How much the query's part in the ratio changes with the key.
    at = lambda here: lambda y: x.at[0, here].set(y)
    mixed = jax.jacrev(lambda key: jax.jacrev(lambda query: ratio(at(s)(key).at[0, t].set(query)))(x[0, t]))
    assert (float(jnp.max(jnp.abs(jax.jit(mixed)(x[0, s])))) > 1e-9) == pair
    if not near:
        between = (further + s - reach) // 2 + 1
        moved = jax.jit(jax.jacrev(lambda y: ratio(at(between)(y))))(x[0, between])
        assert (float(jnp.max(jnp.abs(moved))) > 1e-12) == path


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64():
        config = model(name, length=6)
        mixer, x = config.mixer, inputs(6, batch=1, dtype=jnp.float64)
        # Smaller, so that nothing is so steep that finite differences miss it.
        own = jax.tree.map(lambda w: jnp.asarray(0.3 * np.asarray(w)), weights(config, jnp.float64))

        def out(own, x):
            f = filtered(mixer, own, x, config)
            return jnp.sum(jnp.sin(mixer.gate(own, mixer.aggregate(own, f, config), f, config)))

        @jax.jit
        def slopes(own, x, along):
            """All gradients, and how fast the output changes along a direction: by them, and by itself."""
            gradient = jax.grad(out, (0, 1))(own, x)
            by_gradient = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient, along)))
            moved = lambda h: out(*jax.tree.map(lambda y, d: y + h * d, (own, x), along))
            return gradient, by_gradient, (moved(1e-5) - moved(-1e-5)) / 2e-5

        rng = np.random.default_rng(1)
        along = jax.tree.map(lambda y: jax.device_put(rng.normal(size=y.shape)), (own, x))
        trained = jax.tree.map(lambda d: d.trained, declare(config).layers.attention, is_leaf=is_declaration)
        along = (jax.tree.map(lambda d, yes: d * yes, along[0], trained), along[1])
        gradient, by_gradient, by_itself = slopes(own, x, along)
        assert not any(jax.tree.leaves(jax.tree.map(lambda g, yes: np.any(g) and not yes, gradient[0], trained)))
        assert by_gradient == pytest.approx(float(by_itself), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", [*ONE_WAY, EXAMPLE])
def test_what_is_handed_on_is_as_large_as_said(name):
    config = model(name)
    kept = jax.eval_shape(lambda: config.mixer.start(config, 1, config.length, jnp.float32))
    assert sum(x.size for x in jax.tree.leaves(kept)) == config.mixer.about(config).state


@pytest.mark.parametrize("name", ASSOCIATED)
def test_slopes_through_the_association_are_those_through_the_aggregate(name):
    with jax.enable_x64():
        # More than a chunk of the longest, and no whole number of any.
        config = model(name, length=67)
        mixer, own, x = config.mixer, weights(config, jnp.float64), inputs(67, batch=1, dtype=jnp.float64)

        def through(associated, own, x):
            f = filtered(mixer, own, x, config)
            z = under(mixer.association(own, f, config), f.v) if associated else mixer.aggregate(own, f, config)
            return jnp.sum(jnp.sin(z))

        slopes = jax.jit(jax.grad(through, (1, 2)), static_argnums=0)
        for one, other in zip(*(jax.tree.leaves(slopes(which, own, x)) for which in (True, False)), strict=True):
            assert relative_error(one, other) < 1e-8


@pytest.mark.parametrize("name", EVERY)
def test_what_is_large_stays_finite_slopes_too_and_the_forms_agree(name):
    """Saturated gates, keys that leave nothing of others, exponents beyond float32."""
    config = model(name)
    mixer, own, x = config.mixer, weights(config), 100 * inputs(LONG)

    @jax.jit
    def run(own, x):
        f = filtered(mixer, own, x, config)
        whole = mixer.association(own, f, config)
        by_step = stepped(mixer, own, x, config) if name in ONE_WAY else None
        return mixer.aggregate(own, f, config), None if whole is None else under(whole, f.v), by_step

    z, by_association, by_step = run(own, x)
    assert np.isfinite(z).all()
    for other in (by_association, by_step):
        # Exponents of some 10^4, whose last digits are in the weights.
        assert other is None or relative_error(other, z) < 1e-4
    assert_slopes_are_finite(config, own, x)


def assert_slopes_are_finite(config, own, x):
    mixer = config.mixer

    def out(own, x):
        f = filtered(mixer, own, x, config)
        return jnp.sum(jnp.sin(mixer.gate(own, mixer.aggregate(own, f, config), f, config)))

    for slope in jax.tree.leaves(jax.jit(jax.grad(out, (0, 1)))(own, x)):
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["aft full", "aft simple", "aft local", "aft conv"])
def test_a_large_key_says_nothing_of_the_positions_before_it(name):
    config = model(name)
    mixer, own = config.mixer, weights(config)
    f = filtered(mixer, own, inputs(LONG), config)
    aggregate = jax.jit(lambda f: mixer.aggregate(own, f, config))
    usual = aggregate(f)
    for place in (5, 77, LONG - 1):
        large = aggregate(f.replace(k=f.k.at[:, place].set(110.0)))
        alone = f.q * f.v[:, place][:, None]
        np.testing.assert_allclose(large[:, :place], usual[:, :place], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(large[:, place:], alone[:, place:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["aft full", "aft local", "aft conv"])
def test_places_that_say_the_opposite_of_keys_leave_no_row_without_a_number(name):
    config = model(name)
    mixer, own = config.mixer, weights(config)
    own = {**own, "places": 200 * own["places"]}
    x = 100 * inputs(LONG)
    assert np.isfinite(mixer.aggregate(own, filtered(mixer, own, x, config), config)).all()
    assert_slopes_are_finite(config, own, x)


@pytest.mark.parametrize("name", ["rwkv6", "mamba2", "mamba", "mingru"])
def test_what_fades_at_once_leaves_what_comes_after_it_exact(name):
    """One position after which nothing is left: differences of sums that hold it would have no digits."""
    config = model(name)
    mixer, own = config.mixer, weights(config)
    f = filtered(mixer, own, inputs(LONG), config)
    named, much = {"rwkv6": ("fade", -1e6), "mingru": ("log_keep", -1e6)}.get(name, ("step", 1e6))
    f = f.replace(extras={**f.extras, named: f.extras[named].at[:, 70].set(much)})
    found, expected = mixer.aggregate(own, f, config), under(mixer.association(own, f, config), f.v)
    assert relative_error(found[:, 71:], expected[:, 71:]) < 1e-5


@pytest.mark.parametrize("name", [name for name in ONE_WAY if name not in ("softmax", "window")])
def test_half_precision_loses_nothing_over_many_positions(name):
    """Sums over positions, and what they fade by, are held in float32."""
    length = 700
    config = model(name, length=length)
    mixer = config.mixer
    halves = lambda tree: jax.tree.map(lambda y: jnp.asarray(np.asarray(y, jnp.bfloat16)), tree)
    own, x = halves((weights(config), inputs(length, batch=1)))
    rounded = jax.tree.map(lambda y: y.astype(jnp.float32), (own, x))

    @jax.jit
    def run(own, x):
        f = filtered(mixer, own, x, config)
        return mixer.aggregate(own, f, config), stepped(mixer, own, x, config)

    for found, expected in zip(run(own, x), run(*rounded), strict=True):
        late = np.asarray(found, np.float32)[:, 500:], np.asarray(expected)[:, 500:]
        # A cell's gates see what it held, rounding and all.
        assert relative_error(*late) < (0.1 if name in ("gru", "lstm") else 0.02)


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
