import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, LLAMA, bits, random_parameters, random_tokens, shapes

from minitf import Change, Edit, LayerWalk, Walk, change, compose, describe, identity_edit, walk
from minitf.changes import apply
from minitf.walk import get, leaf_axes, leaves, put

LIKE = shapes(GPT2)


def test_leaves_come_in_the_order_of_the_forward_pass():
    names = list(leaf_axes())
    assert names[:3] == ["token_embedding", "position_embedding", "start"]
    assert names[-4:] == ["end", "final_norm_scale", "context", "logits"]
    assert names.index("layers.scores") < names.index("layers.pattern") < names.index("layers.z")
    assert [name for name, _ in leaves(LIKE)] == [name for name in names if get(LIKE, name) is not None]


def test_a_walk_holds_what_its_model_has_and_no_more():
    absent = lambda like: {name for name in leaf_axes() if get(like, name) is None}
    assert absent(LIKE) == {"layers.gated"}
    assert absent(shapes(LLAMA)) == {"position_embedding"}


def test_a_misspelt_leaf_is_an_error_that_lists_the_leaves():
    for ask in (lambda: get(LIKE, "layers.patern"), lambda: put(Edit(), "patern", None)):
        with pytest.raises(ValueError, match=r"^a walk has no leaf '(layers\.)?patern'; it has token_embedding, "):
            ask()
    with pytest.raises(ValueError, match="no leaf 'layers.patern'"):
        change(LIKE, "layers.patern", keep=0.0)
    with pytest.raises(TypeError, match="patern"):
        LayerWalk(patern=0)


def test_a_misspelt_leaf_is_an_error_at_trace_time():
    def forward(parameters, tokens):
        return walk(parameters, tokens, GPT2, edit=change(LIKE, "layers.zz", keep=0.0))

    with pytest.raises(ValueError, match="no leaf 'layers.zz'"):
        jax.eval_shape(forward, random_parameters(GPT2), random_tokens(GPT2))


def test_a_leaf_that_this_model_lacks_cannot_be_edited():
    with pytest.raises(ValueError, match="^this model's walk has no 'layers.gated', so it cannot be edited$"):
        change(LIKE, "layers.gated", keep=0.0)
    edit = change(shapes(LLAMA), "layers.gated", keep=0.0)
    with pytest.raises(
        ValueError, match="^this model's walk has no 'layers.gated', so an edit of it would do nothi"
    ):
        walk(random_parameters(GPT2), random_tokens(GPT2), GPT2, edit=edit)


def test_an_axis_that_a_leaf_lacks_is_an_error_that_lists_its_axes():
    match = "^'layers.pattern' has no axis 'position'; its axes are layer, batch, head, query, key$"
    with pytest.raises(ValueError, match=match):
        change(LIKE, "layers.pattern", position=0)


@pytest.mark.parametrize("chosen", [3, -4, [0, 3], np.int64(3), [True, False], jnp.array([7])])
def test_an_index_outside_the_leaf_is_an_error(chosen):
    with pytest.raises(ValueError, match="is outside 'layers.z', which has 3 on that axis$"):
        change(LIKE, "layers.z", head=chosen)


def placed(**index):
    """Where an edit of ``layers.z`` [layer 2, batch 2, position 5, head 3, head_width 4] acts."""
    keep = change(LIKE, "layers.z", keep=0.0, **index).layers.z.keep
    return np.broadcast_to(np.asarray(keep) == 0, (2, 2, 5, 3, 4))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({}, np.s_[:]),
        ({"layer": 1}, np.s_[1]),
        ({"layer": -1, "head": 2}, np.s_[1, :, :, 2]),
        ({"head": [0, 2]}, np.s_[:, :, :, [0, 2]]),
        ({"position": slice(1, 3)}, np.s_[:, :, 1:3]),
        ({"head": [True, False, True]}, np.s_[:, :, :, [0, 2]]),
        ({"layer": 0, "position": np.array([1, 4]), "head": 1}, np.s_[0, :, [1, 4], 1]),
    ],
)
def test_an_edit_acts_at_the_named_places_alone(index, expected):
    where = np.zeros((2, 2, 5, 3, 4), bool)
    where[expected] = True
    np.testing.assert_array_equal(placed(**index), where)


def test_several_lists_choose_every_combination():
    where = np.zeros((2, 2, 5, 3, 4), bool)
    for position in (1, 4):
        for head in (0, 2):
            where[:, :, position, head] = True
    np.testing.assert_array_equal(placed(position=[1, 4], head=[0, 2]), where)


