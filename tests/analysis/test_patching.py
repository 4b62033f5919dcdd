"""Activation patching is one whole edited walk for every patch; attribution patching, where it is exact."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    NEOX,
    compiled,
    quick_jit,
    random_parameters,
    random_tokens,
    shapes,
)

from minitf import Walk, change, walk
from minitf.analysis import patching
from minitf.analysis.attribution_patching import attribution_patching, summed
from minitf.walk import get, leaf_axes, stacked

DEEP = replace(GPT2, layers=3)


def lead(logits):
    """The lead of one token over another at the last position, by sequence."""
    return logits[:, -1, 1] - logits[:, -1, 2]


def mean_lead(logits):
    return jnp.mean(logits[:, -1, 1] - logits[:, -1, 2])


def setting(config):
    parameters = random_parameters(config)
    clean_tokens, corrupt_tokens = random_tokens(config, 0), random_tokens(config, 1)
    run = compiled(config)
    return parameters, corrupt_tokens, run(parameters, corrupt_tokens), run(parameters, clean_tokens)


def one_by_one(parameters, tokens, clean, metric, config, places):
    """The sweep written as a loop: a whole walk for every layer and place."""
    name, over = places
    values, axes = get(clean, name), leaf_axes()[name]
    swept = [a for a in axes if a == "layer" or a in over]
    found = np.zeros([values.shape[axes.index(a)] for a in swept], object)
    for index in np.ndindex(*found.shape):
        where = dict(zip(swept, (int(i) for i in index), strict=True))
        value = values[tuple(where.get(a, slice(None)) for a in axes)]
        edit = change(shapes(config), name, **where, keep=0.0, put=value)
        found[index] = np.asarray(metric(compiled(config)(parameters, tokens, edit).logits))
    return np.array(found.tolist())


@pytest.mark.parametrize(
    ("config", "places"),
    [
        (DEEP, patching.HEADS),
        (DEEP, patching.HEADS_BY_POSITION),
        (DEEP, patching.STARTS_BY_POSITION),
        (DEEP, patching.ATTENTION_BY_POSITION),
        (DEEP, patching.FEED_FORWARD_BY_POSITION),
        (DEEP, ("layers.resid_post", ())),
        (LLAMA, patching.HEADS),
        (LLAMA, ("layers.v", ("key_value_head",))),
        (LLAMA, ("layers.pattern", ("head", "query"))),
        (BERT, patching.HEADS_BY_POSITION),
        (BERT, patching.STARTS_BY_POSITION),
        (NEOX, patching.HEADS),
    ],
    ids=lambda x: x[0] + "-by-" + "-".join(x[1]) if isinstance(x, tuple) else x.position + x.norm_placement,
)
def test_a_sweep_is_one_whole_edited_walk_for_every_place(config, places):
    parameters, tokens, corrupt, clean = setting(config)
    found = patching.patch(parameters, corrupt, clean, lead, config, places)
    expected = one_by_one(parameters, tokens, clean, lead, config, places)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize("memory", [1, 20_000, 2**28])
def test_the_memory_bound_sets_how_many_run_together_and_nothing_else(memory):
    parameters, _, corrupt, clean = setting(LLAMA)
    sweep = lambda **how: patching.patch(
        parameters, corrupt, clean, lead, LLAMA, patching.HEADS_BY_POSITION, **how
    )
    np.testing.assert_allclose(sweep(memory=memory), sweep(), atol=1e-5)


def test_fewer_positions_for_the_metric_and_fewer_leaves_of_the_walks_give_the_same():
    parameters, _, corrupt, clean = setting(DEEP)
    whole = patching.patch(parameters, corrupt, clean, lead, DEEP)
    pre = Walk(layers=Walk().layers.replace(resid_pre=corrupt.layers.resid_pre))
    z = Walk(layers=Walk().layers.replace(z=clean.layers.z))
    np.testing.assert_allclose(patching.patch(parameters, pre, z, lead, DEEP, at=[-1]), whole, atol=1e-5)


def test_a_patch_on_padded_sequences_sees_no_padding():
    parameters, tokens, _, _ = setting(DEEP)
    valid = jnp.arange(5)[None, :] >= jnp.array([[2], [0]])
    run = quick_jit(lambda tokens, edit=None: walk(parameters, tokens, DEEP, edit=edit, valid=valid))
    corrupt, clean = run(tokens), run(random_tokens(DEEP))
    found = patching.patch(parameters, corrupt, clean, lead, DEEP, valid=valid)
    edit = change(shapes(DEEP), "layers.z", layer=1, head=2, keep=0.0, put=clean.layers.z[1, :, :, 2])
    expected = lead(run(tokens, edit).logits)
    np.testing.assert_allclose(found[1, 2], expected, atol=1e-5)


def test_a_patch_from_the_same_walk_changes_nothing_and_of_everything_brings_all_back():
    parameters, _, corrupt, clean = setting(DEEP)
    nothing = patching.patch(parameters, corrupt, corrupt, lead, DEEP)
    np.testing.assert_allclose(nothing - lead(corrupt.logits), 0, atol=1e-5)
    everything = patching.patch(parameters, corrupt, clean, lead, DEEP, ("layers.resid_pre", ()))
    share = patching.normalized(everything, lead(clean.logits), lead(corrupt.logits))
    np.testing.assert_allclose(share, 1, atol=1e-4)
    np.testing.assert_allclose(
        patching.normalized(nothing, lead(clean.logits), lead(corrupt.logits)), 0, atol=1e-4
    )


def test_a_whole_sweep_is_one_program_and_shows_its_progress():
    parameters, _, corrupt, clean = setting(DEEP)
    seen = []
    before = patching._patched_layer._cache_size()
    patching.patch(
        parameters, corrupt, clean, mean_lead, DEEP, progress=lambda layers: (seen.append(i) or i for i in layers)
    )
    assert patching._patched_layer._cache_size() == before + 1
    assert seen == [0, 1, 2]


def attributions(parameters, tokens, clean, config, names):
    return quick_jit(lambda p, t, c: attribution_patching(p, t, c, mean_lead, config, names))(
        parameters, tokens, clean
    )


def linear_at_the_end(parallel=False):
    """Models whose logits are linear in the last layer's attention step: no norm after it, no feed-forward."""
    if parallel:
        return replace(NEOX, norm="none")
    return replace(GPT2, norm="none", feed_forward="none")


