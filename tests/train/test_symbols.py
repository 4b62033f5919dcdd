import json
import os
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from properties.llama2c_files import tokenizer_bytes

from minitf.train.data_settings import DataSettings
from minitf.train.example_loader import Examples
from minitf.train.symbol_files import text_documents, token_documents
from minitf.train.symbols import on_validation_side, prepare
from minitf.train.token_file import write_tokens
from minitf.vocabulary import Bytes, Characters, Labelled, Measured, load_vocabulary

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
REAL = [SHARED / "data" / name for name in ("wikitext2/valid.txt", "tinyshakespeare/input.txt")]


def prose(paragraphs, seed=0):
    words = "the scan is slow and then attention snaps to distinct tokens while common ones fade".split()
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(words, k=30)) for _ in range(paragraphs)) + "\n"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(prose(400))
    return file


def written(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.write_bytes if isinstance(content, bytes) else file.write_text)(content)
    return file


def both_sides(data):
    return data.vocabulary.decode(data.train.ids), data.vocabulary.decode(data.validation.ids)


# --- every format


def test_a_large_text_is_never_in_memory(tmp_path):
    file = tmp_path / "large.txt"
    with open(file, "w") as opened:
        opened.writelines([prose(50, seed) for seed in range(32)] * 8)
    assert file.stat().st_size > 2_000_000
    tracemalloc.start()
    data = prepare(DataSettings(paths=(str(file),)), tmp_path / "data")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) + len(data.validation) == file.stat().st_size
    # What is read at a time: 256 KiB (and the one before) for the check of what was written, else less.
    assert most < file.stat().st_size / 2


def test_dna_is_prepared_as_characters(tmp_path):
    draw = random.Random(1)
    records = ["".join(draw.choices("acgt", k=50)) for _ in range(100)]
    file = written(tmp_path, "x.fa", "".join(f">r{n}\n{record}\n" for n, record in enumerate(records)))
    data = prepare(DataSettings(format="fasta", paths=(str(file),)), tmp_path / "data")
    assert data.vocabulary == Characters("\nACGT")
    train, validation = both_sides(data)
    assert sorted((train + validation).split()) == sorted(record.upper() for record in records)


def test_a_series_is_cut_in_bins_that_are_about_equally_full(tmp_path):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.normal(size=5000), rng.exponential(size=5000)], axis=1)
    file = written(tmp_path, "x.csv", "x,y\n" + "".join(f"{x!r},{y!r}\n" for x, y in rows.tolist()))
    settings = DataSettings(format="csv", paths=(str(file),), columns=("x", "y"), bins=8)
    data = prepare(settings, tmp_path / "data")
    ids = np.concatenate([data.train.ids, data.validation.ids]).reshape(-1, 2)
    assert len(ids) == 5000 and data.vocabulary.size == 16
    counts = np.bincount(ids[:, 0]), np.bincount(ids[:, 1])[8:]
    # Limits are quantiles of the training part; the 10 % of validation differ by 5 standard deviations at most.
    for count in counts:
        assert len(count) == 8 and np.abs(count - 625).max() < 1 + 5 * np.sqrt(625 * 0.2)
    rounded = np.array([line.split(",") for line in both_sides(data)[0].split()], float)
    limits = np.array([[-np.inf, *edges, np.inf] for edges in data.vocabulary.edges])
    train = np.asarray(data.train.ids).reshape(-1, 2) - [0, 8]
    for column in range(2):
        low, high = limits[column][train[:, column]], limits[column][train[:, column] + 1]
        # A center is written with six digits.
        assert np.all((low - 1e-5 <= rounded[:, column]) & (rounded[:, column] <= high + 1e-5))


def test_a_column_of_symbols_is_one_token_a_cell(tmp_path):
    draw = random.Random(2)
    cells = draw.choices(["up", "down", "stay put"], k=900)
    file = written(tmp_path, "x.csv", "move\n" + "\n".join(cells) + "\n")
    settings = DataSettings(format="csv", paths=(str(file),), encoding="symbols")
    data = prepare(settings, tmp_path / "data")
    assert data.vocabulary.names == ("down", "stay put", "up")
    train, validation = (side.splitlines() for side in both_sides(data))
    assert sorted(train + validation) == sorted(cells) and len(data.train) == len(train)


