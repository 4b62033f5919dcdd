"""Circuits on factors, compared with the dense matrices that they never form."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import BERT, GPT2, LLAMA, compiled, random_parameters, random_tokens

from minitf import ModelConfig, mixers, token_tables
from minitf.analysis import circuits

THREE = replace(LLAMA, layers=3)
WIDE_HEADS = replace(GPT2, head_width=16)  # wider than the model: the rank is the width


def dense(parameters, config, layer, head, kind, gain=False):
    """One head's OV or QK, width x width, in float64."""
    attention = jax.tree.map(np.float64, parameters.layers.attention)
    group = head // (config.heads // config.groups)
    reads = np.diag(np.float64(parameters.layers.attention_norm.gain[layer])) if gain else np.eye(config.width)
    if kind == "ov":
        return reads @ attention.value[layer, :, group] @ attention.output[layer, head]
    return reads @ attention.query[layer, :, head] @ attention.key[layer, :, group].T @ reads


@pytest.mark.parametrize("config", [GPT2, LLAMA, BERT, WIDE_HEADS], ids=["gpt2", "llama", "bert", "wide"])
@pytest.mark.parametrize("kind", ["ov", "qk"])
def test_the_decomposition_is_that_of_the_dense_matrix(config, kind):
    parameters = random_parameters(config)
    factors = getattr(circuits, kind)(parameters, config)
    u, s, vt = circuits.decompose(factors)
    rank = min(config.width, config.head_size)
    for layer, head in np.ndindex(config.layers, config.heads):
        matrix = dense(parameters, config, layer, head, kind)
        expected = np.linalg.svd(matrix, compute_uv=False)
        # Backward stable: errors of some width roundings of the largest singular value.
        tolerance = 20 * config.width * 2.0**-24 * expected[0]
        np.testing.assert_allclose(s[layer, head], expected[:rank], atol=tolerance)
        np.testing.assert_allclose((u * s[..., None, :])[layer, head] @ vt[layer, head], matrix, atol=tolerance)
        np.testing.assert_allclose(u[layer, head].T @ u[layer, head], np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(vt[layer, head] @ vt[layer, head].T, np.eye(rank), atol=1e-5)
        found = np.asarray(circuits.eigenvalues(factors)[layer, head])
        for eigenvalue in found[np.abs(found) > 0.05 * np.abs(found).max()]:
            # A singular shifted matrix, whatever the order of the eigenvalues.
            smallest = np.linalg.svd(matrix - eigenvalue * np.eye(config.width), compute_uv=False)[-1]
            assert smallest < 100 * tolerance
        np.testing.assert_allclose(found.sum(), np.trace(matrix), atol=config.width * tolerance)


def test_gains_are_folded_only_when_asked():
    parameters = random_parameters(LLAMA)
    for kind in ("ov", "qk"):
        plain, folded = (getattr(circuits, kind)(parameters, LLAMA, fold_norm=fold) for fold in (False, True))
        for layer, head in np.ndindex(2, 4):
            for factors, gain in ((plain, False), (folded, True)):
                product = factors.left[layer, head] @ factors.right[layer, head]
                expected = dense(parameters, LLAMA, layer, head, kind, gain)
                np.testing.assert_allclose(product, expected, atol=1e-4)
    with pytest.raises(ValueError, match="none to fold"):
        circuits.ov(random_parameters(BERT), BERT, fold_norm=True)


def test_what_a_head_writes_is_its_ov_circuit_of_what_it_reads():
    config = replace(LLAMA, norm="none")
    parameters, tokens = random_parameters(config), random_tokens(config)
    walk = compiled(config)(parameters, tokens)
    left, right = circuits.ov(parameters, config)
    for layer, head in np.ndindex(2, 4):
        mixed = np.einsum("bqk,bkw->bqw", walk.layers.pattern[layer, :, head], walk.layers.resid_pre[layer])
        expected = mixed @ left[layer, head] @ right[layer, head]
        np.testing.assert_allclose(walk.layers.head_steps[layer, :, :, head], expected, rtol=1e-3, atol=1e-4)


def test_what_a_head_scores_is_its_qk_circuit_of_what_it_compares():
    config = replace(LLAMA, norm="none", position="none")
    parameters, tokens = random_parameters(config), random_tokens(config)
    walk = compiled(config)(parameters, tokens)
    left, right = circuits.qk(parameters, config)
    x = np.asarray(walk.layers.resid_pre)
    allowed = np.tri(5, dtype=bool)
    for layer, head in np.ndindex(2, 4):
        scores = np.einsum("bqw,bkw->bqk", x[layer] @ left[layer, head], x[layer] @ right[layer, head].T) * 0.5
        found = np.asarray(walk.layers.scores)[layer, :, head]
        np.testing.assert_allclose(found[:, allowed], scores[:, allowed], rtol=1e-3, atol=1e-3)


def test_the_effective_rank_counts_equal_directions_and_is_zero_for_nothing():
    s = jnp.array([[1.0, 1.0, 1.0, 0.0], [2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(circuits.effective_rank(s), [3, 1, 0], rtol=1e-6)
    values = np.random.default_rng(0).uniform(size=6)
    share = values / values.sum()
    found = circuits.effective_rank(jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(found, np.prod(share**-share), rtol=1e-5)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["tied", "grouped"])
def test_the_copying_score_is_that_of_the_vocabulary_sized_matrix(config, fold):
    parameters = random_parameters(config)
    found = jax.jit(lambda p: circuits.copying_score(p, config, fold_norm=fold))(parameters)
    embedding = np.float64(parameters.embedding)
    out = embedding.T if config.tied else np.float64(parameters.unembedding)
    out = np.float64(parameters.final_norm.gain)[:, None] * out if fold else out
    for layer, head in np.ndindex(config.layers, config.heads):
        values = np.linalg.eigvals(embedding @ dense(parameters, config, layer, head, "ov", fold) @ out)
        # The zero eigenvalues of the large matrix come out as some 1e-15; of the small one there are none.
        assert abs(found[layer, head] - values.sum().real / np.abs(values).sum()) < 1e-3


def test_a_head_that_writes_what_it_reads_copies_and_one_that_takes_it_away_does_the_contrary():
    config = replace(GPT2, layers=1, heads=2, head_width=12)
    parameters = random_parameters(config)
    same = jnp.broadcast_to(jnp.eye(12)[:, None], (1, 12, 2, 12))
    output = jnp.stack([jnp.eye(12), -jnp.eye(12)])[None]
    attention = parameters.layers.attention.replace(value=same, output=output)
    parameters = parameters.replace(layers=parameters.layers.replace(attention=attention))
    np.testing.assert_allclose(circuits.copying_score(parameters, config), [[1, -1]], atol=1e-4)
    assert circuits.copying_score(jax.tree.map(jnp.zeros_like, parameters), config).tolist() == [[0, 0]]


@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("fold", [False, True])
def test_composition_is_the_norm_of_the_dense_product(kind, fold):
    parameters = random_parameters(THREE)
    found = jax.jit(lambda p: circuits.composition(p, THREE, kind, fold_norm=fold))(parameters)
    norm = np.linalg.norm
    for layer, head, later, other in np.ndindex(3, 4, 3, 4):
        first = dense(parameters, THREE, layer, head, "ov", fold)
        second = dense(parameters, THREE, later, other, "ov" if kind == "v" else "qk", fold)
        second = second.T if kind == "k" else second
        expected = norm(first @ second) / (norm(first) * norm(second)) if later > layer else 0.0
        assert abs(found[layer, head, later, other] - expected) < 1e-5


def test_heads_of_random_weights_compose_as_the_baseline_says():
    config = replace(GPT2, layers=3, width=64, heads=8)
    parameters = random_parameters(config)
    for kind in ("q", "k", "v"):
        found = np.asarray(circuits.composition(parameters, config, kind))
        pairs = found[found > 0]
        assert len(pairs) == 3 * 8 * 8
        # Each squared share has a relative spread of about 1 / head_width; their mean over 192 pairs much less.
        assert abs(np.sqrt((pairs**2).mean()) / circuits.random_composition(config) - 1) < 0.05


def test_a_head_made_to_read_another_stands_out():
    config = replace(GPT2, width=32, heads=4, head_width=4)
    parameters = random_parameters(config)
    written = parameters.layers.attention.output[0, 1]
    query = parameters.layers.attention.query.at[1, :, 2].set(written.T)
    attention = parameters.layers.attention.replace(query=query)
    made = parameters.replace(layers=parameters.layers.replace(attention=attention))
    found = np.asarray(circuits.composition(made, config, "q"))
    assert np.unravel_index(found.argmax(), found.shape) == (0, 1, 1, 2)
    assert found.max() > 2 * circuits.random_composition(config)


def test_no_array_as_large_as_width_by_width_is_made():
    config = replace(GPT2, width=96, heads=24, vocabulary=50)
    parameters = jax.eval_shape(lambda: random_parameters(config))
    for question in (
        lambda p: circuits.decompose(circuits.ov(p, config)),
        lambda p: circuits.composition(p, config, "q"),
        lambda p: circuits.copying_score(p, config),
    ):
        text = jax.jit(question).lower(parameters).as_text()
        assert "96x96x" not in text


def test_what_has_no_factors_or_composes_otherwise_is_refused_with_a_sentence():
    other = ModelConfig(vocabulary=7, width=8, heads=2, mixer=mixers.Retention())
    with pytest.raises(ValueError, match="^circuits are of softmax attention in layers that are alike"):
        circuits.copying_score(random_parameters(other), other)
    table = token_tables(7)
    with pytest.raises(ValueError, match="free table has no query"):
        circuits.qk(random_parameters(table), table)
    with pytest.raises(ValueError, match="through q, k or v, not 'o'"):
        circuits.composition(random_parameters(GPT2), GPT2, "o")
