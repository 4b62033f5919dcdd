import struct
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from properties.checkpoints import refused
from properties.llama2c_files import tokenizer_bytes
from properties.models import bits, compiled_logits, in_float64, random_parameters, random_tokens

from minitf import ModelConfig
from minitf.families.llama2c import as_llama
from minitf.families.llama2c_tokenizer import load_tokenizer
from minitf.parameters import named
from minitf.pretrained import Pretrained, load, save

LLAMA2C = ModelConfig(
    vocabulary=260,
    layers=2,
    width=8,
    heads=2,
    key_value_heads=1,
    hidden=12,
    length=6,
    position="rotary",
    rotary_interleaved=True,
    norm="rms",
    feed_forward="swiglu",
)


def llama2c_bytes(config, parameters):
    """The file as its documentation describes it, written without minitf's table of names."""
    w = {name: np.asarray(value) for name, value in named(parameters).items()}
    c, sign = config, 1 if config.tied else -1
    numbers = [c.width, c.hidden, c.layers, c.heads, c.groups, sign * c.vocabulary, c.length]
    maps = lambda name: w[f"layers.{name}"].reshape(c.layers, c.width, -1).swapaxes(1, 2)
    parts = [
        w["embedding"],
        w["layers.attention_norm.gain"],
        maps("attention.query"),
        maps("attention.key"),
        maps("attention.value"),
        w["layers.attention.output"].reshape(c.layers, -1, c.width).swapaxes(1, 2),
        w["layers.feed_forward_norm.gain"],
        maps("feed_forward.into"),
        w["layers.feed_forward.out"].swapaxes(1, 2),
        maps("feed_forward.gate"),
        w["final_norm.gain"],
        np.full(c.length * c.head_size, np.nan),  # the rotary tables, which nobody reads
        *([] if c.tied else [w["unembedding"].T]),
    ]
    return struct.pack("<7i", *numbers) + b"".join(np.asarray(part, "<f4").tobytes() for part in parts)


@pytest.fixture
def llama2c(tmp_path):
    config = replace(LLAMA2C, tied=True)
    parameters = random_parameters(config)
    (tmp_path / "model.bin").write_bytes(llama2c_bytes(config, parameters))
    return tmp_path / "model.bin", config, parameters


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama2c_file_is_read(tied, tmp_path):
    config = replace(LLAMA2C, tied=tied)
    parameters = random_parameters(config)
    (tmp_path / "model.bin").write_bytes(llama2c_bytes(config, parameters))
    found = load(tmp_path / "model.bin")
    assert (found.family, found.config, found.tokenizer) == ("llama2c", config, None)
    assert bits(found.parameters) == bits(parameters)


def test_a_llama2c_file_of_another_length_is_refused_with_both(llama2c):
    file = llama2c[0]
    raw = file.read_bytes()
    for wrong, said in ((raw[:-4], "cut off"), (raw[:600], "cut off"), (raw + b"\0", "longer than it should be")):
        file.write_bytes(wrong)
        refused(f"should have {len(raw)} bytes by its header, but it has {len(wrong)}: the file is {said}$", file)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"1234", "has 4 bytes; a llama2.c checkpoint begins with 28$"),
        (struct.pack("<7i", 0x616B3432, 1, 8, 12, 2, 4, 4), "is a later version of llama2.c's format"),
        (b"PK\x03\x04" + bytes(40), "is no llama2.c checkpoint: its first numbers are"),
        (struct.pack("<7i", 8, 12, 2, 3, 3, 260, 6), "is no llama2.c checkpoint: 3 heads do not divide"),
        (struct.pack("<7i", 8, 12, -2, 4, 4, 260, 6), "is no llama2.c checkpoint: layers is -2"),
    ],
    ids=range(5),
)
def test_what_is_no_llama2c_file_is_refused(raw, match, tmp_path):
    (tmp_path / "model.bin").write_bytes(raw)
    refused(match, tmp_path / "model.bin")


