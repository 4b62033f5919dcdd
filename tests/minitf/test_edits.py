from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, LLAMA, compiled, random_parameters, random_tokens, shapes

from minitf import change, compose, walk
from minitf.edits import ablate, freeze_association, mean_ablate, patch, resample, scale, set_to, steer
from minitf.model import check_edit
from minitf.walk import Change, Walk, put

PARAMETERS = random_parameters(GPT2)
TOKENS = random_tokens(GPT2)
OTHER = (TOKENS + 1) % GPT2.vocabulary
run = jax.jit(lambda tokens, edit=None: walk(PARAMETERS, tokens, GPT2, edit=edit))


@cache
def plain():
    return run(TOKENS)


@cache
def source():
    return run(OTHER)


def test_an_ablated_head_adds_no_step():
    edited = run(TOKENS, ablate(plain(), "layers.z", layer=1, head=2))
    assert not np.any(edited.layers.head_steps[1, :, :, 2])
    np.testing.assert_array_equal(edited.layers.z[0], plain().layers.z[0])
    np.testing.assert_array_equal(edited.layers.z[1, :, :, :2], plain().layers.z[1, :, :, :2])


def test_a_patch_holds_what_the_other_walk_had_there_and_nowhere_else():
    edited = run(TOKENS, patch(plain(), "layers.z", source(), layer=0, head=[0, 2], position=slice(1, 3)))
    expected = np.array(plain().layers.z)
    for head in (0, 2):
        expected[0, :, 1:3, head] = source().layers.z[0, :, 1:3, head]
    np.testing.assert_array_equal(edited.layers.z[0], expected[0])


def test_patching_a_whole_layers_point_continues_as_the_other_run():
    edited = run(TOKENS, patch(plain(), "layers.resid_post", source(), layer=0))
    np.testing.assert_allclose(edited.logits, source().logits, rtol=1e-5, atol=1e-5)


def test_a_mean_ablated_place_holds_the_mean_of_the_data():
    edited = run(TOKENS, mean_ablate(plain(), "layers.post", source(), layer=1, hidden=[3, 5]))
    for neuron in (3, 5):
        expected = np.broadcast_to(np.mean(source().layers.post[1, :, :, neuron], axis=0), TOKENS.shape)
        np.testing.assert_allclose(edited.layers.post[1, :, :, neuron], expected, rtol=1e-6)
    np.testing.assert_array_equal(edited.layers.post[1, ..., 4], plain().layers.post[1, ..., 4])


def test_a_frozen_association_does_not_look_at_the_data():
    edited = run(TOKENS, freeze_association(plain(), source(), layer=1))
    np.testing.assert_array_equal(edited.layers.pattern[1], source().layers.pattern[1])
    np.testing.assert_array_equal(edited.layers.pattern[0], plain().layers.pattern[0])


def test_an_association_may_be_set_and_a_step_scaled_and_both_at_once():
    length = TOKENS.shape[1]
    uniform = jnp.tri(length) / jnp.arange(1, length + 1)[:, None]
    both = compose(
        set_to(plain(), "layers.pattern", uniform, layer=0, head=1),
        scale(plain(), "layers.feed_forward_step", 0.5, layer=0),
    )
    edited = run(TOKENS, both)
    np.testing.assert_allclose(edited.layers.pattern[0, :, 1], np.broadcast_to(uniform, (2, length, length)))
    move = edited.layers.resid_post[0] - edited.layers.resid_mid[0]
    np.testing.assert_allclose(move, edited.layers.feed_forward_step[0], atol=1e-5)


@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_steered_run_of_any_length_moves_by_the_vector(length):
    vector = jnp.arange(GPT2.width, dtype=jnp.float32)
    edit = steer(shapes(GPT2), vector, layer=1, coefficient=2.0)
    moved = run(TOKENS[:, :length], edit).end - run(TOKENS[:, :length]).end
    np.testing.assert_allclose(moved, np.broadcast_to(2 * vector, moved.shape), atol=1e-4)


def test_the_gradient_by_a_steering_coefficient_is_the_slope():
    vector = jnp.sin(jnp.arange(GPT2.width))

    def logit(coefficient):
        return walk(
            PARAMETERS, TOKENS, GPT2, edit=steer(plain(), vector, layer=0, coefficient=coefficient)
        ).logits[0, -1, 0]

    slope = jax.grad(logit)(0.0)
    assert float(slope) == pytest.approx(float(logit(5e-3) - logit(-5e-3)) / 1e-2, rel=2e-2)


def test_what_cannot_be_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="no leaf 'layers.zz'"):
        ablate(plain(), "layers.zz")
    with pytest.raises(ValueError, match=r"^head=9 is outside 'layers.z'"):
        ablate(plain(), "layers.z", head=9)
    with pytest.raises(ValueError, match="^the walk to read from has no 'layers.gated'$"):
        patch(shapes(LLAMA), "layers.gated", source())
    with pytest.raises(ValueError, match="'position_embedding' has no batch to take a mean over"):
        mean_ablate(plain(), "position_embedding", source())
    with pytest.raises(
        ValueError, match=r"^steering adds to a layer's point or step, such as .* not to 'layers.z'$"
    ):
        steer(plain(), jnp.ones(12), layer=0, name="layers.z")
    with pytest.raises(ValueError, match=r"^the vector has the shape \(3,\); it must be \(12,\)$"):
        steer(plain(), jnp.ones(3), layer=0)
    with pytest.raises(ValueError, match="^layer=2 is outside 'layers.resid_post', which has 2 on that axis$"):
        steer(plain(), jnp.ones(12), layer=2)
    with pytest.raises(ValueError, match="^layer=True is no place; say which by a number, a slice, a list or a"):
        ablate(plain(), "layers.z", layer=True)
    short = compiled(GPT2)(random_parameters(GPT2), random_tokens(GPT2, length=3))
    with pytest.raises(ValueError, match=r"^put has the shape \(2, 2, 3, 3, 4\); the chosen part of"):
        patch(plain(), "layers.z", short)
    with pytest.raises(ValueError, match=r"^keep has the shape \(3,\); the chosen part of"):
        change(plain(), "layers.z", layer=0, keep=np.ones(3))


