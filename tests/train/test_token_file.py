import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.train.token_file import open_tokens, write_tokens


@pytest.fixture
def written(tmp_path):
    return write_tokens(tmp_path / "x.tokens", [np.arange(300) % 7, np.arange(5)], vocabulary=7).path


@given(
    pieces=st.lists(st.lists(st.integers(0, 70_000), max_size=5), min_size=1, max_size=4).filter(any),
    extra=st.integers(1, 3),
)
def test_what_is_written_piece_by_piece_is_read_back_as_one(tmp_path_factory, pieces, extra):
    vocabulary = max(map(max, filter(None, pieces))) + extra
    file = tmp_path_factory.mktemp("tokens") / "a" / "x.tokens"
    arrays = (np.array(piece, np.int64) for piece in pieces)
    write_tokens(file, arrays, vocabulary=vocabulary, made_from={"of": "a test"})
    tokens = open_tokens(file)
    joined = list(itertools.chain.from_iterable(pieces))
    assert tokens.ids.tolist() == joined and len(tokens) == len(tokens.ids)
    assert tokens.vocabulary == vocabulary and tokens.made_from == {"of": "a test"}
    assert tokens.ids.dtype == (np.uint16 if vocabulary <= 65_536 else np.uint32)
    # Little-endian and nothing else, so that others read it too.
    raw = np.array(joined, "<u2" if vocabulary <= 65_536 else "<u4").tobytes()
    assert file.read_bytes() == raw and tokens.sha256 == hashlib.sha256(raw).hexdigest()


def test_tokens_stay_on_disk_and_cannot_be_changed(written):
    ids = open_tokens(written).ids
    assert isinstance(ids, np.memmap) and ids.mode == "r"
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_one_changed_byte_is_found_unless_the_check_is_left_out(written):
    data = bytearray(written.read_bytes())
    data[100] ^= 1
    written.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.tokens is damaged: its SHA-256"):
        open_tokens(written)
    assert len(open_tokens(written, check=False)) == 305


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0\0", lambda data: b""])
def test_a_file_of_another_size_is_refused_even_without_the_check(written, change):
    written.write_bytes(change(written.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.tokens is damaged: it has .* bytes, and 305 tokens of 2 bytes"):
        open_tokens(written, check=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: "{", "x.tokens.json of a token file is damaged: no JSON"),
        (lambda told: "[]", "x.tokens.json does not describe a token file"),
        (lambda told: json.dumps(told | {"format": "another"}), "does not describe a token file of this format"),
        (lambda told: json.dumps(told | {"count": "many"}), "is damaged: count"),
        (lambda told: json.dumps(told | {"count": 0}), "is damaged: count"),
        (lambda told: json.dumps(told | {"dtype": "float64"}), "is damaged: dtype"),
        (lambda told: json.dumps({k: v for k, v in told.items() if k != "sha256"}), "is damaged: sha256"),
    ],
)
def test_a_foreign_or_damaged_description_is_refused_by_name(written, change, message):
    beside = written.with_name("x.tokens.json")
    beside.write_text(change(json.loads(beside.read_text())))
    with pytest.raises(ValueError, match=message):
        open_tokens(written)


def test_a_missing_description_or_file_is_named(written):
    beside = written.with_name("x.tokens.json")
    kept = beside.read_text()
    beside.unlink()
    with pytest.raises(ValueError, match=r"x\.tokens is no token file .* description x\.tokens\.json"):
        open_tokens(written)
    beside.write_text(kept)
    written.unlink()
    with pytest.raises(ValueError, match=r"x\.tokens cannot be read: No such file"):
        open_tokens(written)


@pytest.mark.parametrize("wrong", [7, -1])
def test_a_token_outside_the_vocabulary_is_refused_and_what_was_there_stays(written, wrong):
    before = sorted(written.parent.iterdir())
    with pytest.raises(ValueError, match=f"a token {wrong} .*ids go from 0 to 6"):
        write_tokens(written, [np.arange(7), np.array([0, wrong])], vocabulary=7)
    assert sorted(written.parent.iterdir()) == before and len(open_tokens(written)) == 305


def test_no_tokens_and_a_vocabulary_that_is_none_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a single token"):
        write_tokens(tmp_path / "x.tokens", [np.zeros(0, np.int32)], vocabulary=7)
    with pytest.raises(ValueError, match="vocabulary of .* is 0"):
        write_tokens(tmp_path / "x.tokens", [np.arange(3)], vocabulary=0)
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_file_whose_making_failed(tmp_path):
    def interrupted():
        yield np.arange(7)
        raise KeyError

    with pytest.raises(KeyError):
        write_tokens(tmp_path / "x.tokens", interrupted(), vocabulary=7)
    assert not list(tmp_path.iterdir())