def test_a_llama2c_weight_that_is_no_number_is_refused_by_name(llama2c):
    file, config, parameters = llama2c
    spoilt = replace(parameters, final_norm=replace(parameters.final_norm, gain=jnp.full(8, jnp.nan)))
    file.write_bytes(llama2c_bytes(config, spoilt))
    refused("the tensor final_norm holds 8 numbers that are NaN or infinite, out of 8$", file)


def test_a_file_that_is_no_bin_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("model.safetensors is a file: give the folder it lies in", tmp_path / "model.safetensors")
    refused("only a llama2.c .bin file takes one$", tmp_path, tokenizer="tokenizer.bin")


def test_as_a_llama_only_the_order_inside_heads_changes(llama2c, tmp_path):
    _, config, parameters = llama2c
    llama, changed = as_llama(config, parameters)
    save(tmp_path / "llama", Pretrained("llama", llama, changed))
    again = load(tmp_path / "llama")
    tokens = random_tokens(config)
    with jax.enable_x64(True):
        one = compiled_logits(config)(in_float64(parameters), tokens)
        other = compiled_logits(again.config)(in_float64(again.parameters), tokens)
    np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    before, after = named(parameters), named(changed)
    assert {name for name in before if bits(before[name]) != bits(after[name])} == {
        "layers.attention.query",
        "layers.attention.key",
    }


@pytest.mark.parametrize("name", ["tok260.bin", "tokenizer.bin", "given.bin"])
def test_the_tokenizer_is_taken_from_beside_the_model_or_as_given(name, llama2c):
    file = llama2c[0]
    (file.parent / name).write_bytes(tokenizer_bytes([b"a"]))
    found = load(file, tokenizer=file.parent / name) if name == "given.bin" else load(file)
    assert found.tokenizer.n_vocab == 260
    refused("nowhere.bin cannot be read: No such file", file, tokenizer=file.parent / "nowhere.bin")


def test_a_tokenizer_that_does_not_fit_is_refused(llama2c):
    file = llama2c[0]
    other = file.with_name("tokenizer.bin")
    good = tokenizer_bytes([b"abc"])
    for raw, match in [
        (tokenizer_bytes([]), "tokenizer.bin has 259 tokens, but the model has 260$"),
        (good[:-1], "is damaged or cut off in token 259: its piece has 3 bytes$"),
        (good[:-7], "is cut off in token 259$"),
        (good.replace(b"<0x0A>", b"<0x0B>"), "does not have the 256 single bytes as its tokens 3 to 258$"),
    ]:
        other.write_bytes(raw)
        refused(match, file)


def test_pieces_are_merged_by_score_the_best_first_and_the_leftmost_of_equals(tmp_path):
    # The later a piece stands, the lower its score here.
    pieces = [b" ", b"a", b"b", b"c", b"bc", b"ab", b" a", b"aa", b"abc"]
    (tmp_path / "t.bin").write_bytes(tokenizer_bytes(pieces))
    tokenizer = load_tokenizer(tmp_path / "t.bin", 259 + len(pieces))
    number = {piece: 259 + place for place, piece in enumerate(pieces)}
    cut = lambda *parts: [1, *(number[part] for part in parts)]
    assert tokenizer.encode("abc") == cut(b" a", b"bc")
    assert tokenizer.encode("babc") == cut(b" ", b"b", b"abc")
    assert tokenizer.encode("caaa") == cut(b" ", b"c", b"aa", b"a")
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("é") == [1, number[b" "], 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode(" abc é")) == " abc é"
    # Without the token that begins a text, ids are the middle of one, and their spaces are kept.
    assert tokenizer.decode([number[b" a"], 2, number[b" a"]]) == " a a"
    assert tokenizer.decode_bytes([3 + 0xC3]) == b"\xc3" and tokenizer.decode([3 + 0xC3]) == "\ufffd"
