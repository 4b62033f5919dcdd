"""The tuned lens: untrained it is the logit lens; its slope is torch's, the best is found where it is known."""

import functools
import math
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.models import (
    BERT,
    GPT2,
    LLAMA,
    bits,
    compiled,
    examples,
    in_float64,
    quick_jit,
    random_parameters,
    random_tokens,
    relative_error,
)
from safetensors.numpy import save_file

from minitf import LayerWalk, ModelConfig, Walk, pretrained, walk
from minitf.analysis import stream
from minitf.analysis import tuned_lens as module
from minitf.analysis.lens import lens, logit_lens, station_names, stations
from minitf.analysis.tuned_lens import initialize, load, save, train, translate, tuned_lens

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
norms = pytest.mark.parametrize("config", [GPT2, BERT], ids=["pre-norm", "post-norm"])


def random_lens(config, seed=0, dtype=np.float32):
    generator, shapes = np.random.default_rng(seed), initialize(config)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * generator.normal(size=x.shape), dtype), shapes)


def random_walk(layers, batch, length, width, seed=0, dtype=np.float32):
    """Stations of no model in particular."""
    generator = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(generator.normal(size=(layers, batch, length, width)), dtype)
    return Walk(layers=LayerWalk(resid_pre=draw(), resid_mid=draw(), resid_post=draw()))


sizes = st.integers(1, 4)


@examples(4)
@given(layers=sizes, batch=sizes, length=sizes, width=sizes, half=st.booleans())
def test_untrained_it_leaves_all_stations_as_they_are_to_the_bit(layers, batch, length, width, half):
    walked = random_walk(layers, batch, length, width, dtype=jnp.bfloat16 if half else jnp.float32)
    config = ModelConfig(vocabulary=2, layers=layers, width=width)
    assert bits(stations(translate(initialize(config), walked))) == bits(stations(walked))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_untrained_it_reads_as_the_logit_lens(dtype):
    parameters, tokens = random_parameters(GPT2, dtype=dtype), random_tokens(GPT2)

    @quick_jit
    def both(parameters, tuned, tokens):
        walked = walk(parameters, tokens, GPT2)
        return lens(parameters, walked, tokens, GPT2), tuned_lens(parameters, tuned, walked, tokens, GPT2)

    plain, tuned = both(parameters, initialize(GPT2), tokens)
    assert bits(tuned) == bits(plain)
    assert bits(both(parameters, random_lens(GPT2), tokens)[1]) != bits(plain)


def test_it_adds_an_affine_map_of_the_stream_and_every_lens_reads_what_it_translates():
    config = GPT2
    walked, tuned = random_walk(config.layers, 2, 5, config.width), random_lens(config)
    expected = [
        [[h + h @ a + b for h in np.float64(sequence)] for sequence in point]
        for point, a, b in zip(stations(walked), np.float64(tuned.weight), np.float64(tuned.bias), strict=True)
    ]
    translated = translate(tuned, walked)
    # Some width roundings of a sum of width products.
    assert relative_error(stations(translated), expected) < 2 * config.width * 2.0**-24
    # As in any walk, a layer starts where the one before it ended.
    assert bits(translated.layers.resid_pre[1:]) == bits(translated.layers.resid_post[:-1])
    assert logit_lens(random_parameters(config), translated, config).shape == (5, 2, 5, config.vocabulary)


def torch_slopes(parameters, tuned, walked, config):
    """The mean divergence of every station and its slopes, by torch, all stations in one graph."""
    torch = pytest.importorskip("torch", reason="the peers are not installed: pip install 'minitf[peers]'")
    tensor = lambda x: None if x is None else torch.tensor(np.asarray(x, np.float64))
    weight, bias = (tensor(x).requires_grad_() for x in (tuned.weight, tuned.bias))
    points, final = tensor(stations(walked)), torch.log_softmax(tensor(walked.logits), dim=-1)
    stream = points + torch.einsum("sbpi,sij->sbpj", points, weight) + bias[:, None, None]
    if config.pre_norm:
        gain, offset = tensor(parameters.final_norm.gain), tensor(parameters.final_norm.offset)
        stream = torch.nn.functional.layer_norm(stream, [config.width], gain, offset, config.norm_epsilon)
    table = tensor(parameters.embedding.T if config.tied else parameters.unembedding)
    says = torch.log_softmax(stream @ table, dim=-1)
    apart = torch.nn.functional.kl_div(says, final.expand_as(says), log_target=True, reduction="none")
    loss = apart.sum(-1).mean((1, 2))
    loss.sum().backward()
    return loss.detach().numpy(), weight.grad.numpy(), bias.grad.numpy()


