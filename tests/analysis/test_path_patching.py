"""Path patching is one run with changed edges for every sender, and what Wang et al. 2022 find in three passes."""

import functools
from dataclasses import replace

import jax
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

from minitf import Walk, change, compose, walk
from minitf.analysis import path_patching
from minitf.analysis.edges import end_along, join, to_end, to_feed_forwards, to_heads
from minitf.analysis.lens import read
from minitf.analysis.patching import normalized
from minitf.edits import patch as patched
from minitf.walk import LayerWalk

DEEP = replace(GPT2, layers=3)


def lead(logits):
    """The lead of one token over another at the last position, by sequence."""
    return logits[:, -1, 1] - logits[:, -1, 2]


def mean_lead(logits):
    return jnp.mean(lead(logits))


@functools.cache
def setting(config):
    parameters = random_parameters(config)
    run = quick_jit(lambda tokens: walk(parameters, tokens, config))
    return parameters, run(random_tokens(config, 1)), run(random_tokens(config, 0))


def step_differences(parameters, base, source, senders):
    """What every sender's step is in the source, less what it is in the base: ``[layer, *places, ...]``."""
    name, over = senders
    off = lambda leaf: np.asarray(leaf(source) - leaf(base))
    if name == "layers.post":
        hidden, out = off(lambda walk: walk.layers.post), parameters.layers.feed_forward.out
        return np.einsum("lbph,lhw->lhbpw", hidden, out)
    if name == "layers.z":
        steps = np.moveaxis(off(lambda walk: walk.layers.head_steps), 3, 1)
    elif name == "start":
        steps = off(lambda walk: walk.start)[None]
    else:
        steps = off(lambda walk: getattr(walk.layers, name.removeprefix("layers.")))
    if "position" not in over:
        return steps
    by_position = np.zeros((steps.shape[0], 5, *steps.shape[1:]), np.float32)
    for position in range(5):
        by_position[:, position, ..., position, :] = steps[..., position, :]
    return by_position


