"""A real pretrained model: llama2.c's stories260K (Karpathy 2023), in its own file format."""

import functools
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minitf import ModelConfig, Parameters, count, walk
from minitf.parameters import AttentionParameters, FeedForwardParameters, Layer, Norm

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
FOLDER = SHARED / "data" / "stories260K"
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(),
    reason=f"the model stories260K is not in {FOLDER}; set MINITF_SHARED to the folder above data",
)
BEGIN = 1
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high.\n"
    "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do."
)


def read_model():
    """Configuration and parameters: a header of seven integers, then float32 weights, outputs before inputs."""
    raw = (FOLDER / "stories260K.bin").read_bytes()
    width, hidden, layers, heads, groups, vocabulary, length = struct.unpack("<7i", raw[:28])
    numbers = np.frombuffer(raw, "<f4", offset=28)
    config = ModelConfig(
        vocabulary=vocabulary,
        layers=layers,
        width=width,
        heads=heads,
        key_value_heads=groups,
        length=length,
        hidden=hidden,
        position="rotary",
        rotary_interleaved=True,
        norm="rms",
        norm_epsilon=1e-5,
        feed_forward="swiglu",
        tied=True,
    )
    place = 0

    def take(*shape):
        nonlocal place
        start, place = place, place + int(np.prod(shape))
        return numbers[start:place].reshape(shape)

    def maps(outputs, inputs):
        return take(layers, outputs, inputs).swapaxes(1, 2)

    size = config.head_size
    embedding, attention_gain = take(vocabulary, width), take(layers, width)
    attention = AttentionParameters(
        query=maps(width, width).reshape(layers, width, heads, size),
        key=maps(groups * size, width).reshape(layers, width, groups, size),
        value=maps(groups * size, width).reshape(layers, width, groups, size),
        output=maps(width, width).reshape(layers, heads, size, width),
    )
    feed_forward_gain = take(layers, width)
    into, out, gate = maps(hidden, width), maps(width, hidden), maps(hidden, width)
    parameters = Parameters(
        embedding=embedding,
        layers=Layer(
            attention_norm=Norm(gain=attention_gain),
            attention=attention,
            feed_forward_norm=Norm(gain=feed_forward_gain),
            feed_forward=FeedForwardParameters(into=into, gate=gate, out=out),
        ),
        final_norm=Norm(gain=take(width)),
    )
    unused_rotary_tables = 2 * length * (size // 2)
    assert place + unused_rotary_tables == len(numbers)
    return config, jax.tree.map(jnp.asarray, parameters)


def read_pieces():
    """The tokens' bytes: for each a float32 score, an int32 length, and so many bytes; <0x0A> is the byte 10."""
    raw, pieces, place = (FOLDER / "tok512.bin").read_bytes(), [], 4
    while place < len(raw):
        (length,) = struct.unpack_from("<i", raw, place + 4)
        piece = raw[place + 8 : place + 8 + length]
        pieces.append(bytes.fromhex(piece[3:5].decode()) if piece[:3] == b"<0x" and length == 6 else piece)
        place += 8 + length
    return pieces


@functools.cache
def greedy_tokens(steps):
    config, parameters = read_model()

    @jax.jit
    def next_token(tokens, last):
        # Padding lies after the last token, where a causal model does not look.
        return jnp.argmax(walk(parameters, tokens, config).logits[0, last])

    tokens = np.zeros((1, steps + 1), np.int32)
    tokens[0, 0] = BEGIN
    for last in range(steps):
        tokens[0, last + 1] = next_token(tokens, last)
    return tokens[0, 1:]


def test_the_parameters_are_those_of_the_file():
    config, parameters = read_model()
    assert sum(x.size for x in jax.tree.leaves(parameters)) == count(config)
    assert 255_000 < count(config) < 265_000


def test_greedy_decoding_tells_the_documented_story():
    pieces = read_pieces()
    assert len(pieces) == 512
    text = b"".join(pieces[token] for token in greedy_tokens(120)).decode().strip()
    assert text.startswith(STORY)