@norms
def test_a_step_of_training_goes_down_torchs_slope(config):
    with jax.enable_x64(True):
        parameters, tokens = in_float64(random_parameters(config)), random_tokens(config)
        walked, start = compiled(config)(parameters, tokens), random_lens(config, dtype=np.float64)
        # No translator at the end: nothing is to be found there, and nothing moves.
        start = jax.tree.map(lambda x: x.at[-1].set(0), start)
        loss, weight, bias = torch_slopes(parameters, start, walked, config)
        done = train(parameters, tokens[None], config, optimizer=optax.sgd(0.25), start=start, steps_per_program=1)
    np.testing.assert_allclose(done.loss[0], loss, rtol=0, atol=1e-12)
    assert abs(loss[-1]) < 1e-12 and (loss[:-1] > 0.1).all()
    for name, slope in (("weight", weight), ("bias", bias)):
        moved = np.asarray(getattr(start, name)) - np.asarray(getattr(done.lens, name))
        assert relative_error(moved[:-1], 0.25 * slope[:-1]) < 1e-11
        assert not moved[-1].any()


@functools.lru_cache
def compiled_lens(config):
    @quick_jit
    def reading_and_logits(parameters, tuned, tokens):
        walked = walk(parameters, tokens, config)
        return tuned_lens(parameters, tuned, walked, tokens, config), walked.logits

    return reading_and_logits


def mean_divergences(parameters, tuned, tokens, config):
    return np.asarray(compiled_lens(config)(parameters, tuned, tokens)[0].divergence).mean((1, 2))


def seen_tokens(config):
    return random_tokens(config, seed=1, batch=40 * 16).reshape(40, 16, -1)


@norms
def test_training_brings_every_station_but_the_last_nearer_to_the_end_on_tokens_never_seen(config):
    parameters = random_parameters(config)
    tokens = seen_tokens(config)
    unseen = random_tokens(config, seed=2, batch=64)
    done = train(parameters, tokens, config)
    assert done.finished and done.loss.shape == (40, 5)
    before, after = (mean_divergences(parameters, t, unseen, config) for t in (initialize(config), done.lens))
    assert (after[:-1] < 0.7 * before[:-1]).all()
    # A divergence of equal distributions is a sum of a vocabulary of roundings of their logarithms.
    assert max(abs(before[-1]), abs(after[-1]), np.abs(done.loss[:, -1]).max()) < 13 * 10 * 2.0**-24
    assert not np.asarray(done.lens.weight[-1]).any() and not np.asarray(done.lens.bias[-1]).any()


def test_where_every_layer_turns_the_stream_it_finds_the_turns_that_are_left():
    # A single position attends to itself, so a layer adds h W_V W_O = h (R - 1): it turns h by R.
    width, layers, vocabulary = 4, 3, 13
    config = ModelConfig(
        vocabulary, layers, width, length=1, position="none", norm="none", feed_forward="none", head_width=width
    )
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(width, width)))[0]
    drawn = random_parameters(config)
    value = jnp.asarray(turn - np.eye(width), jnp.float32).reshape(width, 1, width)
    output = jnp.eye(width).reshape(1, width, width)
    attention = drawn.layers.attention.replace(
        value=jnp.stack([value] * layers), output=jnp.stack([output] * layers)
    )
    parameters = drawn.replace(layers=drawn.layers.replace(attention=attention))
    tokens, adam = np.broadcast_to(np.arange(vocabulary)[:, None], (800, vocabulary, 1)), optax.adam(0.03)
    done = train(parameters, tokens, config, optimizer=adam, steps_per_program=800)
    # 13 points and 13 logits determine the affine map of 4 dimensions, and without a norm the loss is convex.
    left = [layers, *(layers - layer - 1 for layer in range(layers) for _ in ("mid", "post"))]
    expected = np.stack([np.linalg.matrix_power(turn, n) - np.eye(width) for n in left])
    assert (done.loss[0, :1] > 0.1).all() and (np.abs(done.loss[-1]) < 1e-5).all()
    # A divergence of d is a distance of about sqrt(d) in the logits.
    np.testing.assert_allclose(done.lens.weight, expected, atol=1e-2)
    np.testing.assert_allclose(done.lens.bias, 0, atol=1e-2)


def test_the_logits_of_one_station_at_a_time_are_in_memory():
    config = ModelConfig(vocabulary=4096, layers=6, width=8, length=8, position="none", feed_forward="none")
    parameters, tokens = random_parameters(config), random_tokens(config, batch=4)[None]
    setting = module._Setting(parameters, config, module.SGD)
    state = (initialize(config), module.SGD.init(initialize(config)))
    program = stream._program.lower(setting, state, tokens, np.int32(1), step=module._step)
    program = program.compile({"xla_backend_optimization_level": "3"})
    logits = tokens.size * config.vocabulary * 4
    assert program.memory_analysis().temp_size_in_bytes < len(station_names(config)) / 2 * logits


