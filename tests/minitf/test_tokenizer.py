import base64
import os
import shutil
import socket
import tempfile
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from minitf import tokenizer
from minitf.tokenizer import (
    GPT2_PATTERN,
    byte_encoding,
    decode_bytes,
    encode,
    gpt2_encoding,
    load_encoding,
    save_encoding,
    token_labels,
    train_encoding,
)

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
GPT2_CACHE = SHARED / "data" / "tiktoken_cache"
needs_gpt2 = pytest.mark.skipif(not GPT2_CACHE.is_dir(), reason=f"GPT-2's tokenizer files are not in {GPT2_CACHE}")

TEXT = (
    "The scan is slow and the snap is sudden: the attention of the query scans the tokens, then it snaps. "
    "Common tokens lose, distinct tokens win. Ein größerer Käse, 12 345 Stück — ça va? 東京 \U0001f600\n\n"
) * 8
TRAINED = train_encoding(TEXT, 340)
ENCODINGS = [byte_encoding(), TRAINED]

# Bytes as they come: noise, text in any script, and the strings that other tokenizers treat specially.
any_bytes = st.lists(
    st.one_of(
        st.binary(max_size=20),
        st.text(max_size=20).map(str.encode),
        st.sampled_from([b"<|endoftext|>", b"\xe2\x82", b"\xed\xa0\x80", b"\xff\xfe", b"  \n\t ", b"the scan"]),
    )
).map(b"".join)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@given(any_bytes)
def test_any_bytes_come_back_exactly(data):
    for encoding in ENCODINGS:
        ids = encode(encoding, data)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert decode_bytes(encoding, ids) == data


@given(st.text())
def test_a_string_has_the_tokens_of_its_bytes(text):
    for encoding in ENCODINGS:
        ids = encode(encoding, text)
        assert decode_bytes(encoding, ids) == text.encode()
        assert np.array_equal(ids, encode(encoding, text.encode()))


@given(st.binary())
def test_the_id_of_a_byte_token_is_the_value_of_the_byte(data):
    assert encode(byte_encoding(), data).tolist() == list(data)


def test_no_bytes_are_no_tokens():
    for encoding in ENCODINGS:
        assert encode(encoding, b"").shape == encode(encoding, "").shape == (0,)
        assert decode_bytes(encoding, []) == b""
        assert token_labels(encoding, []) == []


def test_a_string_with_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="lone surrogate, U\\+D800, at position 2"):
        encode(TRAINED, "ab\ud800")
    with pytest.raises(ValueError, match="lone surrogate"):
        train_encoding("hello \udcff hello", 300)


def test_long_runs_of_one_character_are_encoded_too():
    for character in " \na.":
        assert decode_bytes(TRAINED, encode(TRAINED, character * 200_000)) == character.encode() * 200_000


def test_the_vocabulary_has_the_size_asked_for_with_all_bytes_in_it():
    assert TRAINED.n_vocab == 340
    tokens = [TRAINED.decode_single_token_bytes(rank) for rank in range(340)]
    assert tokens[:256] == [bytes([value]) for value in range(256)]
    assert len(set(tokens)) == 340
    assert len(encode(TRAINED, TEXT)) < len(TEXT.encode()) / 2


@given(st.text(min_size=2), st.integers(257, 300))
def test_a_text_with_few_pairs_gives_a_smaller_vocabulary_without_holes(text, size):
    try:
        encoding = train_encoding(text, size)
    except ValueError as error:
        assert "no pair of bytes to merge" in str(error)
        return
    assert 256 < encoding.n_vocab <= size
    assert len({encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab)}) == encoding.n_vocab
    assert decode_bytes(encoding, encode(encoding, text)) == text.encode()


def test_each_merge_is_the_most_frequent_pair_that_the_earlier_merges_left():
    pieces = Counter(tuple(bytes([b]) for b in piece.encode()) for piece in regex.findall(GPT2_PATTERN, TEXT))
    for rank in range(256, 340):
        token = TRAINED.decode_single_token_bytes(rank)
        pairs: Counter = Counter()
        for piece, count in pieces.items():
            for pair in zip(piece, piece[1:], strict=False):
                pairs[pair] += count
        candidates = [pair for pair in pairs if b"".join(pair) == token]
        assert candidates and pairs[candidates[0]] == max(pairs.values())
        pieces = Counter({_merge(piece, candidates[0]): count for piece, count in pieces.items()})


def _merge(piece, pair):
    merged = []
    position = 0
    while position < len(piece):
        hit = piece[position : position + 2] == pair
        merged.append(b"".join(pair) if hit else piece[position])
        position += 2 if hit else 1
    return tuple(merged)


def test_training_does_not_depend_on_how_the_texts_are_handed_over():
    lines = TEXT.splitlines()
    expected = _tokens(train_encoding(lines, 350))
    assert _tokens(train_encoding((line for line in lines), 350)) == expected
    assert _tokens(train_encoding(lines[::-1], 350)) == expected


