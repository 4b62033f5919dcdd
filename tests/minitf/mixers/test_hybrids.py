"""Models whose layers mix by different means: one walk, one edit, one cache."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from minitf_mixers import EVERY, model
from properties.models import compiled, likeliest_after, random_parameters, random_tokens, relative_error, shapes

from minitf import Edit, ModelConfig, change, compose, describe, identity_edit, initialize, mixers, walk
from minitf.analysis import association, edges, path_patching, patterns
from minitf.analysis.attribution_patching import attribution_patching, summed
from minitf.analysis.causal_scrubbing import Node, scrub
from minitf.analysis.patching import patch
from minitf.analysis.prediction_quality import metric as metric_of
from minitf.analysis.prediction_quality import next_tokens
from minitf.config import from_plain, to_plain
from minitf.decode import empty_cache, generate
from minitf.edits import ablate, freeze_association, mean_ablate, resample, set_to, steer
from minitf.families import native
from minitf.model import walk_on
from minitf.pretrained import load
from minitf.record import record
from minitf.resume import end_from, layer_walk, walk_from
from minitf.walk import Change, get, leaves, put

HYBRID = ModelConfig(
    vocabulary=11,
    layers=4,
    width=8,
    heads=2,
    length=12,
    position="rotary",
    mixer=(mixers.Mamba(states=4), mixers.Softmax(), mixers.Retention(), mixers.Gru()),
)
PARAMETERS, TOKENS = random_parameters(HYBRID), random_tokens(HYBRID, length=9)
# Layers that differ in their heads, of which there are one and two, and that compile in no time.
PAIR = dataclasses.replace(HYBRID, layers=2, mixer=(mixers.Proximity(), mixers.Softmax()))
TWO = random_parameters(PAIR)


def test_leaves_have_a_layer_axis_where_layers_are_alike_and_are_tuples_where_they_differ():
    walked = compiled(HYBRID)(PARAMETERS, TOKENS)
    assert walked.layers.resid_pre.shape == (4, 2, 9, 8)
    assert [x.shape for x in walked.layers.pattern] == [(2, 16, 9, 9), (2, 2, 9, 9), (2, 2, 9, 9), (2, 8, 9, 9)]
    assert [x is None for x in walked.layers.scores] == [True, False, True, True]
    described = {leaf.name: leaf.shape for leaf in describe(lambda: walk(PARAMETERS, TOKENS, HYBRID))}
    assert described["layers.pattern[3]"] == (2, 8, 9, 9) and "layers.scores[0]" not in described
    assert "each its own" in repr(walked)


def test_its_walk_adds_up_and_layer_by_layer_is_the_same():
    walked = compiled(HYBRID)(PARAMETERS, TOKENS)
    steps = jnp.sum(walked.layers.attention_step + walked.layers.feed_forward_step, axis=0)
    assert relative_error(walked.start + steps, walked.end) < 1e-5
    for number, heads in enumerate(walked.layers.head_steps):
        assert relative_error(jnp.sum(heads, axis=2), walked.layers.attention_step[number]) < 1e-5
        alone = layer_walk(PARAMETERS, walked.layers.resid_pre[number], HYBRID, number)
        assert relative_error(alone.resid_post, walked.layers.resid_post[number]) < 1e-6
    for number in (1, 2):
        rest = walk_from(PARAMETERS, walked.layers.resid_pre[number], HYBRID, number)
        assert relative_error(rest.logits, walked.logits) < 1e-5
        end = end_from(PARAMETERS, walked.layers.resid_pre[number], HYBRID, number, at=(-1,))
        assert relative_error(end, walked.end[:, -1:]) < 1e-5


def test_the_identity_edit_changes_nothing_and_layers_are_edited_by_number():
    run = compiled(HYBRID)
    plain = run(PARAMETERS, TOKENS)
    same = run(PARAMETERS, TOKENS, identity_edit(shapes(HYBRID, PARAMETERS, TOKENS)))
    assert relative_error(same.logits, plain.logits) < 1e-5
    # The other edit leaves its layer as it is, so that what follows is of the same program.
    one = compose(ablate(plain, "layers.z", layer=2, head=1), change(plain, "layers.z", layer=0, head=5))
    knocked = run(PARAMETERS, TOKENS, one)
    assert not np.any(knocked.layers.z[2][:, :, 1]) and np.any(knocked.layers.z[2][:, :, 0])
    np.testing.assert_array_equal(knocked.layers.z[1], plain.layers.z[1])
    both = compose(ablate(plain, "layers.z", layer=2, head=1), ablate(plain, "layers.z", layer=0, head=5))
    twice = run(PARAMETERS, TOKENS, both)
    assert not np.any(twice.layers.z[2][:, :, 1]) and not np.any(twice.layers.z[0][:, :, 5])


def test_any_association_can_be_set_and_the_values_are_mixed_under_it():
    plain = compiled(HYBRID)(PARAMETERS, TOKENS)
    uniform = np.tril(np.ones((9, 9))) / np.arange(1, 10)[:, None]

    def edited(layer):
        """One edit of the same leaves, so of one program: that layer's association is set, the others' stay."""
        of = lambda number: change(
            plain, "layers.pattern", layer=number, keep=1.0 * (number != layer), put=put_in(number)
        )
        put_in = lambda number: uniform if number == layer else -0.0 * uniform
        return compiled(HYBRID)(PARAMETERS, TOKENS, functools.reduce(compose, map(of, range(4))))

    for layer in range(4):
        expected = np.einsum("ts,bshc->bthc", uniform, np.asarray(plain.layers.v[layer]))
        found = edited(layer).layers
        np.testing.assert_allclose(found.z[layer], expected, atol=1e-4)
        for before in range(layer):
            assert relative_error(found.z[before], plain.layers.z[before]) < 1e-5


def test_record_keeps_what_is_asked_of_layers_that_differ():
    walked = compiled(HYBRID)(PARAMETERS, TOKENS)
    one = record(walked, "layers.pattern", layer=2, position=-1)
    np.testing.assert_array_equal(one.layers.pattern, walked.layers.pattern[2][:, :, -1])
    some = record(walked, "layers.pattern", layer=[1, 3])
    assert [x.shape for x in some.layers.pattern] == [(2, 2, 9, 9), (2, 8, 9, 9)]
    with pytest.raises(ValueError, match="outside 'layers.pattern', which has 4"):
        record(walked, "layers.pattern", layer=4)


def test_it_decodes_as_it_runs_and_prompts_of_any_lengths():
    whole = compiled(HYBRID)(PARAMETERS, TOKENS)
    cache, found = empty_cache(HYBRID, 2, 9), []
    go_on = jax.jit(lambda part, cache: walk_on(PARAMETERS, part, cache, HYBRID))
    # By fours, and one alone.
    for part in (TOKENS[:, :4], TOKENS[:, 4:5], TOKENS[:, 5:]):
        walked, cache = go_on(part, cache)
        found.append(walked.logits)
    assert relative_error(np.concatenate(found, axis=1), whole.logits) < 1e-4
    prompts = [[3, 1, 4], [1]]
    together = np.asarray(generate(PARAMETERS, prompts, HYBRID, steps=3).tokens)
    # As long as what is compiled already.
    logits_of = lambda tokens: compiled(HYBRID)(PARAMETERS, tokens).logits
    np.testing.assert_array_equal(together, likeliest_after(logits_of, prompts, together, length=9))


def test_a_sweep_over_single_layers_is_one_edited_walk_for_each_place():
    other = random_tokens(HYBRID, seed=1, length=9)
    run = compiled(HYBRID)
    corrupt, clean = run(PARAMETERS, TOKENS), run(PARAMETERS, other)
    metric = lambda logits: jnp.mean(logits[:, -1, 3])
    found = patch(PARAMETERS, corrupt, clean, metric, HYBRID, ("layers.attention_step", ("position",)), at=(-1,))
    for layer, position in ((0, 2), (1, 8), (3, 8)):
        value = clean.layers.attention_step[layer, :, position]
        edit = set_to(corrupt, "layers.attention_step", value, layer=layer, position=position)
        expected = metric(run(PARAMETERS, TOKENS, edit).logits)
        np.testing.assert_allclose(found[layer, position], expected, atol=1e-4)


def test_where_layers_have_other_heads_those_that_are_not_there_are_no_numbers():
    run, other = compiled(PAIR), random_tokens(PAIR, seed=1, length=9)
    corrupt, clean, metric = run(TWO, TOKENS), run(TWO, other), lambda logits: jnp.mean(logits[:, -1, 3])
    heads = patch(TWO, corrupt, clean, metric, PAIR, at=(-1,))
    assert np.isfinite(heads).tolist() == [[True, False], [True, True]]
    for layer, head in ((0, 0), (1, 0), (1, 1)):
        edit = set_to(corrupt, "layers.z", clean.layers.z[layer][:, :, head], layer=layer, head=head)
        np.testing.assert_allclose(heads[layer, head], metric(run(TWO, TOKENS, edit).logits), atol=1e-4)


def test_patching_to_first_order_is_its_slope_times_the_difference():
    run = compiled(PAIR)
    # A clean walk so near that the first order is all that there is.
    near = jax.tree.map(lambda x: x + 1e-3 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), TWO)
    clean, metric = run(near, TOKENS), lambda logits: jnp.mean(logits[:, -1, 3])
    corrupt, places = run(TWO, TOKENS), ("layers.z", ("head",))
    found = attribution_patching(TWO, TOKENS, clean, metric, PAIR, ["layers.z", "layers.pattern"])
    assert [x.shape for x in found["layers.pattern"]] == [x.shape for x in corrupt.layers.pattern]
    change = patch(TWO, corrupt, clean, metric, PAIR, places) - metric(corrupt.logits)
    np.testing.assert_allclose(summed(found["layers.z"], places), change, rtol=0.05, atol=2e-5)


def test_edits_of_leaves_that_differ_are_made_and_joined_as_others_are():
    run, other = compiled(PAIR), random_tokens(PAIR, seed=1, length=9)
    walked, source = run(TWO, TOKENS), run(TWO, other)
    frozen = run(TWO, TOKENS, freeze_association(walked, source))
    means = run(TWO, TOKENS, mean_ablate(walked, "layers.z", source, layer=[1]))
    drawn = run(TWO, TOKENS, resample(walked, "layers.z", source, jax.random.key(0)))
    for number in range(2):
        np.testing.assert_allclose(frozen.layers.pattern[number], source.layers.pattern[number], atol=1e-6)
        # Of two sequences, each is given the other's.
        np.testing.assert_allclose(drawn.layers.z[number], source.layers.z[number][::-1], atol=1e-6)
    expected = jnp.broadcast_to(source.layers.z[1].mean(axis=0), walked.layers.z[1].shape)
    np.testing.assert_allclose(means.layers.z[1], expected, atol=1e-5)
    # With an edit of another leaf, and with a number for all layers.
    steered = steer(walked, jnp.ones(8), layer=1)
    joined = run(TWO, TOKENS, compose(compose(ablate(walked, "layers.z", layer=1, head=1), steered), Edit()))
    assert not np.any(joined.layers.z[1][:, :, 1]) and np.any(joined.layers.z[1])
    two = compose(ablate(walked, "layers.z", layer=0), put(Edit(), "layers.z", Change(keep=0.5, put=1.0)))
    scaled = run(TWO, TOKENS, two).layers.z
    np.testing.assert_allclose(scaled[0], 1.0)
    assert not np.allclose(scaled[1], 1.0)
    alike = put(walked, "layers.z", jnp.stack([walked.layers.z[1]] * 2))
    with pytest.raises(ValueError, match="and those to be edited do not: choose one"):
        mean_ablate(alike, "layers.z", source, layer=[1])
    with pytest.raises(ValueError, match="layer=7 is outside 'layers.z', which has 2 on that axis"):
        mean_ablate(walked, "layers.z", source, layer=7)


def test_what_asks_for_softmax_attention_everywhere_says_so():
    walked = compiled(HYBRID)(PARAMETERS, TOKENS)
    metric = lambda logits: jnp.mean(logits[:, -1, 3])
    with pytest.raises(ValueError, match="the layers differ in 'layers.q'; paths are of softmax attention"):
        edges.to_heads(walked, layer=1)
    with pytest.raises(ValueError, match="paths are of softmax attention in layers that are alike and stacked"):
        path_patching.patch(PARAMETERS, walked, walked, metric, HYBRID, edges.to_end(walked))
    with pytest.raises(ValueError, match="the layers differ in their heads; ask for one at a time"):
        patterns.statistics(walked.layers.pattern, HYBRID)
    part = Node("layers.z", [0, 1], {"layer": 1, "head": 0})
    with pytest.raises(ValueError, match="the layers differ in 'layers.z'; what all layers have alike can be"):
        scrub(PARAMETERS, TOKENS, lambda logits: logits[:, -1, 3], HYBRID, [part], jax.random.key(0))
    alone = patterns.statistics(walked.layers.pattern[1][None], HYBRID)
    assert alone.entropy.shape == (1, 2)


def test_its_associations_are_replaced_head_by_head_and_together():
    intact = association.kept(compiled(HYBRID)(PARAMETERS, TOKENS))
    assert intact.layers.pattern.shape == (4, 2, 16, 9, 9) and intact.layers.scores is None
    assert set(association.REPLACEMENTS) - set(association.possible(intact)) == {"positions only", "contents only"}
    run = compiled(PAIR)
    walked = run(TWO, TOKENS)
    intact, metric = association.kept(walked), metric_of(next_tokens(TOKENS), walked.logits)
    replacement = association.by_lag(intact, intact, PAIR, jax.random.key(0))
    alone = association.by_head(TWO, intact, replacement, metric, PAIR)
    for layer, head in ((0, 0), (1, 1)):
        edit = set_to(walked, "layers.pattern", replacement[layer, :, head], layer=layer, head=head)
        expected = metric(run(TWO, TOKENS, edit).logits)
        np.testing.assert_allclose(alone[layer, head], expected, rtol=1e-4, atol=1e-6)
    orders = association.orders(np.asarray(alone[..., 0]), [0])
    assert all(sorted(order) == [0, 2, 3] for order in orders.values())
    masks = association.every_share({"one": orders["least important first"]}, (2, 2))
    assert masks.sum(axis=(1, 2)).tolist() == [0, 1, 2, 2, 3]
    found = association.with_heads_replaced(TWO, TOKENS, replacement, masks, metric, PAIR)
    np.testing.assert_allclose(found[0], metric(walked.logits), rtol=1e-4, atol=1e-6)
    parts = [set_to(walked, "layers.pattern", replacement[i, :, : i + 1], layer=i) for i in range(2)]
    logits = run(TWO, TOKENS, compose(*parts)).logits
    np.testing.assert_allclose(found[-1], metric(logits), rtol=1e-4)


def test_layers_without_an_association_keep_what_they_have():
    config = dataclasses.replace(
        HYBRID, causal=False, layers=2, position="learned", mixer=(mixers.TokenNetwork(), mixers.Softmax())
    )
    parameters = random_parameters(config)
    walked = compiled(config)(parameters, TOKENS)
    intact = association.kept(walked)
    assert set(association.possible(intact)) == set(association.REPLACEMENTS)
    metric = metric_of(next_tokens(TOKENS), walked.logits)
    replacement = association.contents_only(intact, intact, config, jax.random.key(0))
    alone = association.by_head(parameters, intact, replacement, metric, config)
    assert np.isnan(alone[0]).all() and np.isfinite(alone[1]).all()
    masks = association.every_share(association.orders(np.asarray(alone[..., 0]), []), (2, 2))
    found = association.with_heads_replaced(parameters, TOKENS, replacement, masks, metric, config)
    edit = set_to(walked, "layers.pattern", replacement[1], layer=1)
    np.testing.assert_allclose(found[-1], metric(compiled(config)(parameters, TOKENS, edit).logits), rtol=1e-4)
    with pytest.raises(ValueError, match="no layer of this model mixes by an association"):
        association.kept(shapes(dataclasses.replace(config, mixer=mixers.TokenNetwork())))


def test_it_learns():
    config = dataclasses.replace(HYBRID, layers=2, mixer=HYBRID.mixer[2:], position="learned")
    parameters = jax.jit(lambda key: initialize(config, key))(jax.random.key(0))
    loss = lambda p: -jnp.mean(jax.nn.log_softmax(walk(p, TOKENS, config).logits)[:, :, 3])
    value_and_slope = jax.jit(jax.value_and_grad(loss))
    before, slope = value_and_slope(parameters)
    size = sum(float(np.sum(np.square(g))) for g in jax.tree.leaves(slope))
    after, _ = value_and_slope(jax.tree.map(lambda x, g: np.asarray(x - 0.01 * g), parameters, slope))
    np.testing.assert_allclose(before - after, 0.01 * size, rtol=0.2)


def test_a_hybrid_comes_back_from_json():
    assert from_plain(json.loads(json.dumps(to_plain(HYBRID)))) == HYBRID


@pytest.mark.parametrize("name", EVERY)
def test_a_model_of_every_mixer_comes_back_from_its_folder(name, tmp_path):
    config = model(name, length=6)
    parameters = random_parameters(config)
    native.save(tmp_path, config, parameters)
    found = load(tmp_path)
    assert found.config == config
    jax.tree.map(np.testing.assert_array_equal, found.parameters, parameters)


def test_a_mixer_whose_setting_would_hide_its_name_is_not_written():
    @dataclasses.dataclass(frozen=True)
    class Kinds(mixers.Gru):
        kind: str = "x"

    config = dataclasses.replace(HYBRID, position="learned", mixer=Kinds())
    with pytest.raises(ValueError, match="Kinds has a setting named 'kind', which names the mixer: rename it"):
        to_plain(config)


def test_an_unknown_mixer_in_a_file_is_named():
    for name in ("Telepathy", "mamba", "Mixer"):  # a module is no mixer, nor is what they have in common
        for given in (name, {"kind": name}, ["Gru", name]):
            with pytest.raises(ValueError, match=f"^mixer is '{name}'; choose one of AttentionFree, .*Uniform"):
                from_plain(to_plain(HYBRID) | {"mixer": given})


@pytest.mark.parametrize(
    ("mixer", "told"),
    [
        (3, "mixer is 3; choose one of"),
        ({"name": "Mamba"}, "mixer is {'name': 'Mamba'}, without a kind, such as kind = 'Convolution'"),
        ({"kind": "Convolution", "width": 4}, "mixer Convolution has no 'width'; it has taps"),
        ({"kind": "Gru", "width": 4}, "mixer Gru has no 'width'; it has no settings"),
        ({"kind": "Mamba", "states": "ten"}, "mixer Mamba: states is 'ten'; it must be a whole number"),
        ({"kind": "Softmax", "trained": "no"}, "mixer Softmax: trained is 'no'; it must be true or false"),
    ],
)
def test_settings_of_a_mixer_that_it_does_not_have_are_told(mixer, told):
    with pytest.raises(ValueError, match=f"^{told}"):
        from_plain(to_plain(HYBRID) | {"mixer": mixer})


def test_a_mixer_may_be_given_by_its_name_alone():
    of = lambda given: from_plain({**to_plain(HYBRID), "position": "learned", "layers": 2, "mixer": given}).mixer
    assert of("Mamba") == mixers.Mamba()
    assert of(["Gru", {"kind": "Mamba", "states": 4}]) == (mixers.Gru(), mixers.Mamba(states=4))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer": (mixers.Gru(),)}, "mixer names 1 mixers; this model has 2 layers"),
        ({"mixer": mixers.Gru}, "it must be a mixer such as minitf.mixers.Retention()"),
        ({"mixer": "mamba"}, "mixer is 'mamba'; it must be a mixer"),
        (
            {"mixer": mixers.Fourier()},
            "mixer is Fourier, which lets every position see all others: set causal=False",
        ),
        ({"mixer": mixers.Gru(), "position": "rotary"}, "position is 'rotary', which is a part of softmax"),
        ({"mixer": mixers.Gru(), "attend_self": False}, "leave mixer out"),
        ({"mixer": mixers.Softmax(window=-1)}, "window is -1; it must be at least 1, or 0 to see everything"),
        ({"mixer": mixers.Synthesizer("sparse")}, "variant is 'sparse'; choose trained, fixed, factored or dense"),
        ({"mixer": mixers.Mamba2(expand=1), "heads": 8, "width": 12, "head_width": 2}, "8 heads do not divide"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_a_sentence(fields, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        ModelConfig(**{"vocabulary": 5, "layers": 2, "width": 8, "heads": 2} | fields)


@pytest.mark.parametrize("name", ["uniform", "mamba"])
def test_padding_that_would_be_mixed_in_is_refused(name):
    config = ModelConfig(vocabulary=11, width=8, heads=2, mixer=EVERY[name])
    valid = jnp.ones((2, 5), bool)
    with pytest.raises(ValueError, match="put padding at the end of causal sequences"):
        walk(random_parameters(config), random_tokens(config), config, valid=valid)


@pytest.mark.parametrize("name", EVERY)
def test_every_leaf_of_every_mixer_can_be_edited(name):
    config = ModelConfig(
        vocabulary=11,
        width=8,
        heads=2,
        length=5,
        mixer=EVERY[name],
        causal=name not in ("fourier", "mlp-mixer"),
    )
    parameters, tokens = random_parameters(config), random_tokens(config)
    like = shapes(config)
    present = {leaf for leaf, _ in leaves(like)}
    names = ("v", "z", "head_steps", "attention_step", "pattern", "scores", "q", "k")
    paths = [f"layers.{name}" for name in names]
    found = [path for path in paths if path in present]
    for path in set(paths) - present:
        with pytest.raises(ValueError, match=f"has no '{path}'"):
            change(like, path, keep=0.0)

    def set_all(*those):
        """One edit of the same leaves, so of one program: those become a quarter, the others stay."""
        of = lambda path: change(like, path, keep=0.0 if path in those else 1.0, put=0.25 * (path in those))
        return functools.reduce(compose, map(of, found), Edit())

    every = set_all(*found)
    edited = compiled(config)(parameters, tokens, every)
    for path, _ in leaves(every):
        set_to_it = np.asarray(get(edited, path))
        np.testing.assert_allclose(set_to_it[np.isfinite(set_to_it)], 0.25)
    if "layers.pattern" in present:
        edited = compiled(config)(parameters, tokens, set_all("layers.pattern"))
        expected = 0.25 * np.sum(np.asarray(edited.layers.v), axis=2, keepdims=True)
        expected = np.broadcast_to(expected, edited.layers.z.shape)
        np.testing.assert_allclose(edited.layers.z, expected, atol=1e-4)