@pytest.mark.parametrize(("written_as", "read_as"), [("uint16", "uint32"), ("uint32", "uint16")])
def test_tokens_of_another_size_are_told(tmp_path, written_as, read_as):
    ids = np.random.default_rng(0).integers(0, 5000, 20_000).astype(written_as)
    (tmp_path / "x.bin").write_bytes(ids.tobytes())
    files = {"format": "tokens", "paths": (str(tmp_path / "x.bin"),)}
    with pytest.raises(ValueError, match=f"x.bin cannot be read: .*choose data.raw={written_as}"):
        prepare(DataSettings(**files, raw=read_as), tmp_path / "data")
    assert prepare(DataSettings(**files, raw=written_as), tmp_path / "data").vocabulary.size == ids.max() + 1


@pytest.mark.parametrize(
    ("token", "settings", "told"),
    [
        (-5, {}, "x.npy has the token -5; tokens are counted from 0"),
        (70, {"vocabulary": 64}, "x.npy has the token 70; the vocabulary is 64, counted from 0"),
        (2**40, {}, "x.npy has the token 1099511627776; tokens are below 2147483648"),
    ],
)
def test_a_token_that_cannot_be_is_told_with_its_file(tmp_path, token, settings, told):
    np.save(tmp_path / "x.npy", np.array([*range(50), token, *range(50)]))
    settings = DataSettings(format="tokens", paths=(str(tmp_path / "x.npy"),), **settings)
    with pytest.raises(ValueError, match=told):
        prepare(settings, tmp_path / "data")


@pytest.mark.parametrize("kind", ["npy", "bin", "own"])
def test_token_files_of_every_kind_are_read(tmp_path, kind):
    ids = np.random.default_rng(3).integers(0, 500, 9000)
    file = tmp_path / f"x.{kind}"
    if kind == "npy":
        np.save(file, ids)
    elif kind == "bin":
        ids.astype("<u4").tofile(file)
    else:
        write_tokens(file, [ids], vocabulary=500)
    assert np.array_equal(np.concatenate(list(token_documents([file], "uint32"))), ids)
    settings = DataSettings(format="tokens", paths=(str(file),), raw="uint32")
    data = prepare(settings, tmp_path / "data")
    assert data.vocabulary.size == ids.max() + 1
    assert np.array_equal(np.sort(np.concatenate([data.train.ids, data.validation.ids])), np.sort(ids))
    with pytest.raises(ValueError, match="x[.].* has the token .* the vocabulary is 10"):
        prepare(replace(settings, vocabulary=10), tmp_path / "other")


# --- the split


def test_every_document_is_on_one_side_whatever_else_there_is(text, tmp_path):
    data = prepare(DataSettings(paths=(str(text),), validation=0.3), tmp_path / "data")
    documents = list(text_documents([text]))
    train, validation = both_sides(data)
    assert validation == "".join(document for document in documents if on_validation_side(document, 0.3))
    assert train == "".join(document for document in documents if not on_validation_side(document, 0.3))


def test_about_the_share_is_for_validation():
    found = sum(on_validation_side(f"document {n}", 0.2) for n in range(5000))
    # Binomial: standard deviation 28.3; five of those are allowed.
    assert abs(found - 1000) < 5 * 28.3
    assert on_validation_side(np.arange(5), 0.2) == on_validation_side(np.arange(5, dtype=np.uint16), 0.2)


