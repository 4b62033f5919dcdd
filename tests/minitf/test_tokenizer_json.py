import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties.checkpoints import refused, saved

tokenizers = pytest.importorskip("tokenizers", reason="not installed: pip install 'minitf[hub]'")

from properties.tokenizer_files import KINDS  # noqa: E402

from minitf import pretrained  # noqa: E402
from minitf.families.tokenizer_json import JsonTokenizer, byte_level, load_tokenizer  # noqa: E402
from minitf.pretrained import load  # noqa: E402
from minitf.tokenizer import gpt2_encoding, token_labels  # noqa: E402

FAMILY = {"llama3": "llama", "pythia": "gpt_neox", "bert": "bert", "llama2": "llama", "mistral": "mistral"}
BYTE_LEVEL, PIECES = ("llama3", "pythia"), ("llama2", "mistral")
ROWS = 400  # more than any of them has tokens, as published embeddings have
OURS = {kind: JsonTokenizer(peer, ROWS, kind) for kind, peer in KINDS.items()}

words = st.sampled_from(
    ["the cat", " snaps", "größerer", "東京", "    ", "\n\n", "\U0001f600", "[MASK]", "</s>", "12 345"]
)
texts = st.lists(st.one_of(words, st.text(max_size=8))).map("".join)
kinds = pytest.mark.parametrize("kind", KINDS)


def folder_of(kind, path, **changes):
    """A tiny model with the tokenizer beside it."""
    family = FAMILY.get(kind, kind)
    folder = saved(path, family, **{"vocabulary": ROWS, "layers": 1} | changes)
    KINDS[kind].save(str(folder / "tokenizer.json"))
    return folder


@kinds
def test_a_model_of_every_kind_brings_its_tokenizer(kind, tmp_path):
    found = load(folder_of(kind, tmp_path)).tokenizer
    text = "The cat snaps, größer: 東 \U0001f600"
    assert found.encode(text) == KINDS[kind].encode(text).ids
    assert found.decode(found.encode(text)) == KINDS[kind].decode(found.encode(text))
    assert found.n_vocab == KINDS[kind].get_vocab_size()


@kinds
@given(text=texts)
def test_text_has_the_tokens_that_the_package_gives_it(kind, text):
    ids = OURS[kind].encode(text)
    assert ids == KINDS[kind].encode(text).ids
    assert OURS[kind].decode(np.array(ids, np.int32)) == KINDS[kind].decode(ids)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(text=texts)
def test_byte_level_tokens_hold_the_text_exactly(kind, text):
    ids = OURS[kind].encode(text)
    assert OURS[kind].decode(ids) == text
    inner = ids[1:] if kind == "llama3" else ids
    assert b"".join(map(OURS[kind].decode_single_token_bytes, inner)) == text.encode()


@given(text=texts.filter(lambda text: "▁" not in text and "</s>" not in text and "<" not in text))
def test_pieces_hold_the_text_after_one_space(text):
    ids = OURS["llama2"].encode(text)
    assert OURS["llama2"].decode(ids) == text
    assert (
        b"".join(map(OURS["llama2"].decode_single_token_bytes, ids[1:])) == (b" " if text else b"") + text.encode()
    )


@kinds
@given(text=texts)
def test_text_that_comes_token_by_token_only_grows(kind, text):
    ids = OURS[kind].encode(text)
    whole = OURS[kind].decode(ids)
    for count in range(len(ids)):
        begun = OURS[kind].decode(ids[:count])
        # Within a character it ends in U+FFFD, and what is shown waits for the rest.
        assert whole.startswith(begun) or begun.endswith("\ufffd")


def test_what_the_file_adds_to_every_text_is_added_and_not_decoded():
    ends = {kind: (OURS[kind].encode("the cat")[0], OURS[kind].encode("the cat")[-1]) for kind in KINDS}
    name = lambda kind, at: KINDS[kind].id_to_token(ends[kind][at])
    assert name("llama3", 0) == "<|begin_of_text|>" and name("llama2", 0) == name("mistral", 0) == "<s>"
    assert (name("bert", 0), name("bert", 1)) == ("[CLS]", "[SEP]")
    assert name("pythia", 0) == "the" or not KINDS["pythia"].get_added_tokens_decoder()[ends["pythia"][0]].special
    assert all(OURS[kind].decode(OURS[kind].encode("the cat")) == "the cat" for kind in KINDS)


