"""What every mixer promises: one aggregate in three forms, and metadata that is true."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from minitf_mixers import ASSOCIATED, EVERY, ONE_WAY, filtered, inputs, model, stepped, weights
from properties.models import random_parameters, random_tokens, relative_error

from minitf import walk
from minitf.decode import empty_cache, generate
from minitf.mixers.contract import under
from minitf.model import walk_on

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
        a = mixer.association(own, filtered(mixer, own, x, config), config)
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

    slope = np.abs(jax.jacrev(entry)(x))[:, 0].max(axis=(0, 2))
    found = {"query": slope[t] > 1e-12, "key": slope[s] > 1e-12}
    pair = "pair" in provenance
    path = "path" in provenance
    assert found["query"] == ("query" in provenance or pair or path), slope
    assert found["key"] == ("key" in provenance or pair), slope
    if provenance and "scores" not in mixer.leaves and mixer.about(config).normalized == "no":
        # Without a normalizer, whose sum runs over all keys, what lies between counts only where it is said to.
        between = slope[s + mixer.reach + 1 : t - mixer.reach].max()
        assert (between > 1e-12) == path


@pytest.mark.parametrize("name", ONE_WAY)
def test_a_later_token_changes_nothing_before_it(name):
    config = model(name, length=80)
    parameters, tokens = random_parameters(config), random_tokens(config, length=70)
    run = jax.jit(lambda t: walk(parameters, t, config).logits)
    other = tokens.at[:, 66].add(1) % config.vocabulary
    before, after = np.asarray(run(tokens)), np.asarray(run(other))
    assert relative_error(after[:, :66], before[:, :66]) < 1e-5
    assert relative_error(after[:, 66:], before[:, 66:]) > 1e-3


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name):
    with jax.enable_x64():
        config = model(name, length=6)
        mixer, x = config.mixer, inputs(6, batch=1, dtype=jnp.float64)
        # Smaller, so that nothing is so steep that finite differences miss it.
        own = jax.tree.map(lambda w: 0.3 * w, weights(config, jnp.float64))

        def out(own, x):
            f = filtered(mixer, own, x, config)
            return jnp.sum(jnp.sin(mixer.gate(own, mixer.aggregate(own, f, config), f, config)))

        frozen = {"frozen": "association", "synthesizer fixed": "scores"}.get(name)
        if frozen:
            fixed = own[frozen]
            slope = jax.grad(lambda own: out(own, x))(own)[frozen]
            assert not np.any(slope)
            check_grads(
                jax.jit(lambda own, x: out(own | {frozen: fixed}, x)), (own, x), 1, ["rev"], atol=1e-5, rtol=1e-5
            )
        else:
            check_grads(jax.jit(out), (own, x), 1, ["rev"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ONE_WAY)
def test_long_sequences_stay_finite_and_the_three_forms_agree_at_their_end(name):
    length = 2048
    config = model(name, length=length)
    mixer, own, x = config.mixer, weights(config), 3 * inputs(length, batch=1)

    @jax.jit
    def run(own, x):
        return mixer.aggregate(own, filtered(mixer, own, x, config), config), stepped(mixer, own, x, config)

    z, by_step = run(own, x)
    assert np.isfinite(z).all()
    # Sums of thousands of float32 numbers, taken in two orders.
    assert relative_error(by_step[:, -64:], z[:, -64:]) < 1e-3


@pytest.mark.parametrize("name", ONE_WAY)
def test_decoding_gives_the_full_passs_logits_at_every_position(name):
    config = model(name, length=10)
    parameters, tokens = random_parameters(config), random_tokens(config, length=9)
    whole = walk(parameters, tokens, config)
    cache, found = empty_cache(config, 2, 10), []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        walked, cache = walk_on(parameters, part, cache, config)
        found.append(walked.logits)
    assert relative_error(np.concatenate(found, axis=1), whole.logits) < 1e-4
    assert cache.filled.tolist() == [9, 9]


# One of each kind of state: which positions count is decided for all in one place.
@pytest.mark.parametrize("name", ["softmax", "uniform", "frozen", "aft simple", "rwkv6", "mamba", "lstm"])
def test_prompts_of_different_lengths_continue_as_each_would_alone(name):
    config = model(name, length=10)
    parameters, prompts = random_parameters(config), [[3, 1, 4, 1], [5], [9, 2]]
    together = generate(parameters, prompts, config, steps=3).tokens
    for prompt, continued in zip(prompts, together, strict=True):
        alone = generate(parameters, [prompt], config, steps=3).tokens[0]
        np.testing.assert_array_equal(continued, alone)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_stays_finite_and_near(name):
    config = model(name, length=20)
    parameters, tokens = random_parameters(config), random_tokens(config, length=16)
    half = walk(jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters), tokens, config)
    assert half.logits.dtype == jnp.bfloat16
    z, expected = np.asarray(half.layers.z[0], np.float32), walk(parameters, tokens, config).layers.z[0]
    assert np.isfinite(z).all()
    # Eight bits, and up to twenty sums and products on the way.
    assert relative_error(z, expected) < 40 * 2.0**-8