def _tokens(encoding):
    return [encoding.decode_single_token_bytes(rank) for rank in range(encoding.n_vocab)]


def test_a_vocabulary_of_256_is_plain_bytes():
    assert _tokens(train_encoding("any text", 256)) == _tokens(byte_encoding())


@pytest.mark.parametrize("size", [255, 0, -1])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"vocabulary_size is {size}.*256"):
        train_encoding(TEXT, size)


@pytest.mark.parametrize("text", ["", [], ["", ""]])
def test_no_text_to_train_on_is_refused(text):
    with pytest.raises(ValueError, match="empty"):
        train_encoding(text, 300)


def test_a_text_too_small_to_merge_anything_is_refused():
    with pytest.raises(ValueError, match="1 characters.*too little for 300"):
        train_encoding("a", 300)


@pytest.mark.parametrize("text", [b"some bytes", [b"some", b"bytes"]])
def test_bytes_to_train_on_are_refused(text):
    # With the type checker on, it is the checker that refuses them.
    with pytest.raises((ValueError, TypeCheckError), match="strings, not on bytes|checking the parameters"):
        train_encoding(text, 300)


@given(st.text())
def test_a_saved_encoding_is_the_same_when_loaded(text):
    with tempfile.TemporaryDirectory() as folder:
        save_encoding(TRAINED, Path(folder) / "new" / "ranks.tiktoken")
        loaded = load_encoding(Path(folder) / "new" / "ranks.tiktoken")
        assert os.listdir(Path(folder) / "new") == ["ranks.tiktoken"]
    assert _tokens(loaded) == _tokens(TRAINED)
    assert np.array_equal(encode(loaded, text), encode(TRAINED, text))


def test_a_rank_file_is_what_tiktoken_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    save_encoding(TRAINED, tmp_path / "ranks.tiktoken")
    ranks = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    assert ranks == {token: rank for rank, token in enumerate(_tokens(TRAINED))}


def test_a_tokenizer_trained_again_at_the_same_place_is_the_one_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "ranks.tiktoken"
    for size in (300, 320):
        save_encoding(train_encoding(TEXT, size), file)
        assert load_encoding(file).n_vocab == size


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "ranks.tiktoken"
    save_encoding(TRAINED, file)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_encoding(byte_encoding(), file)
    assert os.listdir(tmp_path) == ["ranks.tiktoken"]
    assert load_encoding(file).n_vocab == 340


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "ranks.tiktoken"
    save_encoding(train_encoding(TEXT, 300), file)
    return file


