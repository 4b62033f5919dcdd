import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.train.symbol_files import (
    fasta_documents,
    source_files,
    text_documents,
    token_documents,
)

few_examples = settings(max_examples=25)


def prose(paragraphs, seed=0):
    words = "the scan is slow and then attention snaps to distinct tokens while common ones fade".split()
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(words, k=30)) for _ in range(paragraphs)) + "\n"


def written(folder, name, content):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (file.write_bytes if isinstance(content, bytes) else file.write_text)(content)
    return file


# --- text


@few_examples
@given(st.text(alphabet="ab \nあ", min_size=1, max_size=400))
def test_documents_of_a_text_one_after_another_are_the_text(tmp_path_factory, content):
    if not content.strip():
        return
    file = written(tmp_path_factory.mktemp("text"), "x.txt", content)
    documents = list(text_documents([file]))
    assert "".join(documents) == content.removesuffix("\n") + "\n" and all(documents)


def test_a_text_is_cut_after_blank_lines_and_a_line_without_end_is_cut_anyway(tmp_path):
    text = written(tmp_path, "text.txt", prose(400))
    documents = list(text_documents([text]))
    assert len(documents) > 50 and all(document.endswith("\n\n") for document in documents[:-1])
    long = written(tmp_path, "long.txt", "x" * 100_000)
    documents = list(text_documents([long]))
    assert "".join(documents) == "x" * 100_000 + "\n" and max(map(len, documents)) <= 4 * 1000 + 1


def test_line_ends_marks_and_wrong_bytes_are_those_of_text(tmp_path):
    file = written(tmp_path, "x.txt", b"\xef\xbb\xbfone\r\ntwo\rthr\xffe and more than ten characters")
    assert "".join(text_documents([file])) == "one\ntwo\nthr\ufffde and more than ten characters\n"


# --- FASTA


def test_a_record_is_a_document_without_its_header(tmp_path):
    file = written(
        tmp_path, "x.fa", "; a comment\n>first one\nACGT\nac gt\n\n>second\n>third, empty before\nMK*-\n"
    )
    assert list(fasta_documents([file])) == ["ACGTACGT\n", "MK*-\n"]


def test_a_long_record_is_cut_and_its_end_is_kept(tmp_path):
    letters = "".join(random.Random(0).choices("ACGT", k=5000))
    for content in (
        f">h {'x' * 3000}\n{letters}\n>second\nAC",
        f"{letters[:2500]}\n{letters[2500:]}\n>second\nAC\n",
    ):
        documents = list(fasta_documents([written(tmp_path, "x.fa", content)]))
        assert [len(document) for document in documents] == [1024, 1024, 1024, 1024, 905, 3]
        assert "".join(documents) == f"{letters}\nAC\n"


def test_what_is_no_sequence_is_named_with_its_line(tmp_path):
    file = written(tmp_path, "x.fa", ">h\nACGT\nAC8T\n")
    with pytest.raises(ValueError, match=r"x\.fa, line 3: 'AC8T' is no sequence of letters"):
        list(fasta_documents([file]))


# --- tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"", r"x\.bin cannot be read: it has 0 bytes"),
        ("x.bin", b"abc", "it has 3 bytes, which are not whole numbers of 2 bytes"),
        ("x.npy", b"not numpy", r"x\.npy cannot be read: it does not begin as a file that numpy\.save writes"),
    ],
)
def test_token_files_that_are_none_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        list(token_documents([written(tmp_path, name, content)], "uint16"))


@pytest.mark.parametrize("array", [np.zeros((2, 3), int), np.ones(4), np.zeros(0, int), np.array([{}, {}])])
def test_arrays_that_are_no_tokens_are_named(tmp_path, array):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy"):
        list(token_documents([tmp_path / "x.npy"], "uint16"))


# --- files


def test_folders_are_searched_and_what_is_no_text_is_passed_over(tmp_path):
    kept = [written(tmp_path, name, "text") for name in ("a.txt", "b/c.md", "b/d/e")]
    passed_over = {".hidden": "x", "b/.git/x": "x", "empty": "", "spaces": " \n", "x.png": b"\0", "f.npy": b"x"}
    for name, content in {**passed_over, "x.tokens": "ab", "x.tokens.json": "{}", "y.bin": "ab"}.items():
        written(tmp_path, name, content)
    found = source_files([str(tmp_path), str(kept[0])])
    assert sorted(found) == sorted(kept)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        ("tokens", ("a.npy", "b/c.bin", "d.tokens")),
        ("csv", ("a.csv", "b/c.TSV", "d.tab")),
        ("fasta", ("a.fa", "b/c.fasta", "d.faa")),
    ],
)
def test_of_a_folder_those_files_are_read_whose_names_are_of_the_format(tmp_path, form, names):
    kept = [written(tmp_path, name, "ab") for name in names]
    for name in ("README.md", "notes.txt", "d.tokens.json", "b/more"):
        written(tmp_path, name, "ab")
    written(tmp_path, f"empty{kept[0].suffix}", "")
    assert sorted(source_files([str(tmp_path)], form)) == sorted(kept)
    # What is named is read, whatever its name.
    assert source_files([str(tmp_path / "README.md")], form) == [tmp_path / "README.md"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=rf"no file of {form}, by its name: .*\{kept[0].suffix}"):
        source_files([str(tmp_path / "other")], form)


def test_what_runs_left_in_folders_of_their_own_is_no_data(tmp_path):
    text = written(tmp_path, "a.txt", "text")
    written(tmp_path, "runs/train/config.json", '{"made_by": "minitf"}')
    written(tmp_path, "runs/train/report.html", "text")
    other = written(tmp_path, "other/config.json", '["made_by"]')
    assert sorted(source_files([str(tmp_path)])) == [text, other]


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file or folder .*nothing\.txt"):
        source_files([str(tmp_path / "nothing.txt")])
    with pytest.raises(ValueError, match="The folder .*empty holds no file of text"):
        source_files([str(tmp_path / "empty")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        source_files([str(tmp_path / "pipe")])
    for content, message in (
        (b"a\0b", "is binary"),
        (b"\xff\xfea\0", "is UTF-16"),
        (b"\xff" * 9, "not UTF-8"),
        (b" ", "empty"),
    ):
        file = written(tmp_path, "x.txt", content)
        with pytest.raises(ValueError, match=f"x\\.txt .*{message}"):
            list(text_documents([file]))
