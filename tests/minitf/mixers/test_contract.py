"""What every mixer promises: one aggregate in three forms, and metadata that is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minitf_mixers import ASSOCIATED, EVERY, ONE_WAY, filtered, inputs, model, stepped, weights
from properties.models import relative_error

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
        by_step = stepped(mixer, own, x, config) if name in ONE_WAY else None
        return mixer.aggregate(own, f, config), None if whole is None else under(whole, f.v), by_step

    return run(own, x)


@pytest.mark.parametrize("name", EVERY)
def test_aggregate_association_and_recurrence_are_one(name):
    with jax.enable_x64():
        z, by_association, by_step = forms(name, jnp.float64, LONG)
        for other in (by_association, by_step):
            assert other is None or relative_error(other, z) < 1e-10
    z, by_association, by_step = forms(name, jnp.float32, LONG)
    for other in (by_association, by_step):
        assert other is None or relative_error(other, z) < 1e-5


@pytest.mark.parametrize("name", ASSOCIATED)
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
            assert rows.min() > 0 and rows.max() < 1 + 1e-12
        else:
            assert rows.max() > 1 + 1e-9 or rows.min() < 0
        assert (np.abs(np.triu(a, 1)).max() == 0) == about.causal
        assert_depends_as_said(mixer, own, config, about.provenance)


def assert_depends_as_said(mixer, own, config, provenance):
    """A[t, s] changes with x_t, with x_s, with what lies between, exactly as provenance says."""
    length, t = config.length, 15
    s = t - (getattr(mixer, "window", 0) or 10) + (1 if getattr(mixer, "window", 0) else 0)
    x = inputs(length, batch=1, dtype=jnp.float64)

    def entry(x):
        return mixer.association(own, filtered(mixer, own, x, config), config)[0, :, t, s]

    slope = np.abs(jax.jit(jax.jacrev(entry))(x))[:, 0].max(axis=(0, 2))
    found = {"query": slope[t] > 1e-12, "key": slope[s] > 1e-12}
    pair = "pair" in provenance
    path = "path" in provenance
    assert found["query"] == ("query" in provenance or pair or path), slope
    assert found["key"] == ("key" in provenance or pair), slope
    if provenance and "scores" not in mixer.leaves and mixer.about(config).normalized == "no":
        # Without a normalizer, whose sum runs over all keys, what lies between counts only where it is said to.
        between = slope[s + mixer.reach + 1 : t - mixer.reach].max()
        assert (between > 1e-12) == path


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
        frozen = {"frozen": "association", "synthesizer fixed": "scores"}.get(name)
        if frozen:
            along[0][frozen] = jnp.zeros_like(own[frozen])
        gradient, by_gradient, by_itself = slopes(own, x, along)
        assert frozen is None or not np.any(gradient[0][frozen])
        assert by_gradient == pytest.approx(float(by_itself), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ASSOCIATED)
def test_slopes_through_the_association_are_those_through_the_aggregate(name):
    with jax.enable_x64():
        config = model(name, length=6)
        mixer, own, x = config.mixer, weights(config, jnp.float64), inputs(6, batch=1, dtype=jnp.float64)

        def through(associated, own, x):
            f = filtered(mixer, own, x, config)
            z = under(mixer.association(own, f, config), f.v) if associated else mixer.aggregate(own, f, config)
            return jnp.sum(jnp.sin(z))

        slopes = jax.jit(jax.grad(through, (1, 2)), static_argnums=0)
        for one, other in zip(*(jax.tree.leaves(slopes(which, own, x)) for which in (True, False)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
