import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitf.train.symbol_files import (
    fasta_documents,
    not_a_name,
    not_a_number,
    source_files,
    table_documents,
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


# --- tables

TABLE = 'time,name,temperature,pressure\n1,a,3.5,10\n2,"b, c",-1e2,20\n\n3,a,0.25,30\n'


def test_columns_are_read_by_name_as_texts_symbols_or_numbers(tmp_path):
    files = [written(tmp_path, "x.csv", TABLE)]
    read = lambda columns, check, series: list(table_documents(files, columns, "", check, series=series))
    assert read(["name"], None, False) == ["a\n", "b, c\n", "a\n"]
    assert read(["name", "time"], None, False) == ["a\t1\n", "b, c\t2\n", "a\t3\n"]
    assert "".join(read(["time", "name"], not_a_name, True)) == "1\na\n2\nb, c\n3\na\n"
    assert "".join(read(["temperature", "time"], not_a_number, True)) == "3.5,1\n-1e2,2\n0.25,3\n"


def test_other_delimiters_and_single_columns_are_read(tmp_path):
    tabs = written(tmp_path, "x.tsv", TABLE.replace(",", "\t"))
    semicolons = written(tmp_path, "y.csv", "a;b\n1;2\n")
    single = written(tmp_path, "z.csv", "\ufeffonly\nx\n")
    assert next(table_documents([tabs], ["pressure"], "", None, series=False)) == "10\n"
    assert list(table_documents([semicolons], ["b"], ";", None, series=False)) == ["2\n"]
    assert list(table_documents([single], [], "", None, series=False)) == ["x\n"]


@pytest.mark.parametrize(
    ("content", "columns", "check", "message"),
    [
        (TABLE, ["nane"], None, "has no column 'nane'. Its columns are 'time', 'name'"),
        (TABLE, [], None, "has several columns: say which"),
        (TABLE, ["name"], not_a_number, "line 2: the name 'a' is not a finite number"),
        ("a,b\n1,2\n3\n", ["b"], None, "line 3: there are only 1 cells"),
        ("a,b\n1,nan\n", ["b"], not_a_number, "line 2: the b 'nan' is not a finite number"),
        ("a,b\n1,\n", ["b"], not_a_name, "line 2: the b '' is empty"),
        ("a,b\n1," + "x" * 200_000, ["b"], None, "line 2: this is not a table .field larger"),
    ],
)
def test_what_is_no_table_is_named_with_its_line(tmp_path, content, columns, check, message):
    file = written(tmp_path, "x.csv", content)
    with pytest.raises(ValueError, match=f"x\\.csv.* {message}"):
        list(table_documents([file], columns, "", check, series=False))


# --- tokens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"", r"x\.bin cannot be read: it has 0 bytes"),
        ("x.bin", b"abc", "it has 3 bytes, which are not whole numbers of 2 bytes"),
        ("x.npy", b"not numpy", r"x\.npy cannot be read"),
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
    kept.append(written(tmp_path, "f.npy", b"\0"))
    for name, content in {".hidden": "x", "b/.git/x": "x", "empty": "", "spaces": " \n", "x.png": b"\0"}.items():
        written(tmp_path, name, content)
    found = source_files([str(tmp_path), str(kept[0])])
    assert sorted(found) == sorted(kept)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file or folder .*nothing\.txt"):
        source_files([str(tmp_path / "nothing.txt")])
    with pytest.raises(ValueError, match="The folder .*empty holds no file"):
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
