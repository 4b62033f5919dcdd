"""The metrics of sparse autoencoders, by hand; and the loss recovered, whose ends are exact."""

import functools
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    quick_jit,
    random_parameters,
    random_tokens,
    shapes,
)

from minitf import walk
from minitf.analysis.sparse_autoencoder import evaluation
from minitf.analysis.sparse_autoencoder.autoencoder import AutoencoderConfig, SparseAutoencoder, reconstruct
from minitf.analysis.sparse_autoencoder.evaluation import loss_recovered, measure, top_examples
from minitf.analysis.sparse_autoencoder.place import Place
from minitf.edits import set_to
from minitf.walk import get


def identity(width):
    """One latent for each direction of each axis: relu(x) - relu(-x) = x, without any rounding."""
    both = jnp.concatenate([jnp.eye(width), -jnp.eye(width)])
    config = AutoencoderConfig(width, 2 * width)
    nothing = jnp.zeros(width)
    return SparseAutoencoder(both.T, jnp.zeros(2 * width), both, nothing, None, jnp.ones(())), config


def random_autoencoder(width, latents=9, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(0.3 * generator.normal(size=shape), jnp.float32)
    a = SparseAutoencoder(
        draw(width, latents), draw(latents), draw(latents, width), draw(width), None, jnp.float32(0.5)
    )
    return a, AutoencoderConfig(width, latents)


def test_metrics_of_a_case_done_by_hand():
    # Two axes, four latents: x, y, -x, -y; the decoder forgets y.
    a, config = identity(2)
    a = a.replace(decoder=a.decoder.at[1::2].set(0))
    rows = jnp.array([[3.0, 1.0], [-1.0, 0.0], [1.0, 2.0], [1.0, 1.0]])
    found = measure(a, [rows], config)
    assert found.density.tolist() == [0.75, 0.75, 0.25, 0]
    assert (found.l0, found.dead_share) == (1.75, 0.25)
    # The mean is (1, 1): squares around it are 4 + 0, 4 + 1, 0 + 1, 0 + 0. Errors are y squared: 1, 0, 4, 1.
    assert found.explained_variance == 1 - 6 / 10


def test_metrics_of_many_batches_are_those_of_all_rows_in_float64():
    a, config = random_autoencoder(6)
    # Far from zero, where a difference of large sums of squares would be rounding alone.
    rows = 100 + np.random.default_rng(1).normal(size=(5, 16, 6)).astype(np.float32)
    seen = []
    found = measure(a, rows, config, progress=lambda batches: (seen.append(0) or batch for batch in batches))
    x = np.float64(rows).reshape(-1, 6)
    weights = {n: np.float64(getattr(a, n)) for n in ("encoder", "encoder_bias", "decoder", "decoder_bias")}
    f = np.maximum((0.5 * x - weights["decoder_bias"]) @ weights["encoder"] + weights["encoder_bias"], 0)
    error = np.square(x - (f @ weights["decoder"] + weights["decoder_bias"]) / 0.5).sum()
    np.testing.assert_allclose(found.explained_variance, 1 - error / np.square(x - x.mean(0)).sum(), rtol=1e-4)
    np.testing.assert_allclose(found.density, (f > 0).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.l0, (f > 0).sum(1).mean(), rtol=1e-12)
    assert len(seen) == 5


def test_the_identity_explains_everything_and_the_mean_nothing():
    a, config = identity(3)
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(40, 3)), jnp.float32)
    assert measure(a, [rows], config).explained_variance == 1
    mean = a.replace(decoder=0 * a.decoder, decoder_bias=rows.mean(0))
    np.testing.assert_allclose(measure(mean, [rows], config).explained_variance, 0, atol=1e-6)


@pytest.mark.parametrize("batches", [1, 4])
def test_top_examples_are_the_largest_activations_wherever_they_are(batches):
    a, config = random_autoencoder(6)
    a = a.replace(encoder_bias=a.encoder_bias.at[0].set(-100.0))
    rows = np.random.default_rng(1).normal(size=(24, 6)).astype(np.float32)
    f = np.maximum(
        (0.5 * rows - np.asarray(a.decoder_bias)) @ np.asarray(a.encoder) + np.asarray(a.encoder_bias), 0
    )
    found = top_examples(a, rows.reshape(batches, -1, 6), config, 5)
    assert found.row.shape == (9, 5)
    for latent in range(9):
        order = [r for r in np.argsort(-f[:, latent], kind="stable")[:5] if f[r, latent] > 0]
        assert found.row[latent].tolist() == order + [-1] * (5 - len(order))
        np.testing.assert_allclose(found.activation[latent, : len(order)], f[order, latent], atol=1e-5)
    assert found.row[0].tolist() == [-1] * 5 and not np.asarray(found.activation[0]).any()


def test_top_examples_of_tokens_are_positions_of_sequences():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2, batch=4)
    a, config = identity(GPT2.width)
    place = Place(parameters, GPT2, "start")
    found = top_examples(a, tokens.reshape(2, 2, -1), config, 1, source=place)
    start = np.asarray(quick_jit(lambda t: walk(parameters, t, GPT2).start)(tokens))
    for latent in range(GPT2.width):
        sequence, position = divmod(int(found.row[latent, 0]), tokens.shape[1])
        assert start[sequence, position, latent] == start[..., latent].max() > 0