def test_a_special_token_in_the_text_is_that_token():
    mask = KINDS["bert"].token_to_id("[MASK]")
    assert mask in OURS["bert"].encode("the [MASK] sat")
    assert OURS["pythia"].encode("a<|endoftext|>")[-1] == KINDS["pythia"].token_to_id("<|endoftext|>")


@kinds
def test_different_tokens_have_different_labels(kind):
    ids = [token for token in range(OURS[kind].n_vocab) if KINDS[kind].id_to_token(token) is not None]
    labels = token_labels(OURS[kind], ids)
    if kind in PIECES:
        # A single byte and the piece of that one character read the same.
        ids = [token for token in ids if not KINDS[kind].id_to_token(token).startswith("<0x")]
        labels = token_labels(OURS[kind], ids)
    assert len(set(labels)) == len(ids)


def test_labels_are_the_text_of_the_tokens():
    label = lambda kind, name: token_labels(OURS[kind], [KINDS[kind].token_to_id(name)])[0]
    assert label("llama3", "Ġc") == "␣c" and label("llama3", "<|begin_of_text|>") == "<|begin_of_text|>"
    assert label("pythia", "    ") == "␣␣␣␣" and label("pythia", "Ã") == "\\xc3"
    assert (
        label("llama2", "▁cat") == "␣cat"
        and label("llama2", "<0x0A>") == "\\n"
        and label("llama2", "<s>") == "<s>"
    )
    assert label("bert", "[MASK]") == "[MASK]"
    inside = next(name for name in KINDS["bert"].get_vocab() if name.startswith("##"))
    assert label("bert", inside) == inside


def test_pieces_that_a_metaspace_decoder_reads_are_labelled_alike():
    peer = tokenizers.Tokenizer.from_str(KINDS["llama2"].to_str())
    peer.decoder = tokenizers.decoders.Metaspace(replacement="▁", prepend_scheme="first")
    peer.add_special_tokens(["<|first▁of▁all|>"])
    found = JsonTokenizer(peer, ROWS)
    assert token_labels(found, [peer.token_to_id("▁cat")]) == ["␣cat"]
    # The name of a special token is no text.
    assert token_labels(found, [peer.token_to_id("<|first▁of▁all|>")]) == ["<|first▁of▁all|>"]


def test_every_byte_has_a_character_of_its_own():
    characters = [byte_level(bytes([value])) for value in range(256)]
    assert set(characters) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) and len(set(characters)) == 256
    for value, character in enumerate(characters):
        token = KINDS["pythia"].token_to_id(character)
        assert OURS["pythia"].decode_single_token_bytes(token) == bytes([value])


def test_rows_of_the_embedding_without_a_token_are_nothing():
    found = OURS["pythia"]
    ids = found.encode("the cat")
    assert found.decode([*ids, ROWS - 1]) == "the cat"
    with pytest.raises(ValueError, match=f"^there is no token {ROWS}; the model's go from 0 to {ROWS - 1}$"):
        found.decode([ROWS])
    with pytest.raises(ValueError, match="^there is no token -1; "):
        found.decode([-1])
    for token in (ROWS - 1, -1):
        with pytest.raises(ValueError, match=f"^pythia has no token {token}; its ids go from 0 to "):
            found.decode_single_token_bytes(token)
        with pytest.raises(ValueError, match=f"no token {token} in pythia"):
            token_labels(found, [token])


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(ValueError, match="^the text holds a lone surrogate at position 2$"):
        OURS["bert"].encode("ab\ud800")


def test_texts_are_neither_cut_nor_filled_up(tmp_path):
    folder = folder_of("bert", tmp_path)
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer.enable_truncation(4)
    peer.enable_padding(length=4)
    peer.save(str(folder / "tokenizer.json"))
    assert len(load(folder).tokenizer.encode("the cat sat on the mat")) > 4
    assert len(load(folder).tokenizer.encode("the")) == 3


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    most = KINDS["bert"].get_vocab_size()
    assert load(folder_of("bert", tmp_path / "fits", vocabulary=most)).tokenizer.n_vocab == most
    folder = folder_of("bert", tmp_path / "not", vocabulary=most - 1)
    refused(
        f"tokenizer.json has {most} tokens, but the model's embedding has {most - 1}: they do not belong", folder
    )


