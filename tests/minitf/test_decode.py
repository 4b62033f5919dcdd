import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import BERT, GPT2, LLAMA, NEOX, configs, examples, likeliest_after, random_parameters

from minitf import ModelConfig, change, compose, walk
from minitf.changes import identity_edit
from minitf.decode import Sampling, _check, _padded, empty_cache, generate, likely, sample, stream
from minitf.edits import ablate, patch
from minitf.model import walk_on

ALIBI = dataclasses.replace(GPT2, position="alibi")
TABLES = ModelConfig(
    vocabulary=7,
    width=7,
    embedding="one_hot",
    attention="table",
    attend_self=False,
    position="none",
    norm="l2",
    norm_placement="post",
    length=8,
    feed_forward="none",
)
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5]]


@examples(6)
@given(configs(causal=True, length=8))
def test_cached_decoding_gives_the_full_passs_logits_at_every_position(config):
    parameters = random_parameters(config)
    tokens = np.random.default_rng(1).integers(config.vocabulary, size=(2, 7))
    whole = jax.device_get(walk(parameters, jnp.asarray(tokens), config))
    cache = empty_cache(config, 2, 8)
    found = []
    for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
        walked, cache = walk_on(parameters, jnp.asarray(part), cache, config)
        found.append(walked.logits)
    cache = jax.device_get(cache)
    # Sums over eight slots of which some are forbidden: float32 rounding of another order of adding.
    scale = float(np.max(np.abs(whole.logits)))
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole.logits, atol=2e-5 * max(1.0, scale))
    assert cache.filled.tolist() == [7, 7]
    np.testing.assert_allclose(cache.states[0][:, :, :7], whole.layers.k, atol=1e-5 * max(1.0, scale))


def test_keys_and_values_in_the_cache_can_be_edited_as_they_are_seen_and_stay_as_they_are():
    parameters, tokens = random_parameters(LLAMA), jnp.array([[3, 1, 4, 1, 5, 2]])
    begun = walk_on(parameters, tokens[:, :4], empty_cache(LLAMA, 1, 8), LLAMA)[1]
    seen, after = walk_on(parameters, tokens[:, 4:5], begun, LLAMA)
    neutral = identity_edit(seen)
    patches = patch(seen, "layers.k", seen), patch(seen, "layers.v", seen, layer=0)
    # Of all leaves each, so of one program.
    for edit in (neutral, *(compose(neutral, one) for one in patches)):
        same, _ = walk_on(parameters, tokens[:, 4:5], begun, LLAMA, edit=edit)
        np.testing.assert_array_equal(same.logits, seen.logits)
    # A value that was kept earlier is not seen now, and is there again.
    without = ablate(seen, "layers.v", position=2)
    walked, then = walk_on(parameters, tokens[:, 4:5], begun, LLAMA, edit=without)
    assert not np.any(walked.layers.v[:, :, 2]) and np.any(walked.layers.v[:, :, 4])
    v = jnp.repeat(walked.layers.v, LLAMA.heads // LLAMA.groups, axis=3)
    mixed = jnp.einsum("lbhqk,lbkhw->lbqhw", walked.layers.pattern, v)
    np.testing.assert_allclose(walked.layers.z, mixed, atol=1e-5)
    np.testing.assert_array_equal(then.states[1][0], after.states[1][0])
    # At every step, it is the edit of the whole.
    whole = walk(parameters, tokens, LLAMA, edit=ablate(walk(parameters, tokens, LLAMA), "layers.v", position=2))
    cache, logits = empty_cache(LLAMA, 1, 8), []
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        walked, cache = walk_on(parameters, part, cache, LLAMA, edit=without)
        logits.append(walked.logits)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), whole.logits, atol=1e-4)


@pytest.mark.parametrize(
    "config", [GPT2, LLAMA, NEOX, ALIBI, TABLES], ids=["gpt2", "llama", "neox", "alibi", "tables"]
)
def test_prompts_of_different_lengths_continue_as_each_would_alone(config):
    parameters = random_parameters(config)
    prompts = [[t % config.vocabulary for t in p] for p in PROMPTS]
    found = generate(parameters, prompts, config, steps=3)
    assert found.tokens.shape == (3, 3) and found.lengths.tolist() == [3, 3, 3]
    logits_of = lambda tokens: walk(parameters, jnp.asarray(tokens), config).logits
    np.testing.assert_array_equal(found.tokens, likeliest_after(logits_of, prompts, found.tokens.tolist()))


def test_streamed_tokens_are_the_generated_ones_and_end_with_the_stop_token():
    parameters = random_parameters(GPT2)
    sampling, key = Sampling(temperature=1.5), jax.random.key(4)
    free = generate(parameters, PROMPTS[:2], GPT2, steps=5, sampling=sampling, key=key).tokens
    stop = [int(free[0, 2])]
    found = generate(parameters, PROMPTS[:2], GPT2, steps=5, sampling=sampling, key=key, stop=stop)
    streamed = list(stream(parameters, PROMPTS[:2], GPT2, steps=5, sampling=sampling, key=key, stop=stop))
    for i in range(2):
        expected = free[i].tolist()
        length = expected.index(stop[0]) + 1 if stop[0] in expected else 5
        assert int(found.lengths[i]) == length
        assert found.tokens[i, :length].tolist() == expected[:length]
        assert [int(tokens[i]) for tokens in streamed if tokens[i] >= 0] == expected[:length]


def test_a_key_decides_the_tokens():
    parameters = random_parameters(GPT2)
    # As many as are streamed in another test, so of one program.
    sampling = Sampling(temperature=1.5)
    draw = lambda seed: (
        generate(parameters, PROMPTS[:2], GPT2, steps=5, sampling=sampling, key=jax.random.key(seed)).tokens
    )
    assert np.array_equal(draw(0), draw(0)) and not np.array_equal(draw(0), draw(1))


