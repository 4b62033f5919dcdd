"""Sparse autoencoders: formulas are torch's or written out; planted directions are found, and only by training."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    GPT2,
    LLAMA,
    bits,
    examples,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
)
from scipy.optimize import minimize

from minitf import mixers, walk
from minitf.analysis.sparse_autoencoder.activations import above, jump_relu, keep_largest
from minitf.analysis.sparse_autoencoder.autoencoder import (
    AutoencoderConfig,
    SparseAutoencoder,
    activate,
    encode,
    geometric_median,
    initialize,
    reconstruct,
)
from minitf.analysis.sparse_autoencoder.losses import losses
from minitf.analysis.sparse_autoencoder.place import Place
from minitf.analysis.sparse_autoencoder.training import train
from minitf.walk import get

RELU = AutoencoderConfig(width=5, latents=8, kind="relu", sparsity=0.3)
TOPK = AutoencoderConfig(width=5, latents=8, kind="topk", k=2, auxiliary_k=3)
JUMP = AutoencoderConfig(width=5, latents=8, kind="jumprelu", sparsity=0.3, threshold=0.4, bandwidth=0.5)
HYBRID = replace(LLAMA, mixer=(mixers.Uniform(), mixers.Softmax()))
kinds = pytest.mark.parametrize("config", [RELU, TOPK, JUMP], ids=lambda config: config.kind)


def random_autoencoder(config, seed=0, dtype=np.float64):
    generator = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(generator.normal(size=shape), dtype)
    return SparseAutoencoder(
        encoder=draw(config.width, config.latents),
        encoder_bias=draw(config.latents),
        decoder=draw(config.latents, config.width),
        decoder_bias=draw(config.width),
        log_threshold=0.3 * draw(config.latents) if config.kind == "jumprelu" else None,
        scale=jnp.asarray(0.7, dtype),
    )


def random_rows(config, count=100, seed=1, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, config.width)), dtype)


SGD = optax.sgd(0.125)
DEAD = np.array([True, False, True, True, False, True, True, False])


def slopes(config):
    """The parts of the loss and its slopes, in float64."""
    with jax.enable_x64(True):
        total = lambda a: losses(a, random_rows(config), config, jnp.asarray(DEAD))[0].total
        both = quick_jit(lambda a: (losses(a, random_rows(config), config, jnp.asarray(DEAD)), jax.grad(total)(a)))
        (parts, active), slope = jax.tree.map(np.asarray, both(random_autoencoder(config)))
        return parts, active, slope


def arrays(config):
    with jax.enable_x64(True):
        a, x = random_autoencoder(config), random_rows(config)
        return [None if y is None else np.asarray(y) for y in (*jax.tree.leaves(a), x)]


def check_slopes(found, expected):
    for name, slope in expected.items():
        assert relative_error(getattr(found, name), slope) < 1e-12, name


@pytest.mark.parametrize("config", [RELU, TOPK], ids=["relu", "topk"])
def test_the_loss_and_its_slopes_are_torchs(config):
    torch = pytest.importorskip("torch", reason="the peers are not installed: pip install 'minitf[peers]'")
    encoder, encoder_bias, decoder, decoder_bias, _, x = (torch.tensor(y) for y in arrays(config))
    weights = {"encoder": encoder, "encoder_bias": encoder_bias, "decoder": decoder, "decoder_bias": decoder_bias}
    for weight in weights.values():
        weight.requires_grad_()
    pre = (x - decoder_bias) @ encoder + encoder_bias
    positive = torch.relu(pre)

    def largest(values, k):
        top = torch.topk(values, k, dim=-1)
        return torch.zeros_like(values).scatter(-1, top.indices, top.values)

    f = positive if config.kind == "relu" else largest(positive, 2)
    left = x - (f @ decoder + decoder_bias)
    reconstruction = (left**2).sum(-1).mean()
    if config.kind == "relu":
        other = 0.3 * (f * decoder.norm(dim=1)).sum(-1).mean()
    else:
        dead = largest(positive * torch.tensor(DEAD), 3)
        other = ((left.detach() - dead @ decoder) ** 2).sum(-1).mean() / 32
    (reconstruction + other).backward()
    parts, active, slope = slopes(config)
    np.testing.assert_allclose(parts.reconstruction, reconstruction.item(), rtol=1e-12)
    np.testing.assert_allclose(parts.sparsity + parts.auxiliary, other.item(), rtol=1e-12)
    np.testing.assert_allclose(parts.l0, (f > 0).double().sum(-1).mean().item(), rtol=1e-12)
    assert active.tolist() == (f > 0).any(0).tolist() and 0 < parts.l0 < 8
    check_slopes(slope, {name: weight.grad.numpy() for name, weight in weights.items()})
    assert slope.scale == 0


def test_the_straight_through_slopes_of_jumprelu_are_the_papers():
    encoder, encoder_bias, decoder, decoder_bias, log_threshold, _, x = arrays(JUMP)
    rows, theta, epsilon, weight = len(x), np.exp(log_threshold), JUMP.bandwidth, JUMP.sparsity
    z = (x - decoder_bias) @ encoder + encoder_bias
    gate = (z > theta).astype(float)
    kernel = (np.abs((z - theta) / epsilon) < 0.5).astype(float)
    f = z * gate
    left = x - f @ decoder - decoder_bias
    # By hand, from the loss back: d left, d f, then d z through the open gates alone.
    d_left = 2 * left / rows
    d_f = -d_left @ decoder.T
    d_z = d_f * gate
    d_theta = (d_f * -(theta / epsilon) * kernel - weight / rows / epsilon * kernel).sum(0)
    parts, active, slope = slopes(JUMP)
    np.testing.assert_allclose(parts.reconstruction, (left**2).sum() / rows, rtol=1e-12)
    np.testing.assert_allclose(parts.sparsity, weight * gate.sum() / rows, rtol=1e-12)
    assert active.tolist() == gate.any(0).tolist()
    expected = {
        "encoder": (x - decoder_bias).T @ d_z,
        "encoder_bias": d_z.sum(0),
        "decoder": -f.T @ d_left,
        "decoder_bias": -d_left.sum(0) - (d_z @ encoder.T).sum(0),
        "log_threshold": theta * d_theta,
    }
    check_slopes(slope, expected)
    # The case is not an easy one: some pre-activations are near their threshold, and some are not.
    assert 10 < kernel.sum() < kernel.size / 2 and (expected["log_threshold"] != 0).sum() > 4


def test_the_penalty_on_l0_moves_thresholds_and_nothing_else():
    pre, theta = jnp.array([[0.9, 1.1, 3.0]]), jnp.ones(3)
    counted = lambda z, t: above(z, t, 0.5).sum()
    passed = lambda z, t: jump_relu(z, t, 0.5).sum()
    assert above(pre, theta, 0.5).tolist() == [[0, 1, 1]]
    assert jump_relu(pre, theta, 0.5).tolist() == [[0, pre[0, 1], 3]]
    assert [x.tolist() for x in jax.grad(counted, (0, 1))(pre, theta)] == [[[0, 0, 0]], [-2, -2, 0]]
    assert [x.tolist() for x in jax.grad(passed, (0, 1))(pre, theta)] == [[[0, 1, 1]], [-2, -2, 0]]


@examples(20)
@given(seed=st.integers(0, 10**6), k=st.sampled_from([1, 3, 8]))
def test_topk_keeps_the_k_largest_and_of_equal_ones_the_first(seed, k):
    values = np.random.default_rng(seed).integers(0, 5, size=(4, 8)).astype(np.float32)
    expected = np.zeros_like(values)
    for row in range(4):
        for place in sorted(range(8), key=lambda i: (-values[row, i], i))[:k]:
            expected[row, place] = values[row, place]
    np.testing.assert_array_equal(keep_largest(jnp.asarray(values), k), expected)


@kinds
def test_activations_are_positive_where_they_are_not_zero_and_as_sparse_as_their_kind_says(config):
    a = random_autoencoder(config, dtype=np.float32)
    pre = 2 * jnp.asarray(np.random.default_rng(3).normal(size=(50, 8)), jnp.float32)
    f = np.asarray(activate(pre, a, config))
    least = np.exp(np.asarray(a.log_threshold)) if config is JUMP else 0
    assert ((f == 0) | (f > least)).all() and (f[f > 0] == np.asarray(pre)[f > 0]).all()
    most = 2 if config is TOPK else 8
    assert 1 < (f > 0).sum(1).max() <= most


def test_no_dead_latent_no_auxiliary_loss():
    with jax.enable_x64(True):
        a, x = random_autoencoder(TOPK), random_rows(TOPK)
        assert losses(a, x, TOPK)[0].auxiliary == 0
        assert losses(a, x, TOPK, jnp.zeros(8, bool))[0].auxiliary == 0
        assert losses(a, x, TOPK, jnp.asarray(DEAD))[0].auxiliary > 0


def test_a_direction_of_length_zero_has_a_slope():
    a = random_autoencoder(RELU, dtype=np.float32)
    a = a.replace(decoder=a.decoder.at[2].set(0))
    slope = quick_jit(jax.grad(lambda a: losses(a, random_rows(RELU, dtype=np.float32), RELU)[0].total))(a)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope)) and np.asarray(slope.decoder[2]).any()


def test_the_geometric_median_is_the_nearest_point_and_hardly_moves_for_an_outlier():
    with jax.enable_x64(True):
        rows = random_rows(RELU, 30)
        found = np.asarray(geometric_median(rows, 500))
        outlier = rows.at[0].set(1e6)
        moved = np.asarray(geometric_median(outlier, 500))
    distance = lambda point, rows: np.linalg.norm(np.asarray(rows) - point, axis=1).sum()
    for point, of in ((found, rows), (moved, outlier)):
        best = minimize(distance, np.zeros(5), args=(of,), method="Powell", options={"xtol": 1e-10, "ftol": 1e-14})
        assert distance(point, of) <= best.fun * (1 + 1e-9)
    assert np.linalg.norm(moved - found) < 1 < 1e-3 * np.linalg.norm(np.asarray(outlier).mean(0))


@pytest.mark.parametrize("config", [RELU, JUMP], ids=["relu", "jumprelu"])
def test_at_the_start_rows_are_of_length_one_and_the_unit_of_the_data_does_not_matter(config):
    rows = 3 + random_rows(config, 64, dtype=np.float32)
    a = initialize(config, jax.random.key(0), rows)
    np.testing.assert_allclose(np.linalg.norm(a.decoder, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(a.encoder, a.decoder.T)
    np.testing.assert_allclose(np.mean(np.sum(np.square(rows * a.scale), axis=1)), 1, rtol=1e-5)
    assert (a.log_threshold is None) == (config is not JUMP)
    # The same in a unit a thousand times smaller; an exact power of two changes no bit.
    other = initialize(config, jax.random.key(0), rows * 1024)
    assert bits(other.replace(scale=a.scale)) == bits(a)
    assert bits(encode(other, rows * 1024, config)) == bits(encode(a, rows, config))
    assert bits(reconstruct(other, rows * 1024, config) / 1024) == bits(reconstruct(a, rows, config))


@kinds
def test_a_step_goes_down_the_slope_and_keeps_rows_at_length_one_where_the_method_says_so(config):
    start, rows = random_autoencoder(config, dtype=np.float32), random_rows(config, dtype=np.float32)
    if config.unit_rows:
        start = start.replace(decoder=start.decoder / jnp.linalg.norm(start.decoder, axis=1, keepdims=True))
    done = train(start, rows[None], config, optimizer=SGD, steps_per_program=1)
    slope = quick_jit(jax.grad(lambda a: losses(a, rows * start.scale, config)[0].total))(start)
    g, w = np.float64(slope.decoder), np.float64(start.decoder)
    if config.unit_rows:
        w = w - 0.125 * (g - (g * w).sum(1, keepdims=True) * w)
        w = w / np.linalg.norm(w, axis=1, keepdims=True)
    else:
        w = w - 0.125 * g
    np.testing.assert_allclose(done.autoencoder.decoder, w, atol=1e-5)
    for name in ("encoder", "encoder_bias", "decoder_bias"):
        expected = np.float64(getattr(start, name)) - 0.125 * np.float64(getattr(slope, name))
        np.testing.assert_allclose(getattr(done.autoencoder, name), expected, atol=1e-5)
    assert done.autoencoder.scale == start.scale
    assert done.finished and done.history.loss.shape == (1,)


def test_a_latent_is_dead_after_so_many_rows_without_activity():
    config = replace(TOPK, latents=4, k=1, auxiliary_k=0, dead_after=8)
    a = random_autoencoder(config, dtype=np.float32)
    a = a.replace(encoder_bias=jnp.array([100.0, -100.0, -100.0, -100.0]))
    rows = jnp.stack([random_rows(config, 4, dtype=np.float32)] * 5)
    done = train(a, rows, config, optimizer=optax.sgd(0.0), steps_per_program=5)
    assert done.history.dead_share.tolist() == [0, 0, 0.75, 0.75, 0.75]
    assert done.history.l0.tolist() == [1] * 5


# Planted data: sparse sums of 32 known directions in 24 dimensions, 2 of them in a row on average.
PLANTED, WIDTH, ACTIVE = 32, 24, 2


@functools.cache
def planted():
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(PLANTED, WIDTH))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    shape = (400 * 256, PLANTED)
    amounts = (generator.random(shape) < ACTIVE / PLANTED) * generator.uniform(0.5, 1.5, shape)
    return directions, (amounts @ directions).astype(np.float32).reshape(400, 256, WIDTH)


def best_cosines(decoder):
    rows = np.asarray(decoder, np.float64)
    return (planted()[0] @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T).max(axis=1)


FIND = {
    "relu": AutoencoderConfig(WIDTH, 40, "relu", sparsity=0.2),
    "topk": AutoencoderConfig(WIDTH, 40, "topk", k=3, auxiliary_k=8, dead_after=2048),
    "jumprelu": AutoencoderConfig(WIDTH, 40, "jumprelu", sparsity=0.05, threshold=0.1, bandwidth=0.1),
}
ADAM = optax.adam(0.01)


@pytest.mark.parametrize("config", FIND.values(), ids=FIND)
def test_training_finds_planted_directions(config):
    directions, rows = planted()
    start = initialize(config, jax.random.key(0), jnp.asarray(rows[0]))
    before = best_cosines(start.decoder)
    done = train(start, rows, config, optimizer=ADAM)
    after = best_cosines(done.autoencoder.decoder)
    # A direction is found when a row is nearer to it than any other planted direction is.
    between = (directions @ directions.T - 2 * np.eye(PLANTED)).max(axis=1)
    print(f"{config.kind}: cosines {before.mean():.3f} -> {after.mean():.3f}, to the nearest {between.mean():.3f}")
    assert np.mean(after > between) > 0.95
    # As many random rows find some by chance; the control is the best of 200 dictionaries of them.
    generator = np.random.default_rng(1)
    chance = [best_cosines(generator.normal(size=(40, WIDTH))).mean() for _ in range(200)]
    assert before.mean() < max(chance)
    assert 1 - after.mean() < 0.1 * (1 - max(chance))
    assert done.history.loss[-20:].mean() < 0.5 * done.history.loss[0]


def test_the_auxiliary_loss_brings_dead_latents_back():
    rows = planted()[1]
    config = FIND["topk"]
    start = initialize(config, jax.random.key(0), jnp.asarray(rows[0]))
    # Half of the latents begin where they are hardly ever among the largest.
    buried = start.replace(encoder_bias=jnp.where(jnp.arange(40) < 20, -0.5, 0.0))
    left, helped = (
        train(buried, rows, replace(config, auxiliary_k=k), optimizer=ADAM).history
        for k in (0, config.auxiliary_k)
    )
    dead, error = zip(*((h.dead_share[-1], h.reconstruction[-20:].mean()) for h in (left, helped)), strict=True)
    print(f"without and with the auxiliary loss: dead latents {dead}, error {error}")
    assert dead[1] < dead[0] and error[1] < 0.8 * error[0]


def test_training_on_tokens_is_training_on_the_vectors_of_their_walk():
    model, config = replace(GPT2, layers=1), AutoencoderConfig(GPT2.width, 20, sparsity=0.1)
    parameters, tokens = random_parameters(model), random_tokens(model, batch=6 * 4).reshape(6, 4, -1)
    place = Place(parameters, model, "layers.resid_mid", 0)
    leaf = quick_jit(lambda tokens: walk(parameters, tokens, model).layers.resid_mid[0])
    walked = [leaf(batch) for batch in tokens]
    rows = np.stack(walked).reshape(6, -1, GPT2.width)
    start = initialize(config, jax.random.key(0), jnp.asarray(rows[0]))
    from_rows = train(start, rows, config, steps_per_program=6)
    from_tokens = train(start, tokens, config, source=place, steps_per_program=6)
    np.testing.assert_allclose(from_tokens.history.loss, from_rows.history.loss, rtol=1e-5)
    # Adam's first steps are of one size wherever a slope is not zero, so roundings of a slope near zero show.
    np.testing.assert_allclose(from_tokens.autoencoder.decoder, from_rows.autoencoder.decoder, atol=1e-4)
    assert from_rows.history.loss[-1] < from_rows.history.loss[0]


def test_an_interrupted_training_returns_what_was_done():
    rows = random_rows(RELU, dtype=np.float32)

    def interrupted():
        yield from (rows, rows)
        raise KeyboardInterrupt

    start = random_autoencoder(RELU, dtype=np.float32)
    done = train(start, interrupted(), RELU, optimizer=SGD, steps_per_program=1)
    assert not done.finished and done.history.loss.shape == (2,)
    assert bits(done.autoencoder) == bits(
        train(start, [rows, rows], RELU, optimizer=SGD, steps_per_program=1).autoencoder
    )


@pytest.mark.parametrize("config", [LLAMA, HYBRID], ids=["llama", "hybrid"])
def test_a_place_reads_the_leaf_and_all_heads_of_it_as_one_vector(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    places = [("layers.z", 1), ("layers.post", 0), ("start", None)]

    @quick_jit
    def both(tokens):
        walked = walk(parameters, tokens, config)
        leaves = [get(walked, name) if layer is None else get(walked, name)[layer] for name, layer in places]
        return [Place(parameters, config, *place).rows(tokens) for place in places], leaves

    for rows, leaf in zip(*both(tokens), strict=True):
        np.testing.assert_allclose(rows, leaf.reshape(10, -1), atol=1e-5)


def config_with(**fields):
    # Users have no type checker that runs: past the one of the tests, each field is set behind its back.
    config = AutoencoderConfig(4, 8)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    config.__post_init__()


@functools.cache
def bad_calls():
    make = config_with
    place = functools.partial(Place, random_parameters(GPT2), GPT2)
    rows = jnp.ones((3, 5))
    start = functools.partial(initialize, RELU, jax.random.key(0))
    a = random_autoencoder(RELU, dtype=np.float32)
    return {
        "^kind is 'relus'; choose one of relu, topk, jumprelu$": lambda: make(kind="relus"),
        "^latents is 0; it must be a whole number of at least 1$": lambda: make(latents=0),
        "^width is 4.0; it must be a whole number of at least 1$": lambda: make(width=4.0),
        "^dead_after is True; it must be a whole number of at least 1$": lambda: make(dead_after=True),
        "^sparsity is -1.0; it must be a finite number of at least 0$": lambda: make(sparsity=-1.0),
        "^sparsity is nan; it must be a finite number of at least 0$": lambda: make(sparsity=float("nan")),
        "^auxiliary_weight is inf; it must be a finite number": lambda: make(auxiliary_weight=float("inf")),
        "^threshold is 0.0; it must be a finite number above 0$": lambda: make(kind="jumprelu", threshold=0.0),
        "^bandwidth is -0.1; it must be a finite number above 0$": lambda: make(kind="jumprelu", bandwidth=-0.1),
        "^k is 0; topk keeps 1 to 8 of its 8 latents$": lambda: make(kind="topk"),
        "^k is 9; topk keeps 1 to 8 of its 8 latents$": lambda: make(kind="topk", k=9),
        "^auxiliary_k is 9; it must be 0 to 8$": lambda: make(kind="topk", k=1, auxiliary_k=9),
        "^sparsity is 0.1, but topk has no penalty: k says how sparse it is$": lambda: make(
            kind="topk", k=1, sparsity=0.1
        ),
        "^k is 2 and auxiliary_k is 0, but they are for topk alone; relu is as sparse": lambda: make(k=2),
        r"the rows have shape \(3, 5\); this autoencoder reads \[row, 4\]": lambda: train(
            a, rows[None], replace(RELU, width=4)
        ),
        "tokens go from 0 to 12 here; a batch has 13 to": lambda: train(
            a, random_tokens(GPT2)[None] + 13, RELU, source=place("end")
        ),
        "the rows are int32; an autoencoder reads vectors": lambda: train(a, rows[None].astype(int), RELU),
        "the mean squared length of the rows is 0.0": lambda: start(0 * rows),
        "the mean squared length of the rows is nan": lambda: start(jnp.nan * rows),
        "did you mean 'layers.resid_post'": lambda: place("layers.resid_pots", 0),
        "'layers.resid_post' is a leaf of layers 0 to 1; layer is None": lambda: place("layers.resid_post"),
        "'layers.resid_post' is a leaf of layers 0 to 1; layer is 2": lambda: place("layers.resid_post", 2),
        "'end' is no leaf of a layer, but layer is 1; leave it out": lambda: place("end", 1),
        r"'layers.pattern' is \[batch, head, query, key\]: no vector": lambda: place("layers.pattern", 0),
        r"'position_embedding' is \[position, width\]: no vector": lambda: place("position_embedding"),
        r"'final_norm_scale' is \[batch, position\]: no vector": lambda: place("final_norm_scale"),
        "this model's walk has no 'layers.gated'": lambda: jax.eval_shape(
            place("layers.gated", 0).rows, random_tokens(GPT2)
        ),
    }


def test_what_cannot_be_is_refused_with_a_reason():
    for message, call in bad_calls().items():
        with pytest.raises(ValueError, match=message):
            call()