def test_a_source_with_one_document_only_cannot_be_split_and_leaves_nothing(tmp_path):
    file = written(tmp_path, "x.fa", ">h\nACGT\n")
    settings = DataSettings(format="fasta", paths=(str(file),))
    with pytest.raises(ValueError, match=r"share of 0.1 .* no document is for (validation|training)"):
        prepare(settings, tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.tokens*"))


# --- prepared folders


def test_a_prepared_folder_is_used_again_and_made_anew_when_anything_differs(text, tmp_path):
    folder = tmp_path / "data"
    settings = DataSettings(paths=(str(text),))
    first = prepare(settings, folder)
    inode = lambda: (folder / "train.tokens").stat().st_ino
    before = inode()
    assert prepare(settings, folder).identity == first.identity and inode() == before
    other = prepare(replace(settings, encoding="characters"), folder)
    assert inode() != before and other.identity != first.identity
    assert prepare(settings, folder).identity == first.identity
    text.write_text(prose(400, seed=1))
    assert prepare(settings, folder).identity != first.identity


def test_data_outlives_the_files_that_it_was_made_of(text, tmp_path):
    settings, said = DataSettings(paths=(str(text),)), []
    made = prepare(settings, tmp_path / "data")
    text.rename(tmp_path / "elsewhere.txt")
    kept = prepare(settings, tmp_path / "data", said.append)
    assert (kept.identity, kept.source) == (made.identity, made.source)
    assert "There is no file or folder" in said[0] and "is used" in said[0]
    with pytest.raises(ValueError, match="There is no file or folder"):
        prepare(DataSettings(paths=(str(text),), validation=0.2), tmp_path / "data")
    # As it was made before there was one of the settings.
    told = json.loads((tmp_path / "data" / "data.json").read_text())
    del told["recipe"]["settings"]["quotes"]
    (tmp_path / "data" / "data.json").write_text(json.dumps(told))
    assert prepare(settings, tmp_path / "data", said.append).identity == made.identity
    (tmp_path / "data" / "train.tokens").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="There is no file or folder"):
        prepare(settings, tmp_path / "data", said.append)


def test_what_a_killed_process_left_half_written_is_removed(text, tmp_path):
    left = tmp_path / "data" / ".making" / ".train.tokens.0123abc"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    prepare(DataSettings(paths=(str(text),)), tmp_path / "data")
    assert not left.parent.exists()


def test_what_is_there_stays_where_what_was_made_anew_may_not_take_its_place(text, tmp_path):
    settings, folder = DataSettings(paths=(str(text),)), tmp_path / "data"
    prepare(settings, folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    text.write_text(prose(400, seed=1))

    def refuse(identity):
        raise ValueError(f"not {len(identity['data_sha256'])}")

    with pytest.raises(ValueError, match="not 16"):
        prepare(settings, folder, check=refuse)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_the_same_symbols_have_the_same_identity_wherever_they_lie(text, tmp_path):
    moved = written(tmp_path, "elsewhere/other.txt", text.read_text())
    one, two = (prepare(DataSettings(paths=(str(file),)), tmp_path / f"of {file.name}") for file in (text, moved))
    assert one.identity == two.identity and one.source != two.source


@pytest.mark.parametrize("name", ["train.tokens", "validation.tokens.json", "vocabulary.json", "data.json"])
def test_what_was_damaged_is_made_anew_and_said(text, tmp_path, name):
    folder = tmp_path / "data"
    settings = DataSettings(paths=(str(text),), encoding="characters")
    first = prepare(settings, folder)
    sides = both_sides(first)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-3] + b"?" + content[-2:])
    said = []
    again = prepare(settings, folder, said.append)
    assert again.identity == first.identity and both_sides(again) == sides
    assert any("made anew" in sentence for sentence in said)


def test_what_takes_long_is_said(text, tmp_path, monkeypatch):
    monkeypatch.setattr("minitf.train.symbols.CHARACTERS_BETWEEN_SENTENCES", 20_000)
    said = []
    prepare(DataSettings(paths=(str(text),), encoding="characters"), tmp_path / "data", said.append)
    assert any(s.startswith("Finding the characters") for s in said) and any(
        s.startswith("Encoding") for s in said
    )