def test_an_edit_steers_every_step_and_what_it_did_is_recorded():
    parameters = random_parameters(GPT2)
    like = jax.eval_shape(lambda t: walk(parameters, t, GPT2), jax.ShapeDtypeStruct((1, 1), jnp.int32))
    wanted = 11
    edit = change(like, "logits", keep=1.0, put=100.0, vocabulary=wanted)
    found = generate(parameters, PROMPTS, GPT2, steps=3, edit=edit, record=lambda w: w.layers.attention_step)
    assert np.all(found.tokens == wanted)
    assert found.records.shape == (3, GPT2.layers, 3, 1, GPT2.width)


LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1]]))


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(1.0), [0, 1, 2, 3]),
        (Sampling(1.0, top_k=2), [0, 1]),
        (Sampling(1.0, top_k=9), [0, 1, 2, 3]),
        (Sampling(1.0, top_p=0.5), [0]),
        (Sampling(1.0, top_p=0.6), [0, 1]),
        (Sampling(1.0, min_p=0.3), [0, 1, 2]),
        (Sampling(1.0, min_p=0.4), [0, 1]),
        (Sampling(1.0, top_k=3, min_p=0.4), [0, 1]),
    ],
)
def test_only_likely_tokens_may_be_chosen(sampling, allowed):
    shuffled = np.array([2, 0, 3, 1])
    found = likely(LOGITS[:, shuffled], sampling)[0]
    assert sorted(shuffled[np.isfinite(found)].tolist()) == allowed


def test_of_equally_likely_tokens_no_more_than_k_may_be_chosen():
    found = likely(jnp.array([[0.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]), Sampling(1.0, top_k=2))
    assert np.isfinite(found).tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("temperature", [1e-8, 1e-20, 1e-38, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_greedy(temperature):
    logits = jnp.array([[1.0, 2.0, 5.0, 4.999], [-3.0, -1.0, -1.001, -9.0]])
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=3, top_p=0.9, min_p=0.1)):
        assert sample(logits, jax.random.key(0), sampling).tolist() == [2, 1]


def test_numbers_that_are_not_whole_are_told():
    untyped = lambda function: getattr(function, "__wrapped__", function)
    with pytest.raises(ValueError, match="^top_k is 1.5; it must be a whole number of at least 0"):
        untyped(Sampling.__post_init__)(SimpleNamespace(temperature=1.0, top_k=1.5))
    with pytest.raises(ValueError, match="^steps is 2.0; it must be a whole number"):
        untyped(_padded)([[1]], GPT2, 2.0)
    with pytest.raises(ValueError, match="^prompt 0 holds the token 1.5; the vocabulary is 0 to"):
        untyped(_padded)([[1.5]], GPT2, 2)
    with pytest.raises(ValueError, match="^prompt 0 holds the token 'a'; the vocabulary is 0 to"):
        untyped(_padded)(["ab"], GPT2, 2)
    with pytest.raises(ValueError, match=r"^prompt 0 is 3; each is a list of tokens, .* \[\[3, 1, 4\]\]"):
        untyped(_padded)([3, 1, 4], GPT2, 2)
    with pytest.raises(ValueError, match="^top_k is inf"):
        untyped(Sampling.__post_init__)(SimpleNamespace(temperature=1.0, top_k=float("inf")))
    with pytest.raises(ValueError, match=r"^stop is 3; it is a list of tokens, a single one too: \[3\]"):
        untyped(_check)(3, jax.random.key(0), GPT2)
    with pytest.raises(ValueError, match="^stop holds the token 99; the vocabulary is 0 to"):
        generate(random_parameters(GPT2), [[1]], GPT2, steps=1, stop=[99])
    with pytest.raises(ValueError, match=r"^key is a int; make one from a number: jax.random.key\(0\)"):
        untyped(_check)((), 0, GPT2)


def test_a_temperature_sharpens_the_choice_and_zero_is_greedy():
    keys = jax.random.split(jax.random.key(0), 4000)
    for temperature in (0.5, 1.0, 2.0):
        drawn = jax.vmap(lambda k, t=temperature: sample(LOGITS, k, Sampling(t))[0])(keys)
        exact = jax.nn.softmax(LOGITS[0] / temperature)
        share = np.bincount(drawn, minlength=4) / len(keys)
        np.testing.assert_allclose(share, exact, atol=4 * 0.5 / len(keys) ** 0.5)
    assert sample(LOGITS, keys[0], Sampling()).tolist() == [0]


@given(
    st.sampled_from(
        [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"min_p": 2.0}]
    )
)
def test_a_limit_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} is "):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("prompts", "steps", "message"),
    [
        ([], 1, "there is no prompt"),
        ([[1], []], 1, "prompt 1 is empty; it must hold at least one token"),
        ([[1, 13]], 1, "prompt 0 holds the token 13; the vocabulary is 0 to 12"),
        ([[1, 2, 3]], 6, "a prompt of 3 tokens and 6 steps are more than the model's length of 8"),
        ([[1]], 0, "steps is 0; at least one token must be generated"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_in_a_sentence(prompts, steps, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(random_parameters(GPT2), prompts, GPT2, steps=steps)


def test_a_model_that_looks_ahead_cannot_decode():
    with pytest.raises(ValueError, match="not causal"):
        generate(random_parameters(BERT), [[1]], BERT, steps=1)


def test_decoding_in_half_precision_stays_in_it():
    parameters = random_parameters(GPT2, dtype=jnp.bfloat16)
    found = generate(parameters, PROMPTS, GPT2, steps=2, record=lambda w: w.layers.k)
    assert found.records.dtype == jnp.bfloat16 and found.tokens.shape == (3, 2)