def test_a_mask_may_be_traced_for_a_sweep_over_subsets_of_heads():
    masks = jnp.array([[False, True, False], [True, False, True], [False, False, False]])
    of = lambda mask: run(TOKENS, ablate(plain(), "layers.z", layer=1, head=mask)).logits
    swept = jax.jit(jax.vmap(of))(masks)
    for mask, found in zip(np.asarray(masks), swept, strict=True):
        np.testing.assert_allclose(found, of(mask), atol=1e-5)
    every = jax.jit(lambda m: scale(plain(), "layers.pattern", 0.5, head=m, query=[0, 2], key=1))(masks[0])
    known = scale(plain(), "layers.pattern", 0.5, head=np.asarray(masks[0]), query=[0, 2], key=1)
    np.testing.assert_array_equal(every.layers.pattern.keep, known.layers.pattern.keep)
    with pytest.raises(ValueError, match=r"^the mask of head has the shape \(2,\); 'layers.z' has 3 on that axis"):
        jax.jit(lambda m: ablate(plain(), "layers.z", head=m))(masks[0, :2])


def test_of_no_place_nothing_changes():
    none = ablate(plain(), "layers.z", head=[])
    np.testing.assert_array_equal(run(TOKENS, none).logits, plain().logits)


@pytest.mark.parametrize("order", [1, -1])
def test_changes_of_fewer_axes_are_composed_layer_by_layer(order):
    """A vector for each layer has the layers' axis first, and then the leaf's last."""
    layers, length = GPT2.layers, GPT2.layers
    vectors = jax.random.normal(jax.random.key(0), (layers, GPT2.width))
    put_change = lambda change: put(Walk(), "layers.attention_step", change)
    short = put_change(Change(keep=jnp.full((layers, 1), 0.5), put=vectors))
    whole = put_change(Change(keep=jnp.full((layers, 1, 1, 1), 0.5), put=vectors[:, None, None]))
    tokens = TOKENS[:, :length]
    scaled = scale(run(tokens), "layers.attention_step", 0.25, layer=0)
    found, expected = (
        run(tokens, compose(*(one, scaled)[::order])).layers.attention_step for one in (short, whole)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_no_edit_is_told_with_what_makes_one():
    for name, no_edit in (("token_embedding", plain()), ("layers.z", put(Walk(), "layers.z", plain().layers.z))):
        with pytest.raises(ValueError, match=rf"^the edit of '{name}' is a \w+, and not a Change: .*minitf.edits"):
            run(TOKENS, no_edit)
    with pytest.raises(ValueError, match=r"^edit is a Change, and not a walk of changes: .*ablate, patch, set_to"):
        getattr(check_edit, "__wrapped__", check_edit)(Change(keep=1.0, put=0.0))


def test_what_is_put_later_stands_whatever_was_put_before():
    """Also where that was infinite, as scores are that cut an edge."""
    cut = set_to(plain(), "layers.scores", -jnp.inf, layer=0, key=0)
    level = set_to(plain(), "layers.scores", 0.0, layer=0)
    scaled = change(plain(), "layers.scores", layer=0, keep=0.5)
    of = lambda edit: walk(random_parameters(GPT2), random_tokens(GPT2), GPT2, edit=edit).logits
    np.testing.assert_array_equal(of(compose(cut, level)), of(level))
    np.testing.assert_allclose(of(compose(level, cut)), of(cut_of_level()), atol=1e-5)
    assert np.isfinite(of(compose(cut, scaled))).all()


def cut_of_level():
    """Both at once: the first key of the first layer's scores is out of sight, the others count the same."""
    put = jnp.where(jnp.arange(5) == 0, -jnp.inf, 0.0)
    return change(plain(), "layers.scores", layer=0, keep=0.0, put=put)


def test_a_resampled_place_holds_what_another_sequence_has_there_each_once():
    tokens = jnp.concatenate([TOKENS, OTHER, (TOKENS + 3) % GPT2.vocabulary])
    data = run(tokens)
    for seed in range(8):
        edit = resample(data, "layers.z", data, jax.random.key(seed), layer=1, head=2)
        found = run(tokens, edit).layers.z
        np.testing.assert_array_equal(found[0], data.layers.z[0])
        np.testing.assert_array_equal(found[1, :, :, :2], data.layers.z[1, :, :, :2])
        given = np.asarray(found[1, :, :, 2])
        mine = np.asarray(data.layers.z[1, :, :, 2])
        from_whom = [[i for i in range(6) if np.array_equal(one, mine[i])] for one in given]
        assert sorted(i for who in from_whom for i in who) == list(range(6))
        assert all(i not in who for i, who in enumerate(from_whom))


def test_what_cannot_be_resampled_is_told():
    one = run(TOKENS[:1])
    with pytest.raises(ValueError, match="^there is 1 sequence; another one is drawn from at least 2$"):
        resample(one, "layers.z", one, jax.random.key(0))
    with pytest.raises(ValueError, match="^'position_embedding' is resampled over its whole batch"):
        resample(plain(), "position_embedding", plain(), jax.random.key(0))
    with pytest.raises(ValueError, match="^'layers.z' is resampled over its whole batch"):
        resample(plain(), "layers.z", plain(), jax.random.key(0), batch=0)