@pytest.mark.parametrize(
    ("senders", "how"),
    [
        (path_patching.HEADS_BY_POSITION, {"memory": 30_000}),
        (path_patching.NEURONS, {"through_feed_forwards": True, "at": [2, -1]}),
        (path_patching.START_BY_POSITION, {"memory": 1, "through_feed_forwards": True}),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_a_sweep_is_one_run_with_changed_edges_for_every_sender(senders, how):
    parameters, base, source = setting(LLAMA)
    receivers = join(to_heads(base, "qv", layer=1, head=[0, 3]), to_feed_forwards(base, layer=0), to_end(base))
    found = path_patching.patch(parameters, base, source, lead, LLAMA, receivers, senders, **how)
    differences = step_differences(parameters, base, source, senders)
    one = quick_jit(
        lambda difference, layer: lead(
            read(
                parameters,
                end_along(
                    parameters,
                    base,
                    difference,
                    layer,
                    receivers,
                    LLAMA,
                    written_by="attention" if senders[0] == "layers.z" else "feed_forward",
                    through_feed_forwards=how.get("through_feed_forwards", False),
                ),
                LLAMA,
            )
        )
    )
    places = differences.shape[:-3]
    expected = np.zeros((*places, 2))
    for index in np.ndindex(*places):
        layer = -1 if senders[0] == "start" else index[0]
        expected[index] = one(jnp.asarray(differences[index]), layer)
    if senders[0] == "start":
        expected = expected[0]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-2


@pytest.mark.parametrize("through", [False, True], ids=["direct", "through-feed-forwards"])
def test_the_effects_are_those_of_the_three_passes_of_the_paper(through):
    parameters, base, source = setting(DEEP)
    tokens, like = random_tokens(DEEP, 1), shapes(DEEP)
    receivers = join(to_heads(base, "q", layer=2, head=[0, 1]), to_heads(base, "v", layer=2, head=1))
    found = path_patching.patch(parameters, base, source, lead, DEEP, receivers, through_feed_forwards=through)

    # The first pass made base and source. The second: all heads, and all feed-forwards or none, are frozen but for
    # the sender; it says what the receivers make of that. The third: the receivers are set to it.
    @quick_jit
    def second_and_third(layer, head):
        frozen = patched(like, "layers.z", base)
        if not through:
            frozen = compose(frozen, patched(like, "layers.feed_forward_step", base))
        sent = change(like, "layers.z", layer=layer, head=head, keep=0.0, put=source.layers.z[layer, :, :, head])
        second = walk(parameters, tokens, DEEP, edit=compose(frozen, sent))
        queries = patched(like, "layers.q", second, layer=2, head=[0, 1])
        values = patched(like, "layers.v", second, layer=2, key_value_head=1)
        return lead(walk(parameters, tokens, DEEP, edit=compose(queries, values)).logits)

    expected = [[second_and_third(layer, head) for head in range(3)] for layer in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    shares = normalized(found, lead(source.logits), lead(base.logits))
    assert np.abs(shares[:2]).min() > 1e-4


def test_paths_through_feed_forwards_are_the_same_in_float64():
    parameters, base, source = setting(DEEP)
    receivers = to_heads(base, "q", layer=2, head=1)
    patch = lambda p, b, s: path_patching.patch(p, b, s, lead, DEEP, receivers, through_feed_forwards=True)
    single = patch(parameters, base, source)
    with jax.enable_x64(True):
        double = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)
        exact = patch(double(parameters), double(base), double(source))
        assert exact.dtype == jnp.float64
    np.testing.assert_allclose(single, exact, atol=1e-4)


def test_a_sweep_is_one_program_and_later_senders_have_no_effect_at_all():
    parameters, base, source = setting(DEEP)
    seen = []
    progress = lambda layers: (seen.append(i) or i for i in layers)
    kept = Walk(layers=LayerWalk(resid_pre=base.layers.resid_pre, z=base.layers.z), end=base.end)
    before = path_patching._patched._cache_size()

    def sweep(source, layer):
        receivers, sent = to_heads(base, layer=layer), Walk(layers=LayerWalk(z=source.layers.z))
        return path_patching.patch(parameters, kept, sent, mean_lead, DEEP, receivers, progress=progress)

    found, nothing, further = sweep(source, 1), sweep(base, 1), sweep(source, 2)
    assert path_patching._patched._cache_size() == before + 1
    assert seen == [0, 1, 2] * 3
    np.testing.assert_array_equal(found[1:], nothing[1:])
    np.testing.assert_allclose(nothing, np.full((3, 3), mean_lead(base.logits)), atol=1e-5)
    assert np.abs(found[0] - nothing[0]).min() > 1e-3
    assert np.abs(further[:2] - nothing[:2]).min() > 1e-3


@functools.cache
def bad_calls():
    parameters, like = random_parameters(GPT2), shapes(GPT2)
    end = to_end(like)

    def patch(senders=path_patching.HEADS, base=like, source=like, config=GPT2, **how):
        return lambda: path_patching.patch(parameters, base, source, lead, config, end, senders, **how)

    short = shapes(GPT2, tokens=random_tokens(GPT2, length=4))
    return {
        "'layers.pattern' cannot be sent; choose from start, layers.z": patch(("layers.pattern", ())),
        "place by place over 'batch'": patch(("layers.z", ("batch",))),
        "source walk holds no 'layers.z'": patch(source=Walk()),
        "base walk holds no 'start'": patch(path_patching.START, base=like.replace(start=None)),
        r"shape \(2, 2, 4, 3, 4\) in the source walk": patch(source=short),
        r"at=\[5\] leaves the 5 positions": patch(at=[5]),
        "norm_placement='pre'": patch(base=shapes(BERT), config=BERT),
    }


def test_what_cannot_be_patched_is_refused_with_a_sentence():
    for sentence, call in bad_calls().items():
        with pytest.raises(ValueError, match=sentence):
            call()