def test_no_file_is_the_documentation_of_this_python(tmp_path):
    data = prepare(DataSettings(), tmp_path / "data")
    assert isinstance(data.vocabulary, Bytes) and "the documentation of" in data.source
    assert len(data.train) > 4 * len(data.validation) > 0


@pytest.mark.parametrize("encoding", ["bytes", "characters", "bpe"])
@pytest.mark.parametrize("file", REAL, ids=lambda file: file.parent.name)
def test_real_text_comes_back_from_its_tokens(tmp_path, file, encoding):
    if not file.is_file():
        pytest.skip(f"the shared text {file.name} is not here (MINITF_SHARED)")
    vocabulary = 300 if encoding == "bpe" else 0
    settings = DataSettings(paths=(str(file),), encoding=encoding, vocabulary=vocabulary)
    data = prepare(settings, tmp_path)
    train, validation = both_sides(data)
    content = file.read_text("utf-8")
    assert sorted(train + validation) == sorted(content.removesuffix("\n") + "\n")
    assert train[:1000] in content and validation[:1000] in content
    assert 0.07 < len(validation) / len(content) < 0.13
    again = load_vocabulary(tmp_path)
    assert np.array_equal(again.encode(train[:5000]), data.vocabulary.encode(train[:5000]))


def test_gpt2s_encoding_is_kept_with_the_data(text, tmp_path, monkeypatch):
    if not (SHARED / "data" / "tiktoken_cache").is_dir():
        pytest.skip("GPT-2's tokenizer is not here (MINITF_SHARED)")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "data" / "tiktoken_cache"))
    data = prepare(DataSettings(paths=(str(text),), encoding="gpt2"), tmp_path / "data")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    again = load_vocabulary(tmp_path / "data")
    assert data.vocabulary.size == again.size == 50_257
    assert again.decode(data.validation.ids) == both_sides(data)[1]


def test_a_rank_file_and_the_folder_of_a_vocabulary_are_encodings(text, tmp_path):
    data = prepare(DataSettings(paths=(str(text),), encoding="bpe", vocabulary=280), tmp_path / "data")
    assert data.vocabulary.size == 280
    for encoding in (tmp_path / "data" / "vocabulary.ranks", tmp_path / "data"):
        again = prepare(DataSettings(paths=(str(text),), encoding=str(encoding)), tmp_path / "again")
        assert np.array_equal(again.train.ids, data.train.ids)


def test_tokenizers_of_other_programs_are_encodings(text, tmp_path):
    (tmp_path / "tok.bin").write_bytes(tokenizer_bytes([b" ", b"a", b"th", b"the", b" the"]))
    data = prepare(DataSettings(paths=(str(text),), encoding=str(tmp_path / "tok.bin")), tmp_path / "data")
    assert data.vocabulary.size == 264 and 261 < data.train.ids.max() <= 263
    # A document begins with token 1, and its text as if after a space.
    begins = np.flatnonzero(np.asarray(data.validation.ids) == 1)
    documents = [data.vocabulary.decode(ids) for ids in np.split(data.validation.ids, begins[1:])]
    assert "".join(documents) == both_sides(prepare(DataSettings(paths=(str(text),)), tmp_path / "bytes"))[1]
    again = load_vocabulary(tmp_path / "data")
    assert np.array_equal(again.encode("the cat"), data.vocabulary.encode("the cat"))


def test_the_tokenizer_json_of_a_model_is_an_encoding(text, tmp_path):
    pytest.importorskip("tokenizers", reason="not installed: pip install 'minitf[hub]'")
    from properties.tokenizer_files import KINDS

    KINDS["pythia"].save(str(tmp_path / "tokenizer.json"))
    for encoding in (tmp_path, tmp_path / "tokenizer.json"):
        data = prepare(DataSettings(paths=(str(text),), encoding=str(encoding)), tmp_path / "data")
        whole = data.vocabulary.decode(data.train.ids)
        assert KINDS["pythia"].encode(whole).ids[:100] == data.train.ids[:100].tolist()
    assert data.vocabulary.size == KINDS["pythia"].get_vocab_size()


