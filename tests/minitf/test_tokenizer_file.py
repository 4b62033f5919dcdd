import itertools
import sys

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.checkpoints import saved
from properties.llama2c_files import tokenizer_bytes

from minitf import ModelConfig, initialize
from minitf.families import native
from minitf.families.llama2c_tokenizer import BEGIN, load_tokenizer
from minitf.pretrained import Pretrained, load, save
from minitf.tokenizer import byte_encoding, train_encoding
from minitf.tokenizer_file import TokenizerFile, load_tokenizer_file
from minitf.vocabulary import Bytes, Pieces, Tokenizer, load_vocabulary, vocabulary_of

PIECES = [b"a", b"b", b" ", b"ab", b"ba", b" a", b"aba", b"abab", b"bb", b" ab", b"aa"]
TEXTS = st.text("ab c\u3042", max_size=40)


@pytest.fixture(scope="module")
def llama2c_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("llama2c") / "tokenizer.bin"
    file.write_bytes(tokenizer_bytes(PIECES))
    return file


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    pytest.importorskip("tokenizers", reason="not installed: pip install 'minitf[hub]'")
    from properties.tokenizer_files import KINDS

    file = tmp_path_factory.mktemp("json") / "tokenizer.json"
    KINDS["llama3"].save(str(file))
    return file


def merged_one_by_one(tokenizer, text, score_of):
    """The definition: the best of all pairs, the leftmost of equals, again and again."""
    pieces = [tokenizer.decode_single_token_bytes(token) for token in range(tokenizer.n_vocab)]
    known = {piece: token for token, piece in reversed(list(enumerate(pieces))) if token >= 259}
    score = lambda piece: score_of(known[piece])
    found = []
    for character in " " + text if text else "":
        data = character.encode()
        found += [data] if data in known else [bytes([value]) for value in data]
    while pairs := [
        (score(one + other), -place)
        for place, (one, other) in enumerate(itertools.pairwise(found))
        if one + other in known
    ]:
        place = -max(pairs)[1]
        found[place : place + 2] = [found[place] + found[place + 1]]
    return [BEGIN, *(known[piece] if piece in known else 3 + piece[0] for piece in found)]


@pytest.mark.parametrize(
    "score", [lambda n: -n, lambda n: 0, lambda n: n % 3], ids=["all differ", "equal", "some"]
)
@given(text=TEXTS)
def test_llama2c_merges_the_best_pair_first_and_of_equals_the_leftmost(tmp_path_factory, score, text):
    file = tmp_path_factory.mktemp("scored") / "tokenizer.bin"
    file.write_bytes(tokenizer_bytes(PIECES, score))
    tokenizer = load_tokenizer(file)
    assert tokenizer.encode(text) == merged_one_by_one(tokenizer, text, score)


def test_a_long_text_takes_no_longer_for_each_letter(llama2c_file):
    tokenizer = load_tokenizer(llama2c_file)
    text = "abba ab bab " * 5000
    # Looking at all pairs for each merge would take hours.
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["llama2c_file", "json_file"])
def test_it_comes_back_from_its_folder_and_is_a_models_tokenizer(kind, tmp_path, request):
    made = load_tokenizer_file(request.getfixturevalue(kind))
    config = ModelConfig(vocabulary=made.size + 5, layers=1, width=8, heads=2, length=6)
    native.save(tmp_path / "model", config, initialize(config, jax.random.key(0)), made)
    found = load(tmp_path / "model").tokenizer
    text = "ab a cab"
    assert found.n_vocab == made.size
    assert found.encode(text) == made.encode(text).tolist()
    assert made.encode(text).dtype == np.int32
    assert found.decode(made.encode(text)) == text
    whole = b"".join(found.decode_single_token_bytes(token) for token in found.encode(text)[1:])
    assert whole.decode().strip() == text


def test_what_a_model_reads_with_is_a_vocabulary(llama2c_file, tmp_path):
    assert vocabulary_of(None) is None
    assert vocabulary_of(Tokenizer(Bytes())) == Bytes()
    assert isinstance(vocabulary_of(train_encoding("the cat the cat", 260)), Pieces)
    # A rank file could not say how it cuts a text.
    assert vocabulary_of(byte_encoding()) is None
    file = vocabulary_of(load_tokenizer(llama2c_file))
    assert isinstance(file, TokenizerFile)
    file.save(tmp_path)
    assert (tmp_path / "tokenizer.bin").read_bytes() == llama2c_file.read_bytes()


def test_a_tokenizer_json_is_saved_with_its_model(json_file, tmp_path):
    folder = saved(tmp_path / "one", "llama", vocabulary=400, layers=1)
    (folder / "tokenizer.json").write_bytes(json_file.read_bytes())
    model = load(folder)
    save(tmp_path / "copy", model)
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == json_file.read_bytes()
    assert load(tmp_path / "copy").tokenizer.encode("The cat") == model.tokenizer.encode("The cat")
    save(tmp_path / "ours", Pretrained("minitf", model.config, model.parameters, model.tokenizer))
    assert load(tmp_path / "ours").tokenizer.encode("The cat") == model.tokenizer.encode("The cat")


def test_without_the_package_a_model_has_no_tokenizer_and_a_vocabulary_says_what_is_missing(
    json_file, tmp_path, monkeypatch
):
    made = load_tokenizer_file(json_file)
    config = ModelConfig(vocabulary=made.size, layers=1, width=8, heads=2, length=6)
    native.save(tmp_path / "model", config, initialize(config, jax.random.key(0)), made)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load(tmp_path / "model").tokenizer is None
    with pytest.raises(ValueError, match=r"is run by the package tokenizers: pip install 'minitf\[hub\]'"):
        load_vocabulary(tmp_path / "model")
