from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.models import GPT2, random_parameters, random_tokens

from minitf import walk
from minitf.decode import generate
from minitf.record import record
from minitf.walk import leaves

PARAMETERS, TOKENS = random_parameters(GPT2), random_tokens(GPT2)


@cache
def plain():
    return walk(PARAMETERS, TOKENS, GPT2)


def names(kept):
    return [name for name, _ in leaves(kept)]


def test_what_is_named_is_kept_and_nothing_else():
    kept = record(plain(), ["layers.pattern", "logits"])
    assert names(kept) == ["layers.pattern", "logits"]
    np.testing.assert_array_equal(kept.layers.pattern, plain().layers.pattern)


def test_a_predicate_chooses_among_the_leaves_that_are_there():
    assert names(record(plain(), lambda name: name.endswith("_step"))) == [
        "layers.attention_step",
        "layers.feed_forward_step",
    ]
    with pytest.raises(ValueError, match="^no leaf was chosen; this walk has token_embedding, "):
        record(plain(), lambda name: False)


def test_layers_and_positions_are_taken_from_every_leaf_that_has_them():
    kept = record(plain(), ["layers.z", "layers.pattern", "end"], layer=[1], position=slice(1, 3))
    np.testing.assert_array_equal(kept.layers.z, plain().layers.z[1:, :, 1:3])
    np.testing.assert_array_equal(kept.layers.pattern, plain().layers.pattern[1:, :, :, 1:3])
    np.testing.assert_array_equal(kept.end, plain().end[:, 1:3])
    last = record(plain(), "layers.pattern", layer=0, position=-1)
    np.testing.assert_array_equal(last.layers.pattern, plain().layers.pattern[0, :, :, -1])


def test_a_sweeps_own_axes_are_left_as_they_are():
    swept = jax.vmap(lambda t: walk(PARAMETERS, t, GPT2))(jnp.stack([TOKENS, TOKENS]))
    kept = record(swept, "layers.z", layer=1)
    np.testing.assert_array_equal(kept.layers.z, swept.layers.z[:, 1])


def test_only_what_is_kept_is_stored():
    def bytes_of(keep, **places):
        run = (
            jax.jit(lambda tokens: record(walk(PARAMETERS, tokens, GPT2), keep, **places)).lower(TOKENS).compile()
        )
        return run.memory_analysis().output_size_in_bytes

    assert bytes_of("layers.z") == plain().layers.z.nbytes
    assert bytes_of("layers.z", layer=0, position=-1) == plain().layers.z[0, :, -1].nbytes


def test_what_is_recorded_while_decoding_is_a_small_walk():
    keep = lambda w: record(w, "layers.pattern", layer=1)
    found = generate(PARAMETERS, [[1, 2]], GPT2, steps=3, record=keep)
    assert found.records.layers.pattern.shape == (3, 1, GPT2.heads, 1, 5)


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(ValueError, match=r"did you mean 'layers.pattern'\?$"):
        record(plain(), "layers.patern")
    with pytest.raises(ValueError, match=r"did you mean 'layers.pattern'\?$"):
        record(plain(), "pattern")
    with pytest.raises(ValueError, match="^this model's walk has no 'layers.gated', so it cannot be recorded$"):
        record(plain(), "layers.gated")
    with pytest.raises(ValueError, match="^layer=2 is outside 'layers.z', which has 2 on that axis$"):
        record(plain(), "layers.z", layer=2)