def test_too_many_characters_and_unknown_encodings_are_refused(tmp_path):
    file = written(tmp_path, "x.txt", "".join(map(chr, range(0x4E00, 0x4E00 + 5000))))
    with pytest.raises(ValueError, match="more than 4096 different characters: use the encoding bytes or bpe"):
        prepare(DataSettings(paths=(str(file),), encoding="characters"), tmp_path / "data")
    with pytest.raises(ValueError, match="encoding is 'byte', which is neither bytes, characters"):
        prepare(DataSettings(paths=(str(file),), encoding="byte"), tmp_path / "data")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "csv"}, "paths is empty; name the files of the format csv"),
        ({"validation": 0.0}, "validation is 0.0; it must be above 0"),
        ({"validation": 0.5}, "validation is 0.5"),
        ({"bins": 1, "format": "csv", "paths": ("x",)}, "bins is 1; it must be from 2 to 65536, or 0"),
        ({"bins": 4}, "bins is 4, which only csv has, not text"),
        ({"columns": ("a",)}, "columns is .*, which only csv has"),
        ({"columns": ("a", "b", "a"), "format": "csv", "paths": ("x",)}, "columns has 'a' more than once"),
        ({"delimiter": ";;", "format": "csv", "paths": ("x",)}, "delimiter is ';;'; it must be a single"),
        ({"vocabulary": -1}, "vocabulary is -1"),
        ({"vocabulary": 9}, "vocabulary is 9, which only the encoding bpe and the format tokens have"),
        ({"encoding": "symbols"}, "encoding is 'symbols', which only csv has"),
        ({"encoding": "bytes", "format": "tokens", "paths": ("x",)}, "tokens are encoded already"),
        ({"encoding": "bytes", "bins": 4, "format": "csv", "paths": ("x",)}, "with bins, numbers are encoded"),
    ],
)
def test_settings_that_say_nothing_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        DataSettings(**values)


def test_a_format_that_there_is_not_is_refused():
    chosen = DataSettings()
    # Checked types would refuse it as an argument.
    object.__setattr__(chosen, "format", "json")
    with pytest.raises(ValueError, match="format is 'json'; it must be one of text, fasta, csv, tokens"):
        chosen.__post_init__()


def test_settings_are_plain_enough_for_a_table():
    lists = {"paths": [], "columns": [], "validation_paths": []}
    assert json.loads(json.dumps(vars(DataSettings()))) == vars(DataSettings()) | lists


# --- files for validation, and labels


def test_files_for_validation_are_all_of_it(text, tmp_path):
    other = written(tmp_path, "other.txt", "quite another text\n" * 30)
    settings = DataSettings(paths=(str(text),), validation_paths=(str(other),), encoding="characters")
    train, validation = both_sides(prepare(settings, tmp_path / "data"))
    assert train == text.read_text()
    assert validation == other.read_text()
    other.write_text("changed\n" * 30)
    assert both_sides(prepare(settings, tmp_path / "data"))[1] == "changed\n" * 30
    with pytest.raises(ValueError, match="paths is empty"):
        DataSettings(validation_paths=(str(other),))


def test_a_file_for_validation_is_not_trained_on_where_its_folder_is_given(tmp_path):
    for name in ("train", "valid"):
        written(tmp_path, f"texts/{name}.txt", f"{name} " * 30)
    valid, said = str(tmp_path / "texts" / "valid.txt"), []
    settings = DataSettings(paths=(str(tmp_path / "texts"),), validation_paths=(valid,))
    train, validation = both_sides(prepare(settings, tmp_path / "data", said.append))
    assert "valid" not in train and "valid" in validation
    assert said == ["1 of the files of data.paths are for validation, and are not trained on"]
    with pytest.raises(ValueError, match="there is none to train on"):
        prepare(DataSettings(paths=(valid,), validation_paths=(valid,)), tmp_path / "other")