@pytest.mark.parametrize("parallel", [False, True])
def test_attribution_patching_is_exact_where_the_metric_is_linear(parallel):
    config = linear_at_the_end(parallel)
    parameters, tokens, corrupt, clean = setting(config)
    for places in (patching.HEADS_BY_POSITION, patching.ATTENTION_BY_POSITION):
        estimate = attributions(parameters, tokens, clean, config, [places[0]])[places[0]]
        true = patching.patch(parameters, corrupt, clean, mean_lead, config, places) - mean_lead(corrupt.logits)
        # Sums of some hundred products of numbers around ten.
        scale = np.abs(true[-1]).max()
        np.testing.assert_allclose(summed(estimate, places)[-1], true[-1], atol=1e-5 * max(scale, 10))
        assert scale > 1e-2
        assert np.abs(summed(estimate, places)[0] - true[0]).max() > 1e-3 * scale
    whole = attributions(parameters, tokens, clean, config, ["end"])["end"]
    np.testing.assert_allclose(whole.sum(), mean_lead(clean.logits) - mean_lead(corrupt.logits), rtol=1e-4)


@pytest.mark.parametrize("config", [DEEP, LLAMA], ids=["gpt2", "llama"])
def test_for_small_differences_attribution_patching_is_true_patching(config):
    # The error is of second order: as a share of the effect, it falls with the difference.
    parameters, tokens, corrupt, clean = setting(config)
    near = jax.tree.map(lambda a, b: a + 0.01 * (b - a), corrupt.layers.z, clean.layers.z)
    near = clean.replace(layers=clean.layers.replace(z=near))
    places = patching.HEADS
    true = patching.patch(parameters, corrupt, near, mean_lead, config, places) - mean_lead(corrupt.logits)
    found = summed(attributions(parameters, tokens, near, config, ["layers.z"])["layers.z"], places)
    assert np.abs(found - true).max() < 0.05 * np.abs(true).max()
    clear = np.abs(true) > 0.2 * np.abs(true).max()
    assert (np.sign(found) == np.sign(true))[clear].all()