def test_a_stopped_training_goes_on_where_it_was_and_one_that_is_lost_says_so():
    parameters, tokens = random_parameters(GPT2), seen_tokens(GPT2)

    def interrupted():
        yield from tokens[:30]
        raise KeyboardInterrupt

    whole, half = train(parameters, tokens[:25], GPT2), train(parameters, interrupted(), GPT2)
    assert whole.finished and not half.finished and half.loss.shape == (25, 5)
    assert bits(half.lens) == bits(whole.lens)
    rest = train(parameters, tokens[25:], GPT2, start=half.lens)
    np.testing.assert_allclose(rest.loss[0], mean_divergences(parameters, half.lens, tokens[25], GPT2), atol=1e-5)
    lost = jax.tree.map(lambda x: x * jnp.nan, half.lens)
    with pytest.raises(ValueError, match="^the loss at step 0 .the first is 0. is not finite"):
        train(parameters, tokens, GPT2, start=lost)


def test_it_is_saved_and_read_back_to_the_bit(tmp_path):
    tuned, path = random_lens(GPT2), tmp_path / "lenses" / "tuned.safetensors"
    save(path, tuned)
    assert bits(load(path, GPT2)) == bits(tuned)
    with pytest.raises(
        ValueError, match=r"weight in .*tuned.safetensors has shape \(5, 12, 12\); this model's tuned "
    ):
        load(path, LLAMA)
    save_file({"weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ValueError, match="holds weight; a tuned lens is weight and bias$"):
        load(path, GPT2)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="tuned.safetensors"):
        load(path, GPT2)


@functools.cache
def bad_calls():
    parameters, tokens = random_parameters(GPT2), random_tokens(GPT2)
    batches = tokens[None]
    return {
        r"a batch of tokens is \[batch, position\] of whole numbers; this one is int32 \(5,\)": lambda: train(
            parameters, tokens, GPT2
        ),
        r"this one is float32 \(2, 5\)": lambda: train(parameters, batches * 1.0, GPT2),
        "tokens go from 0 to 12 here; a batch has 13 to": lambda: train(parameters, batches * 0 + 13, GPT2),
        "9 tokens are more than the model's length of 8": lambda: train(
            parameters, random_tokens(GPT2, length=9)[None], GPT2
        ),
        "there is no batch": lambda: train(parameters, [], GPT2),
        r"weight in the lens to start from has shape \(5, 16, 16\); this model's tuned lens has \(5, 12": lambda: (
            train(parameters, batches, GPT2, start=initialize(LLAMA))
        ),
        r"the tuned lens has weights of shape \(7, 12, 12\); this walk needs \(5, 12, 12\)": lambda: translate(
            initialize(replace(GPT2, layers=3)), random_walk(2, 2, 5, 12)
        ),
        "'layers.resid_pre', which this walk does not hold": lambda: translate(
            initialize(GPT2), Walk(layers=LayerWalk())
        ),
    }


def test_what_cannot_be_is_refused_with_a_reason():
    for message, call in bad_calls().items():
        with pytest.raises(ValueError, match=message):
            call()


def real_tokens(tokenizer, count):
    """Sequences of 64 tokens of real English, a beginning and then text; encoded line by line."""
    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text()
    ids = []
    for line in text.splitlines(keepends=True):
        ids += tokenizer.encode(line)[1:]
        if len(ids) >= count * 63:
            break
    return np.insert(np.array(ids[: count * 63], np.int32).reshape(count, 63), 0, 1, axis=1)


def test_on_a_real_model_it_reads_from_every_station_what_the_logit_lens_does_not_see():
    folder = SHARED / "data" / "stories260K"
    if not (folder.is_dir() and (SHARED / "data" / "tinyshakespeare").is_dir()):
        pytest.skip(
            f"stories260K or tinyshakespeare is not in {SHARED}; set MINITF_SHARED to the folder above data"
        )
    model = pretrained.load(folder / "stories260K.bin")
    tokens = real_tokens(model.tokenizer, 160 + 16)
    mixed = np.random.default_rng(0).permutation(tokens)
    held, rest = jnp.asarray(mixed[:16]), mixed[16:].reshape(40, 4, 64)
    done = train(model.parameters, rest, model.config)
    logit, tuned = (
        mean_divergences(model.parameters, t, held, model.config) for t in (initialize(model.config), done.lens)
    )
    # The best that can be said without looking at the stream: the mean of what the model says of these tokens.
    final = np.float64(compiled_lens(model.config)(model.parameters, done.lens, held)[1])
    final = np.exp(final - final.max(-1, keepdims=True))
    final /= final.sum(-1, keepdims=True)
    constant = (final * np.log(final / final.mean((0, 1)))).sum(-1).mean()
    print(
        f"KL(final || lens) in nats; a constant distribution: {constant:.2f}, a uniform one is {math.log(512):.2f}"
    )
    for name, before, after in zip(station_names(model.config), logit, tuned, strict=True):
        print(f"{name:>7}  logit lens {before:7.3f}  tuned lens {after:7.3f}")
    # In the first half the logit lens is worse than one that does not look; everywhere the tuned lens is better.
    assert (logit[:5] > constant).all()
    assert (tuned < constant).all()
    assert (tuned[:-1] < logit[:-1]).all()
    assert abs(tuned[-1]) < 1e-5
