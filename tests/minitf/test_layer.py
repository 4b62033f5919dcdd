"""A layer computes its association in blocks of queries, and nobody can tell."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from properties.models import (
    GPT2,
    LLAMA,
    configs,
    examples,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
)

from minitf import aggregate, attend_in_cache, walk
from minitf.edits import set_to
from minitf.parameters import split_layers
from minitf.walk import get, leaves

UNIT = 2.0**-24


@contextlib.contextmanager
def in_blocks_of_two():
    # Blocks are not among the arguments of what is compiled: no program of before may serve.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attend_in_cache, "BLOCK", 2)
        jax.clear_caches()
        yield
    jax.clear_caches()


@pytest.fixture
def blocks_of_two():
    with in_blocks_of_two():
        yield


def run(config):
    return quick_jit(lambda p, t: walk(p, t, config))


def alike(found, expected):
    for (name, ours), (_, theirs) in zip(leaves(found), leaves(expected), strict=True):
        one, other = np.asarray(ours), np.asarray(theirs)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other), err_msg=name)
        finite = np.isfinite(other)
        assert relative_error(one[finite], other[finite]) < 400 * UNIT, name


@examples(6)
@given(config=configs(causal=True))
def test_blocks_put_together_are_the_whole_association(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    whole = run(config)(parameters, tokens)
    with in_blocks_of_two():
        alike(run(config)(parameters, tokens), whole)


def test_gradients_pass_through_blocks():
    parameters, tokens = random_parameters(LLAMA), random_tokens(LLAMA)
    slope = lambda: quick_jit(jax.grad(lambda p: jnp.sum(walk(p, tokens, LLAMA).logits ** 2)))(parameters)
    whole = slope()
    with in_blocks_of_two():
        blocked = slope()
    for found, expected in zip(jax.tree.leaves(blocked), jax.tree.leaves(whole), strict=True):
        assert relative_error(found, expected) < 2000 * UNIT


@pytest.mark.usefixtures("blocks_of_two")
def test_an_edited_association_may_look_ahead_also_where_blocks_would_not():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    plain = walk(parameters, tokens, GPT2)
    length = tokens.shape[1]
    edit = set_to(plain, "layers.pattern", jnp.full((length, length), 1 / length), layer=0, head=1)
    edited = walk(parameters, tokens, GPT2, edit=edit)
    expected = jnp.mean(plain.layers.v[0, :, :, 1], axis=1, keepdims=True)
    np.testing.assert_allclose(edited.layers.z[0, :, :, 1], jnp.broadcast_to(expected, (2, length, 4)), atol=1e-6)


@pytest.mark.usefixtures("blocks_of_two")
def test_a_pattern_in_blocks_forbids_the_future():
    found = run(GPT2)(random_parameters(GPT2), random_tokens(GPT2)).layers
    ahead = np.triu(np.ones(found.pattern.shape[-2:], bool), 1)
    assert (np.asarray(found.pattern)[..., ahead] == 0).all()
    assert np.isneginf(np.asarray(found.scores)[..., ahead]).all()
    np.testing.assert_allclose(np.asarray(found.pattern).sum(-1), 1, atol=1e-6)


@examples(5)
@given(config=configs())
def test_layers_one_by_one_are_layers_scanned(config):
    parameters, tokens = random_parameters(config), random_tokens(config)
    alike(run(config)(split_layers(parameters), tokens), run(config)(parameters, tokens))


def test_an_edit_reaches_its_layer_also_where_they_run_one_by_one():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    plain = walk(parameters, tokens, GPT2)
    edit = set_to(plain, "layers.z", 0.5, layer=1, head=2)
    alike(walk(split_layers(parameters), tokens, GPT2, edit=edit), walk(parameters, tokens, GPT2, edit=edit))
    edited = walk(split_layers(parameters), tokens, GPT2, edit=edit)
    assert (get(edited, "layers.z")[1, :, :, 2] == 0.5).all()
    np.testing.assert_allclose(get(edited, "layers.z")[0], plain.layers.z[0], atol=1e-6)


def test_a_walk_without_associations_is_the_walk_otherwise():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    whole = run(GPT2)(parameters, tokens)
    found = quick_jit(lambda p, t: walk(p, t, GPT2, association=False))(parameters, tokens)
    assert found.layers.scores is None and found.layers.pattern is None
    assert len(list(leaves(found))) == len(list(leaves(whole))) - 2
    alike(found, whole.replace(layers=whole.layers.replace(scores=None, pattern=None)))
    edit = set_to(whole, "layers.pattern", 0.0, layer=0)
    with pytest.raises(ValueError, match=r"^this model's walk has no 'layers.pattern', so an edit of it would do"):
        walk(parameters, tokens, GPT2, edit=edit, association=False)


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_kernel_is_asked_for_what_the_association_computes(monkeypatch, causal):
    """The kernel is a GPU's: here its interface runs on JAX's own implementation of it."""
    config = replace(LLAMA, causal=causal, head_width=8)
    parameters = random_parameters(config, dtype=jnp.bfloat16)
    tokens = random_tokens(config)
    expected = walk(parameters, tokens, config).logits
    jax.clear_caches()  # of programs that were compiled where there is no kernel
    asked = []

    def kernel(*inputs):
        asked.append(inputs)
        return attend(*inputs, implementation="xla")

    attend = aggregate.attend
    monkeypatch.setattr(aggregate, "attend", kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = walk(parameters, tokens, config, association=False).logits
    assert asked
    # bfloat16 keeps 8 bits, and the two round in other places.
    assert relative_error(found.astype(jnp.float32), expected.astype(jnp.float32)) < 8 * 2.0**-8
    asked.clear()
    # What is asked for is known before anything is compiled.
    would = lambda parameters, **fields: jax.eval_shape(lambda: walk(parameters, tokens, config, **fields))
    would(parameters)
    would(parameters, association=False, valid=jnp.ones(tokens.shape, bool))
    would(random_parameters(config), association=False)
    assert not asked