def test_attributions_of_leaves_with_forbidden_entries_are_numbers():
    parameters, tokens, _, clean = setting(GPT2)
    names = ["start", "layers.scores", "layers.pattern", "layers.pre"]
    found = attributions(parameters, tokens, clean, GPT2, names)
    for name in names:
        assert found[name].shape == get(clean, name).shape
        assert np.isfinite(found[name]).all()
        assert np.asarray(found[name]).any()


def two_leads(logits):
    return lead(logits), lead(logits)


def bad_calls():
    parameters, tokens, corrupt, clean = setting(GPT2)
    patch = lambda *a, **k: patching.patch(parameters, *a, **k)
    attribute = lambda clean, names: attribution_patching(parameters, tokens, clean, mean_lead, GPT2, names)
    short = compiled(GPT2)(parameters, tokens[:, :4])
    return {
        "no leaf 'layers.zz'": lambda: patch(corrupt, clean, lead, GPT2, ("layers.zz", ())),
        "'start' is not in the layers": lambda: patch(corrupt, clean, lead, GPT2, ("start", ())),
        "place by place over 'batch'": lambda: patch(corrupt, clean, lead, GPT2, ("layers.z", ("batch",))),
        "holds no 'layers.gated'": lambda: patch(corrupt, clean, lead, GPT2, ("layers.gated", ())),
        "holds no 'layers.resid_pre'": lambda: patch(Walk(), clean, lead, GPT2),
        "2 and 2 layers; the model has 3": lambda: patch(corrupt, clean, lead, DEEP),
        r"at=\[\] leaves the metric no logits": lambda: patch(corrupt, clean, lead, GPT2, at=[]),
        "in which an axis comes twice": lambda: patch(corrupt, clean, lead, GPT2, ("layers.z", ("head", "head"))),
        "the metric gives a tuple; it must give one array": lambda: patch(corrupt, clean, two_leads, GPT2),
        "4 on its position axis, the corrupted one 5": lambda: patch(corrupt, short, lead, GPT2),
        r"at=\[5\] leaves the 5 positions": lambda: patch(corrupt, clean, lead, GPT2, at=[5]),
        "have the same metric": lambda: patching.normalized(jnp.ones(2), jnp.ones(2), jnp.array([0.0, 1.0])),
        "clean walk holds no 'start'": lambda: attribute(Walk(), ["start"]),
        "this model has no 'layers.gated'": lambda: attribute(clean, ["layers.gated"]),
        r"metric is ShapeDtypeStruct\(shape=\(2,\), .* and a slope is that of one number": lambda: (
            attribution_patching(parameters, tokens, clean, lead, GPT2, ["layers.z"])
        ),
        r"shape \(2, 4, 12\) in the clean walk": lambda: attribute(short, ["start"]),
    }


def test_what_cannot_be_patched_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()


@pytest.mark.parametrize(
    "places",
    [
        ("layers.z", ("head",)),
        ("layers.z", ("position", "head")),
        ("layers.pattern", ("head", "query")),
        ("layers.scores", ("head",)),
        ("layers.q", ("head",)),
        ("layers.v", ("key_value_head",)),
        ("layers.resid_pre", ("position",)),
        ("layers.post", ("hidden",)),
    ],
)
def test_reading_some_positions_alone_changes_no_effect(places):
    parameters, _, corrupt, clean = setting(LLAMA)
    whole = patching.patch(parameters, corrupt, clean, lead, LLAMA, places)
    some = patching.patch(parameters, corrupt, clean, lead, LLAMA, places, at=(-1,))
    finite = jnp.isfinite(whole)
    np.testing.assert_allclose(jnp.where(finite, some, 0), jnp.where(finite, whole, 0), atol=2e-5)
    np.testing.assert_array_equal(jnp.isfinite(some), finite)


def test_what_a_layer_does_not_have_is_no_number_also_among_counts():
    found = stacked([jnp.arange(3), jnp.arange(2), None], (0,), jnp.nan)
    np.testing.assert_array_equal(found, [[0, 1, 2], [0, 1, np.nan], [np.nan] * 3])