@pytest.mark.parametrize(
    ("name", "content", "settings", "what"),
    [
        ("x.csv", "text,label\n", {"format": "csv", "columns": ("text",), "label": "label"}, "row"),
        ("x.csv", "text,label\n", {"format": "csv", "columns": ("text",)}, "row"),
        ("x.fa", ">a\n>b\n", {"format": "fasta"}, "sequence"),
    ],
)
def test_files_with_nothing_in_them_are_told(tmp_path, name, content, settings, what):
    file = written(tmp_path, name, content)
    with pytest.raises(ValueError, match=rf"there is nothing in .*{name}: no {what}"):
        prepare(DataSettings(paths=(str(file),), **settings), tmp_path / "data")


def table(folder, rows, name="table.csv"):
    return written(folder, name, "".join(",".join(map(str, row)) + "\n" for row in rows))


def test_rows_of_a_table_have_labels(tmp_path):
    rows = [("ACGT"[: 1 + n % 4] * (1 + n % 3), ("even", "odd")[n % 2], n) for n in range(200)]
    file = table(tmp_path, [("dna", "kind", "n"), *rows])
    settings = DataSettings(format="csv", paths=(str(file),), columns=("dna",), label="kind", validation=0.3)
    data = prepare(settings, tmp_path / "data")
    assert data.vocabulary == Labelled(Characters("ACGT"), ("even", "odd"))
    assert load_vocabulary(tmp_path / "data") == data.vocabulary
    found = []
    for tokens in (data.train, data.validation):
        examples = Examples(tokens.ids, first_label=4, length=20, filler=6)
        for row in examples.rows(np.arange(len(examples))):
            found.append(data.vocabulary.decode(row[row != 6]))
    assert sorted(found) == sorted(f"{sequence}[{kind}]" for sequence, kind, _ in rows)


def test_numbers_and_symbols_have_labels_too(tmp_path):
    rows = [(n % 7, n % 5, "xyz"[n % 3]) for n in range(300)]
    file = table(tmp_path, [("a", "b", "c"), *rows])
    base = DataSettings(format="csv", paths=(str(file),), columns=("a", "b"), label="c")
    binned = prepare(replace(base, bins=3), tmp_path / "bins")
    assert len(binned.train) % 3 == 0
    named = prepare(replace(base, encoding="symbols"), tmp_path / "symbols")
    assert named.vocabulary.decode(named.train.ids[:3]).replace("\n", " ") in {
        f"{a} {b} [{c}]" for a, b, c in rows
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("s", "k"), *[("AC", "same")] * 30], "every row has the k 'same': there is nothing to tell"),
        ([("s", "k"), ("AC", "x"), ("AC", "")], r"line 3: the k '' is empty"),
        ([("s", "l"), ("AC", "x")], "has no column 'k'"),
    ],
)
def test_labels_that_say_nothing_are_told(tmp_path, rows, message):
    settings = DataSettings(format="csv", paths=(str(table(tmp_path, rows)),), columns=("s",), label="k")
    with pytest.raises(ValueError, match=message):
        prepare(settings, tmp_path / "data")


NUMBERED = [("ACGT"[: 1 + n % 4] * (1 + n % 3), n % 10 / 4 - 1) for n in range(200)]


