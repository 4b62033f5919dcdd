import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.tokenizer import train_encoding
from minitf.vocabulary import (
    Bins,
    Bytes,
    Characters,
    Ids,
    Labelled,
    Measured,
    Names,
    Pieces,
    bins_of,
    load_vocabulary,
    numbers,
)

TEXT = "the scan is slow and then attention snaps to distinct tokens while common ones fade, あ\n" * 20
anything = st.text(st.characters(exclude_categories=["Cs"]))


@cache
def pieces():
    return Pieces(train_encoding(TEXT, 300))


TABLE = Bins(("x", "y"), ((1.5,), (-2.0, 0.0)), ((1.0, 2.0), (-3.0, -1.0, 4.0)))
KINDS = {
    "bytes": (lambda: Bytes(), TEXT),
    "pieces": (pieces, TEXT),
    "characters": (lambda: Characters("".join(sorted(set(TEXT)))), TEXT),
    "names": (lambda: Names(("a b", "c", "é")), "c\na b\né\nc\n"),
    "ids": (lambda: Ids(50), "0 49 3"),
    "bins": (lambda: TABLE, "1,-3\n2,4\n1,-1\n"),
    "labelled": (lambda: Labelled(Bytes(), ("no", "yes")), TEXT),
    "measured": (lambda: Measured(pieces(), "speed", 2.5, 0.5), TEXT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_comes_back_from_its_folder_and_reads_and_writes_as_before(tmp_path, kind):
    make, text = KINDS[kind]
    vocabulary = make()
    vocabulary.save(tmp_path / "run")
    again = load_vocabulary(tmp_path / "run")
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32 and ids.min() >= 0 and ids.max() < vocabulary.size
    assert type(again) is type(vocabulary) and again.size == vocabulary.size
    assert np.array_equal(again.encode(text), ids)
    assert again.decode(ids) == vocabulary.decode(ids) == vocabulary.decode(ids.tolist()) == text
    assert again == vocabulary or kind in ("pieces", "measured")  # tiktoken's encodings are not compared
    json.loads((tmp_path / "run" / "vocabulary.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_a_text_are_the_text(kind):
    make, text = KINDS[kind]
    vocabulary = make()
    between = b" " if kind == "ids" else b""
    assert between.join(map(vocabulary.piece, vocabulary.encode(text).tolist())) == text.encode()


def test_a_label_is_a_token_and_a_number_is_none():
    labelled = Labelled(Bytes(), ("no", "yes"))
    assert labelled.piece(257) == b"[yes]" and labelled.piece(97) == b"a"
    measured = Measured(Bytes(), "speed", 2.5, 0.5)
    assert measured.size == 256
    np.testing.assert_allclose(measured.told(np.array([2.5, 3.5])), [0, 2])
    np.testing.assert_allclose(measured.number(np.array([0.0, 2.0])), [2.5, 3.5])


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_has_no_tokens_and_the_reverse(kind):
    vocabulary = KINDS[kind][0]()
    assert vocabulary.encode("").shape == (0,) and vocabulary.decode([]) == ""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [-1, None])
def test_a_token_that_there_is_not_is_named(kind, wrong):
    vocabulary = KINDS[kind][0]()
    wrong = vocabulary.size if wrong is None else wrong
    with pytest.raises(ValueError, match=f"[Tt]here is no token {wrong}"):
        vocabulary.decode([0, wrong])


@given(anything)
def test_any_text_comes_back_from_bytes_pieces_and_its_own_alphabet(text):
    for vocabulary in (Bytes(), pieces(), Characters("".join(sorted(set(text + "x"))))):
        assert vocabulary.decode(vocabulary.encode(text)) == text


def test_special_tokens_are_kept_beside_the_ranks(tmp_path):
    import tiktoken

    known = pieces().encoding
    ranks = {known.decode_single_token_bytes(rank): rank for rank in range(known.n_vocab)}
    special = tiktoken.Encoding("s", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens={"<|end|>": 300})
    Pieces(special).save(tmp_path)
    assert load_vocabulary(tmp_path).size == 301 and load_vocabulary(tmp_path).decode([300]) == "<|end|>"


def test_unknown_characters_are_named_ten_at_most():
    with pytest.raises(ValueError, match=r"the characters '!', 'x' are not in the alphabet of 3"):
        Characters("abc").encode("abxc!x")
    with pytest.raises(ValueError, match="and 16 more are not"):
        Characters("ABC").encode("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("wrong", ["7", "-1", "a", "1.5", "99999999999999999999"])
def test_what_is_no_token_is_named(wrong):
    with pytest.raises(ValueError, match=f"{wrong!r} is no token: tokens are numbers from 0 to 6"):
        Ids(7).encode(f"3 {wrong} 4")


def test_an_unknown_symbol_is_named():
    with pytest.raises(ValueError, match=r"'d' is none of the 2 symbols .*\('a', 'b', \.\.\.\); each is a line"):
        Names(("a", "b")).encode("a\nd\n")


# --- bins


@given(
    rows=st.lists(st.tuples(st.integers(-50, 50), st.floats(-1e6, 1e6)), min_size=5, max_size=60),
    bins=st.integers(2, 12),
)
def test_every_number_is_in_the_bin_between_its_limits_and_every_bin_has_numbers(rows, bins):
    table = np.array(rows, np.float64)
    if np.any(table.min(axis=0) == table.max(axis=0)):
        return
    try:
        vocabulary = bins_of(("x", "y"), table, bins)
    except ValueError as error:
        # A number that is the smallest and nearly all: no quantile is above it.
        assert "nearly all of its numbers" in str(error)
        return
    text = "".join(f"{x!r},{y!r}\n" for x, y in table.tolist())
    ids = vocabulary.encode(text).reshape(-1, 2)
    first = 0
    for column in range(2):
        limits = vocabulary.edges[column]
        expected = [sum(limit <= value for limit in limits) for value in table[:, column]]
        assert (ids[:, column] - first).tolist() == expected
        assert set(expected) == set(range(len(limits) + 1)) and len(limits) < bins
        assert list(limits) == sorted(set(limits))
        first += len(limits) + 1
    assert vocabulary.size == first


def test_bins_of_different_numbers_hold_equally_many():
    column = np.random.default_rng(0).permutation(1000)[:, None] / 7
    vocabulary = bins_of(("x",), column, 10)
    counts = np.bincount(vocabulary.encode("\n".join(map(repr, column[:, 0].tolist()))))
    assert len(counts) == 10 and np.ptp(counts) <= 1
    # The center of the lowest bin is the median of the numbers 0, 1, ... 99, over 7.
    assert vocabulary.centers[0][0] == pytest.approx(49.5 / 7, rel=1e-12)


def test_a_column_of_one_number_cannot_be_cut():
    with pytest.raises(ValueError, match="the column x cannot be cut in 4 bins: nearly all of its numbers are 3"):
        bins_of(("x",), np.full((10, 1), 3.0), 4)


def test_tokens_that_begin_inside_a_row_are_read_as_they_are():
    assert TABLE.decode([4, 0, 2, 1]) == "4\n1,-3\n2,"


@pytest.mark.parametrize("line", ["1", "1,2,3", "1,x", "1,nan", "1,", "1,inf"])
def test_what_is_no_row_of_numbers_is_named(line):
    with pytest.raises(ValueError, match=f"{line!r} is not a row of 2 finite numbers"):
        numbers(f"1,2\n{line}\n3,4\n", 2)


# --- damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "vocabulary.json cannot be read: No such file"),
        ("{", "vocabulary.json is damaged"),
        ("[]", "vocabulary.json is damaged"),
        ("{}", "vocabulary.json is damaged"),
        ('{"kind": "characters"}', "vocabulary.json is damaged"),
        ('{"kind": "ids", "size": "many"}', "vocabulary.json is damaged"),
        ('{"kind": "another"}', "vocabulary.json is of an unknown kind, 'another'"),
        ('{"kind": "pieces", "name": "x", "special": {}}', "rank file .*vocabulary.ranks cannot be read"),
    ],
)
def test_a_missing_or_damaged_vocabulary_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocabulary.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_vocabulary(tmp_path)