def test_a_token_that_was_added_later_has_no_embedding(tmp_path):
    folder = folder_of("llama2", tmp_path, vocabulary=KINDS["llama2"].get_vocab_size())
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer.add_special_tokens(["<pad>"])
    peer.save(str(folder / "tokenizer.json"))
    found = load(folder).tokenizer
    assert found.decode(found.encode("the cat")) == "the cat"
    number = KINDS["llama2"].get_vocab_size()
    with pytest.raises(
        ValueError, match=f"^the text has the token '<pad>', number {number}, but the model's embed"
    ):
        found.encode("the <pad>")


@pytest.mark.parametrize("raw", [b"", b"{", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_file_is_refused_by_name(raw, tmp_path):
    folder = folder_of("llama3", tmp_path)
    (folder / "tokenizer.json").write_bytes(raw)
    refused(f"^{folder}/tokenizer.json is no tokenizer that the package tokenizers can read: ", folder)


@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_damage_anywhere_is_a_sentence_or_harmless(place, value, cut, tmp_path_factory):
    raw = bytearray(KINDS["bert"].to_str().encode())
    raw[place % len(raw)] = value
    file = tmp_path_factory.mktemp("damaged") / "tokenizer.json"
    file.write_bytes(raw[: place % len(raw)] if cut else raw)
    try:
        found = load_tokenizer(file, ROWS)
        token_labels(found, found.encode("the cat"))
    except ValueError as error:
        assert "token" in str(error)


@pytest.mark.parametrize(
    ("whole", "spoilt"), [('"[CLS]":{"id"', '"[CLX]":{"id"'), ('"unk_token":"[UNK]"', '"unk_token":"[UNX]"')]
)
def test_a_file_that_names_tokens_it_does_not_have_is_named(whole, spoilt, tmp_path):
    raw = KINDS["bert"].to_str()
    assert raw.count(whole) == 1
    (tmp_path / "tokenizer.json").write_text(raw.replace(whole, spoilt))
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json cannot encode this text: "):
        load_tokenizer(tmp_path / "tokenizer.json", ROWS).encode("😀")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}/tokenizer.json cannot be read: No such file"):
        load_tokenizer(tmp_path / "tokenizer.json", 10)


def test_without_the_package_a_model_has_no_tokenizer(tmp_path, monkeypatch):
    folder = folder_of("llama3", tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert load(folder).tokenizer is None


@pytest.fixture
def gpt2_cache(monkeypatch):
    shared = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
    cache = shared / "data" / "tiktoken_cache"
    if not cache.is_dir():
        pytest.skip(f"GPT-2's tokenizer is not in {cache}; set MINITF_SHARED to the folder above data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))


def gpt2_folder(path, vocabulary):
    """A GPT-2 with a tokenizer.json of these tokens and no merges."""
    folder = saved(path, vocabulary=50257, layers=1)
    peer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.decoder = tokenizers.decoders.ByteLevel()
    peer.save(str(folder / "tokenizer.json"))
    return folder


def test_gpt2s_own_vocabulary_runs_in_tiktoken_and_another_one_in_the_package(tmp_path, gpt2_cache, monkeypatch):
    encoding = gpt2_encoding()
    monkeypatch.setattr(pretrained.tokenizers, "gpt2_encoding", lambda: encoding)  # which takes a second
    vocabulary = {byte_level(encoding.decode_single_token_bytes(token)): token for token in range(50257)}
    own = gpt2_folder(tmp_path / "own", vocabulary)
    assert load(own).tokenizer is encoding
    # As many tokens, in another order: the model of another language.
    names = list(vocabulary)
    names[300], names[301] = names[301], names[300]
    other = gpt2_folder(tmp_path / "other", {name: token for token, name in enumerate(names)})
    found = load(other).tokenizer
    assert isinstance(found, JsonTokenizer)
    assert found.decode_single_token_bytes(300) == encoding.decode_single_token_bytes(301)
    # Without tiktoken's files there is still the file of the model.
    monkeypatch.undo()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    assert isinstance(load(own).tokenizer, JsonTokenizer)
    (own / "tokenizer.json").write_text(json.dumps({"model": 3}))
    refused("is no tokenizer that the package tokenizers can read", own)