def _line(token, rank):
    return base64.b64encode(token) + b" %d\n" % rank


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "not a whole rank file"),
        (lambda data: b"\x00\xff\xfe binary", "line 1.*not a token in base64"),
        (lambda data: b"once upon a time\n" + data, "line 1: 'once upon a time'"),
        (lambda data: data + b"YWJj\n", "line 301"),
        (lambda data: data + b"YWJj 300 7\n", "line 301"),
        (lambda data: data + b"YWJj -1\n", "line 301"),
        (lambda data: data + _line(b"a", 300), "line 301: the token b'a' stands there twice"),
        (lambda data: data + _line(b"qqqq", 299), "rank 300 is missing"),
        (lambda data: data + _line(b"qqqq", 301), "rank 300 is missing"),
        (lambda data: data.replace(_line(b"a", 97), b""), r"1 of the 256 single bytes.*97"),
        (lambda data: data[: len(data) // 2], "not a"),
    ],
)
def test_a_damaged_rank_file_is_refused_by_name(rank_file, tmp_path, change, message):
    damaged = tmp_path / "damaged.tiktoken"
    damaged.write_bytes(change(rank_file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        load_encoding(damaged)
    assert str(damaged) in str(caught.value)


@given(data=st.data())
def test_a_rank_file_with_any_wrong_byte_or_end_is_refused_or_still_round_trips(rank_file, data):
    content = bytearray(rank_file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] = data.draw(st.integers(0, 255))
    else:
        del content[position:]
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / "damaged.tiktoken"
        damaged.write_bytes(content)
        try:
            encoding = load_encoding(damaged)
        except ValueError as error:
            assert str(damaged) in str(error)
            return
    everything = bytes(range(256)) + TEXT.encode()
    assert decode_bytes(encoding, encode(encoding, everything)) == everything


def test_a_rank_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    for path in (tmp_path / "missing.tiktoken", tmp_path):
        with pytest.raises(ValueError, match=f"{path} cannot be read"):
            load_encoding(path)


@pytest.mark.parametrize(
    ("token", "label"),
    [
        (b"the", "the"),
        (b" the", "␣the"),
        (b"\n\n", "\\n\\n"),
        (b"\t\r", "\\t\\r"),
        (b"\\", "\\\\"),
        (b"\x00", "\\x00"),
        (b"\xe2", "\\xe2"),
        (b" \xe2\x82", "␣\\xe2\\x82"),
        ("é".encode(), "é"),
        ("\u00a0".encode(), "\\u00a0"),
        ("\u2423".encode(), "\\u2423"),
        ("\u202e".encode(), "\\u202e"),
        ("\U000e0001".encode(), "\\U000e0001"),
        (b"<script>", "<script>"),
    ],
)
def test_a_label_shows_what_the_token_holds(token, label):
    ranks = {bytes([value]): value for value in range(256)}
    ranks.setdefault(token, 256)
    encoding = tiktoken.Encoding("test", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert token_labels(encoding, [ranks[token]]) == [label]


@given(st.lists(st.one_of(st.binary(min_size=1), st.text(min_size=1).map(str.encode)), unique=True))
def test_labels_are_printable_and_differ_when_tokens_differ(tokens):
    labels = [tokenizer._label(token) for token in tokens]
    assert all(label.isprintable() and " " not in label for label in labels)
    assert len(set(labels)) == len(tokens)


def test_ids_may_be_a_list_a_numpy_array_or_a_device_array():
    ids = encode(TRAINED, "the scan")
    for given_ids in (ids, ids.tolist(), tuple(ids), jnp.asarray(ids), iter(ids.tolist())):
        assert decode_bytes(TRAINED, given_ids) == b"the scan"


@pytest.mark.parametrize("wrong", [340, -1])
def test_an_id_outside_the_vocabulary_is_refused(wrong):
    for function in (decode_bytes, token_labels):
        with pytest.raises(ValueError, match=f"no token {wrong}.*0 to 339"):
            function(TRAINED, [5, wrong])


@pytest.mark.parametrize("wrong", [[[1, 2]], [1.5], np.zeros((2, 2), np.int32), ["a"]])
def test_ids_that_are_no_sequence_of_integers_are_refused(wrong):
    with pytest.raises(ValueError, match="1-D sequence of integers"):
        decode_bytes(TRAINED, wrong)


def test_without_its_files_gpt2_says_how_to_get_them_and_opens_no_connection(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="vocab.bpe is not in tiktoken's cache") as caught:
        gpt2_encoding()
    assert str(tmp_path) in str(caught.value) and "tiktoken.get_encoding('gpt2')" in str(caught.value)


def test_gpt2_looks_where_tiktoken_looks(tmp_path, monkeypatch, no_network):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with pytest.raises(ValueError, match=str(tmp_path / "temporary" / "data-gym-cache")):
        gpt2_encoding()
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", str(tmp_path / "gym"))
    with pytest.raises(ValueError, match=str(tmp_path / "gym")):
        gpt2_encoding()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(ValueError, match="the cache is off"):
        gpt2_encoding()


@needs_gpt2
def test_a_damaged_gpt2_file_is_refused_and_left_alone(tmp_path, monkeypatch, no_network):
    for file in GPT2_CACHE.iterdir():
        shutil.copy(file, tmp_path)
    damaged = tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="encoder.json in tiktoken's cache is damaged"):
        gpt2_encoding()
    assert damaged.exists()


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
        return gpt2_encoding()


@needs_gpt2
def test_gpt2_gives_the_published_ids(gpt2):
    assert gpt2.n_vocab == 50257
    assert encode(gpt2, "Hello world").tolist() == [15496, 995]
    assert token_labels(gpt2, [15496, 995]) == ["Hello", "␣world"]
    assert decode_bytes(gpt2, [50256]) == b"<|endoftext|>"


@needs_gpt2
def test_special_strings_in_text_are_plain_text(gpt2):
    ids = encode(gpt2, "a<|endoftext|>b")
    assert 50256 not in ids and len(ids) > 3
    assert decode_bytes(gpt2, ids) == b"a<|endoftext|>b"


@needs_gpt2
@given(any_bytes)
def test_any_bytes_come_back_exactly_from_gpt2(gpt2, data):
    assert decode_bytes(gpt2, encode(gpt2, data)) == data


@needs_gpt2
def test_the_labels_of_all_of_gpt2_differ(gpt2, tmp_path):
    assert len(set(token_labels(gpt2, range(gpt2.n_vocab)))) == gpt2.n_vocab


@needs_gpt2
def test_gpt2_saved_and_loaded_keeps_its_ranks_but_not_its_special_token(gpt2, tmp_path):
    save_encoding(gpt2, tmp_path / "gpt2.tiktoken")
    loaded = load_encoding(tmp_path / "gpt2.tiktoken")
    assert loaded.n_vocab == 50256
    assert np.array_equal(encode(loaded, TEXT), encode(gpt2, TEXT))