def test_an_array_is_put_where_the_index_says():
    uniform = jnp.full((5, 5), 0.2)
    edit = change(LIKE, "layers.pattern", layer=1, head=[0, 2], keep=0.0, put=uniform).layers.pattern
    assert edit.keep.shape == edit.put.shape == (2, 2, 3, 5, 5)
    np.testing.assert_array_equal(edit.put[1, :, [0, 2]], np.full((2, 2, 5, 5), np.float32(0.2)))
    assert not np.asarray(edit.put[0]).any()
    assert not np.asarray(edit.put[1, :, 1]).any()
    np.testing.assert_array_equal(edit.keep[1, :, 1], 1.0)


def test_each_head_can_get_its_own_number():
    numbers = jnp.array([1.0, 2.0])[:, None]
    edit = change(LIKE, "layers.z", layer=0, position=3, head=[0, 2], put=numbers).layers.z
    np.testing.assert_array_equal(edit.put[0, :, 3, 0], 1.0)
    np.testing.assert_array_equal(edit.put[0, :, 3, 2], 2.0)
    assert np.count_nonzero(edit.put) == 2 * 2 * 4


def test_scalars_make_small_edits():
    assert change(LIKE, "layers.z", head=1, keep=0.0).layers.z.keep.shape == (2, 1, 1, 3, 1)
    assert change(LIKE, "logits", keep=0.0).logits.keep.shape == (1, 1, 1)


def test_a_change_keeps_and_puts():
    x = jnp.array([1.0, -0.0, 3.0])
    assert bits(apply(None, x)) == bits(x)
    np.testing.assert_array_equal(apply(Change(jnp.array(2.0), jnp.array([0.0, 1.0, 2.0])), x), [2.0, 1.0, 8.0])
    with pytest.raises(ValueError, match=r"^a change of shape \(2, 3\) does not fit a leaf of shape \(3,\)$"):
        apply(Change(jnp.ones((2, 3)), jnp.zeros(())), x)
    with pytest.raises(ValueError, match=r"^a change of shape \(4,\) does not fit a leaf of shape \(3,\)$"):
        apply(Change(jnp.ones(()), jnp.zeros(4)), x)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-37, -3.5, np.inf, -np.inf, 3.4e38])
def test_the_identity_change_keeps_every_float_bit_for_bit(value):
    # Every float but the subnormal ones: XLA takes those for zero in any sum or product.
    x = jnp.full((3,), value, jnp.float32)
    identity = identity_edit(Walk(logits=x)).logits
    assert bits(apply(identity, x)) == bits(x)
    assert bits(jax.jit(apply)(identity, x)) == bits(x)


def test_composing_does_the_first_then_the_second():
    double = Edit(start=Change(jnp.float32(2), jnp.float32(0)))
    shift = Edit(start=Change(jnp.float32(1), jnp.float32(3)))
    x = jnp.array([5.0])
    assert float(apply(compose(double, shift).start, x)[0]) == 13.0
    assert float(apply(compose(shift, double).start, x)[0]) == 16.0
    other = Edit(logits=Change(jnp.float32(0), jnp.float32(7)))
    both = compose(double, other)
    assert (both.start, both.logits, both.end) == (double.start, other.logits, None)


def test_a_walk_is_described_before_anything_runs():
    def forward(parameters, tokens):
        assert isinstance(tokens, jax.core.Tracer)
        return walk(parameters, tokens, GPT2)

    shaped = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (random_parameters(GPT2), random_tokens(GPT2))
    )
    described = {d.name: d for d in describe(forward, *shaped)}
    pattern = described["layers.pattern"]
    assert pattern.axes == ("layer", "batch", "head", "query", "key")
    assert (pattern.shape, pattern.dtype, pattern.bytes) == ((2, 2, 3, 5, 5), "float32", 2 * 2 * 3 * 5 * 5 * 4)
    assert "layers.gated" not in described


def test_a_walk_too_large_for_any_memory_can_be_described():
    from dataclasses import replace

    from minitf import initialize

    config = replace(GPT2, width=12288, heads=96, layers=96, length=2**20)
    tokens = jax.ShapeDtypeStruct((64, 2**20), jnp.int32)
    weights = jax.eval_shape(lambda key: initialize(config, key), jax.random.key(0))
    described = describe(lambda p, t: walk(p, t, config), weights, tokens)
    assert max(d.bytes for d in described) > 2**50


def test_a_walk_prints_as_its_leaves_with_axes_and_sizes():
    lines = repr(LIKE).splitlines()
    assert len(lines) == 1 + len(list(leaves(LIKE)))
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert by_name["layers.pattern"].endswith("layer 2, batch 2, head 3, query 5, key 5: float32")
    assert "<td><code>logits</code></td><td>batch 2, position 5, vocabulary 13: float32</td>" in LIKE._repr_html_()
    assert "keep (), put ()" in repr(put(Edit(), "start", Change(1.0, -0.0)))
    swept = jax.vmap(lambda t: walk(random_parameters(GPT2), t, GPT2))(jnp.zeros((4, 2, 5), int))
    assert "logits                          4, batch 2, position 5, vocabulary 13: float32" in repr(swept)