def test_rows_of_a_table_have_numbers(tmp_path):
    file = table(tmp_path, [("dna", "speed"), *NUMBERED])
    settings = DataSettings(format="csv", paths=(str(file),), columns=("dna",), target="speed", validation=0.3)
    data = prepare(settings, tmp_path / "data")
    found = []
    for side, tokens in (("train", data.train), ("validation", data.validation)):
        examples = Examples(tokens.ids, 4, 20, 4, data.vocabulary.told(data.numbers[side]))
        rows = examples.rows(np.arange(len(examples)))
        told = data.vocabulary.number(rows[:, -1].view(np.float32).astype(np.float64))
        found += zip([data.vocabulary.decode(row[:-1][row[:-1] != 4]) for row in rows], told, strict=True)
    assert [sequence for sequence, _ in sorted(found)] == [sequence for sequence, _ in sorted(NUMBERED)]
    np.testing.assert_allclose([n for _, n in sorted(found)], [n for _, n in sorted(NUMBERED)], atol=1e-6)
    assert data.vocabulary.inner == Characters("ACGT") and data.vocabulary.name == "speed"
    told = data.vocabulary.told(data.numbers["train"])
    np.testing.assert_allclose([told.mean(), told.std()], [0, 1], atol=1e-6)
    # Kept, and known as others when the numbers alone change.
    assert prepare(settings, tmp_path / "data").identity == data.identity
    table(tmp_path, [("dna", "speed"), *[(sequence, 2 * number) for sequence, number in NUMBERED]])
    again = prepare(settings, tmp_path / "data")
    np.testing.assert_array_equal(again.train.ids, data.train.ids)
    assert again.identity != data.identity
    plain = prepare(replace(settings, target=""), tmp_path / "data")
    assert plain.numbers == {} and plain.vocabulary.size == 5  # letters, and the end of a row


def test_damaged_numbers_are_made_anew(tmp_path):
    file = table(tmp_path, [("dna", "speed"), *NUMBERED])
    settings = DataSettings(format="csv", paths=(str(file),), columns=("dna",), target="speed", validation=0.3)
    data = prepare(settings, tmp_path / "data")
    kept = (tmp_path / "data" / "train.numbers").read_bytes()
    (tmp_path / "data" / "train.numbers").write_bytes(kept[:-8])
    said = []
    again = prepare(settings, tmp_path / "data", said.append)
    assert again.identity == data.identity and "made anew" in said[0]
    assert (tmp_path / "data" / "train.numbers").read_bytes() == kept


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([1.5] * 30, "every row has the n 1.5: there is nothing to tell"),
        ([1, 2, "x", *[3] * 30], "line 4: the n 'x' is not a finite number"),
        ([1, 2, "nan", *[3] * 30], "line 4: the n 'nan' is not a finite number"),
        ([1e300, -1e300] * 30, r"the n goes up to 1e\+300: its deviation is no number"),
    ],
)
def test_numbers_that_say_nothing_are_told(tmp_path, cells, message):
    rows = [("s", "n"), *[("A" * (1 + i % 7), cell) for i, cell in enumerate(cells)]]
    settings = DataSettings(format="csv", paths=(str(table(tmp_path, rows)),), columns=("s",), target="n")
    with pytest.raises(ValueError, match=message):
        prepare(settings, tmp_path / "data")


def test_one_thing_is_told_and_it_is_not_shown():
    base = DataSettings(format="csv", paths=("x.csv",), columns=("s",))
    with pytest.raises(ValueError, match="a run learns to tell one"):
        replace(base, label="a", target="b")
    for name in ("label", "target"):
        with pytest.raises(ValueError, match=f"{name} is 's', which is in columns too"):
            replace(base, **{name: "s"})
        with pytest.raises(ValueError, match=f"{name} is 'b'; say in columns"):
            replace(base, columns=(), **{name: "b"})
        with pytest.raises(ValueError, match=f"{name} is 'b', which only csv has"):
            DataSettings(**{name: "b"})


def test_a_vocabulary_with_numbers_goes_on_with_them_or_without(tmp_path):
    file = table(tmp_path, [("dna", "speed", "kind"), *[(*row, "ab"[n % 2]) for n, row in enumerate(NUMBERED)]])
    settings = DataSettings(format="csv", paths=(str(file),), columns=("dna",), target="speed", validation=0.3)
    first = prepare(settings, tmp_path / "first").vocabulary
    Measured(first.inner, "speed", 7.0, 2.0).save(tmp_path / "known")
    on = lambda **changed: prepare(replace(settings, **changed), tmp_path / "on", vocabulary=tmp_path / "known")
    assert on().vocabulary.mean == 7.0
    assert on(target="", label="kind").vocabulary == Labelled(first.inner, ("a", "b"))