PLACES = {
    "z": (GPT2, "layers.z", 1),
    "start": (LLAMA, "start", None),
}


@pytest.mark.parametrize(("model", "name", "layer"), PLACES.values(), ids=PLACES)
def test_the_loss_recovered_is_one_for_the_identity_zero_for_zeros_and_else_that_of_the_edited_walk(
    model, name, layer
):
    parameters, tokens = random_parameters(model), random_tokens(model, batch=3)
    place = Place(parameters, model, name, layer)
    rows = quick_jit(place.rows)(tokens)
    width = rows.shape[1]
    same, config = identity(width)
    programs = evaluation._next_token_losses._cache_size()
    recovered = functools.partial(loss_recovered, tokens=tokens, config=config, place=place)
    assert recovered(same).share == 1
    assert recovered(same.replace(decoder=0 * same.decoder)).share == 0
    some = same.replace(decoder=jnp.linspace(0.2, 1.5, 2 * width)[:, None] * same.decoder)
    found = recovered(some)
    assert evaluation._next_token_losses._cache_size() == programs + 1

    # The same from whole walks with an edit, one for each loss, and the loss in float64.
    run = quick_jit(lambda edit: walk(parameters, tokens, model, edit=edit).logits)
    like = shapes(model, parameters, tokens)
    index = {} if layer is None else {"layer": layer}

    def loss(values):
        put = values.reshape(get(like, name).shape[len(index) :])
        logits = np.float64(run(set_to(like, name, put, **index)))[:, :-1]
        logits -= logits.max(-1, keepdims=True)
        says = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(says, np.asarray(tokens)[:, 1:, None], -1).mean()

    clean, edited, zero = loss(rows), loss(reconstruct(some, rows, config)), loss(0 * rows)
    # Means of logarithms around 3, a few hundred roundings.
    np.testing.assert_allclose([found.clean, found.reconstructed, found.zero], [clean, edited, zero], atol=1e-5)
    assert abs(edited - clean) > 1e-3
    np.testing.assert_allclose(found.share, (zero - edited) / (zero - clean), rtol=1e-2)


def test_losses_that_cannot_be_recovered_are_refused():
    a, config = identity(GPT2.width)
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    with pytest.raises(ValueError, match="the next token is predicted by causal models"):
        loss_recovered(a, tokens, config, Place(random_parameters(BERT), BERT, "end"))
    with pytest.raises(ValueError, match="a sequence of one token has no next token"):
        loss_recovered(a, tokens[:, :1], config, Place(parameters, GPT2, "end"))
    with pytest.raises(ValueError, match="tokens go from 0 to 12 here; a batch has 13 to"):
        loss_recovered(a, tokens + 13, config, Place(parameters, GPT2, "end"))
    wide, other = identity(3)
    with pytest.raises(ValueError, match=r"the rows have shape \(10, 12\); this autoencoder reads \[row, 3\]"):
        loss_recovered(wide, tokens, other, Place(parameters, GPT2, "end"))
    with pytest.raises(ValueError, match="the losses .*nan.* are not all finite"):
        loss_recovered(a.replace(scale=jnp.float32(jnp.nan)), tokens, config, Place(parameters, GPT2, "end"))
    # An unembedding of zeros says the same whatever the walk was.
    silent = replace(GPT2, tied=False)
    weights = random_parameters(silent)
    weights = weights.replace(unembedding=0 * weights.unembedding)
    with pytest.raises(ValueError, match="zeroing 'end' leaves the loss as it is, so there is no loss to recover"):
        loss_recovered(a, tokens, config, Place(weights, silent, "end"))


def test_data_that_cannot_be_measured_are_refused():
    a, config = identity(3)
    with pytest.raises(ValueError, match="there is no batch to measure on"):
        measure(a, [], config)
    with pytest.raises(ValueError, match="all rows are the same, so there is no variance to explain"):
        measure(a, [jnp.ones((4, 3))], config)
    with pytest.raises(ValueError, match="rows, or what is reconstructed of them, are not finite"):
        measure(a, [jnp.full((4, 3), jnp.nan)], config)
    place = Place(random_parameters(GPT2), GPT2, "end")
    for function in (measure, functools.partial(top_examples, count=1)):
        with pytest.raises(ValueError, match="tokens go from 0 to 12 here; a batch has 13 to"):
            function(a, [random_tokens(GPT2) + 13], config, source=place)
    with pytest.raises(ValueError, match=r"the rows have shape \(4, 2\); this autoencoder reads \[row, 3\]"):
        measure(a, [jnp.ones((4, 2))], config)
    with pytest.raises(ValueError, match="there is no batch to look for examples in"):
        top_examples(a, [], config, 1)
    with pytest.raises(ValueError, match="count is 0; there must be at least 1 example"):
        top_examples(a, [jnp.ones((4, 3))], config, 0)
