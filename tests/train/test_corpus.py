import hashlib
import http.server
import io
import os
import random
import socket
import threading
import urllib.error
import zipfile
from dataclasses import replace
from email.message import Message
from http.client import IncompleteRead
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitf.train import corpus
from minitf.train.corpus import (
    cut_in_documents,
    download,
    read_paths,
    split_by_document,
)

SHARED = Path(os.environ.get("MINITF_SHARED", Path(__file__).resolve().parents[2] / ".." / "shared"))
SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch):
    connect = socket.socket.connect

    def local(self, address):
        assert address[0] in ("127.0.0.1", "::1"), f"a test tried to reach {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)


def prose(paragraphs, seed=0):
    words = "the scan is slow and then attention snaps to distinct tokens while common ones fade".split()
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(paragraphs))


# --- cutting and splitting


@given(st.text(alphabet="ab \n\t\u3042"), st.integers(1, 50))
def test_the_documents_of_a_text_joined_are_the_text(text, characters):
    documents = cut_in_documents(text, characters)
    assert "".join(documents) == text
    assert all(documents)


def test_a_text_is_cut_at_blank_lines():
    documents = cut_in_documents(prose(400))
    assert len(documents) > 50
    assert all(document.endswith("\n\n") for document in documents[:-1])
    assert all(2000 <= len(document) < 3000 for document in documents[:-1])


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_a_text_without_blank_lines_is_cut_at_line_ends_or_spaces_or_anywhere(separator):
    documents = cut_in_documents(separator.join(["abcdefghij"] * 10_000))
    assert len(documents) > 10
    assert max(map(len, documents)) <= 8000 + 2000
    assert all(document.endswith(separator) for document in documents[:-1])


distinct_texts = st.lists(st.text(alphabet="ab \n", max_size=30), max_size=30)


@given(distinct_texts, st.floats(0.05, 0.45), st.randoms())
def test_every_document_is_on_one_side_and_neither_side_is_empty(documents, share, shuffler):
    texts = [document for document in documents if document.strip()]
    if len(set(texts)) < 2:
        with pytest.raises(ValueError, match=f"^These cannot be split.*it has {len(set(texts))}"):
            split_by_document(documents, "These", share)
        return
    train, validation = split_by_document(documents, "These", share)
    assert train and validation
    assert not set(train) & set(validation)
    assert sorted(train + validation) == sorted(texts)
    assert list(train) == [text for text in texts if text in set(train)]
    shuffled = documents.copy()
    shuffler.shuffle(shuffled)
    assert set(split_by_document(shuffled, "These", share)[1]) == set(validation)


def test_the_validation_side_has_about_its_share_of_the_text():
    documents = [f"{number} " * (10 if number % 5 else 1000) for number in range(1, 500)]
    _, validation = split_by_document(documents, "These", 0.1)
    largest = max(map(len, documents)) / sum(map(len, documents))
    held = sum(map(len, validation)) / sum(map(len, documents))
    assert 0.1 <= held <= 0.1 + largest


@pytest.mark.parametrize("share", [0.0, -0.1, 0.5, 1.0])
def test_a_share_that_leaves_no_training_text_is_refused(share):
    with pytest.raises(ValueError, match=f"share of text for validation is {share}"):
        split_by_document(["a", "b"], "These", share)


# --- files and folders


def test_a_file_is_cut_into_documents_that_hold_all_its_text(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(prose(300))
    found = read_paths([file])
    assert found.name == "book.txt" and str(file) in found.source
    assert sum(map(len, found.train + found.validation)) == len(prose(300))
    assert found == read_paths([str(file)])


def test_in_a_folder_of_many_files_a_file_is_a_document(tmp_path):
    for number in range(12):
        place = tmp_path / f"part{number % 3}"
        place.mkdir(exist_ok=True)
        (place / f"{number:02}.md").write_text(f"document {number}")
    found = read_paths([tmp_path])
    assert set(found.train + found.validation) == {f"document {number}" for number in range(12)}
    # Sorted order: part0 has 0, 3, 6, 9; part1 has 1, 4, ...; and so on.
    expected = [f"document {number}" for part in range(3) for number in range(part, 12, 3)]
    assert list(found.train) == [document for document in expected if document in found.train]


def test_in_a_folder_hidden_empty_and_binary_files_are_passed_over(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden").write_text("hidden")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "book.txt").write_text(prose(100))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = read_paths([tmp_path])
    assert sum(map(len, found.train + found.validation)) == len(prose(100))


def test_a_file_named_twice_is_read_once(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(prose(100))
    found = read_paths([file, tmp_path, file])
    assert sum(map(len, found.train + found.validation)) == len(prose(100))


def test_line_ends_and_byte_order_marks_of_any_system_are_read(tmp_path):
    (tmp_path / "unix.txt").write_bytes(prose(100).encode())
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + prose(100).replace("\n", "\r\n").encode())
    unix, windows = (read_paths([tmp_path / name]) for name in ("unix.txt", "windows.txt"))
    assert (unix.train, unix.validation) == (windows.train, windows.validation)


def test_a_few_wrong_bytes_are_replaced(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(prose(100).replace("slow", "sl\u00f6w").encode("latin-1"))
    found = read_paths([file])
    assert any("sl\ufffdw" in document for document in found.train)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n ", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"text\0text", "is binary"),
        (random.Random(0).randbytes(5000).replace(b"\0", b""), "is not UTF-8 text"),
        ("Привет, мир. ".encode("koi8-r") * 50, "is not UTF-8 text"),
        ("some text".encode("utf-16"), "is UTF-16"),
        (b"x", "cannot be split into training and validation"),
        (b"same\n\n", "cannot be split into training and validation"),
    ],
)
def test_a_file_without_usable_text_is_refused_by_name(tmp_path, content, message):
    file = tmp_path / "odd.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_paths([file])
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=f"no file or folder {tmp_path / 'nothing.txt'}"):
        read_paths([tmp_path / "nothing.txt"])


def test_a_pipe_is_refused_by_name_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"{tmp_path / 'pipe'} is neither a file nor a folder"):
        read_paths([tmp_path / "pipe"])


def test_an_unreadable_file_is_refused_by_name(tmp_path, monkeypatch):
    file = tmp_path / "locked.txt"
    file.write_text(prose(10))

    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", locked)
    for path in (file, tmp_path):
        with pytest.raises(ValueError, match=f"{file} cannot be read: Permission denied"):
            read_paths([path])


def test_an_unreadable_folder_is_refused_by_name(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "book.txt").write_text(prose(100))
    scan = os.scandir

    def scan_unless_locked(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scan_unless_locked)
    with pytest.raises(ValueError, match=f"{tmp_path / 'locked'} cannot be read: Permission denied"):
        read_paths([tmp_path])


def test_a_folder_without_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=f"{tmp_path} holds no text file"):
        read_paths([tmp_path])


def test_no_path_at_all_is_refused():
    with pytest.raises(ValueError, match="No text was named"):
        read_paths([])


# --- corpora by name


TRAIN = "".join(f" \n = Article {n} = \n \n {prose(2, n)} \n \n = = Section = = \n \n More . \n" for n in range(4))
VALIDATION = " \n = Last = \n \n Words . \n"


@pytest.fixture
def wikitext(monkeypatch):
    """The name wikitext-2 with an archive of four articles; gives the archive's bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("wikitext-2/wiki.train.tokens", TRAIN)
        archive.writestr("wikitext-2/wiki.valid.tokens", VALIDATION)
        archive.writestr("wikitext-2/wiki.test.tokens", "not read")
    item = replace(corpus.DOWNLOADS["wikitext-2"], sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    monkeypatch.setitem(corpus.DOWNLOADS, "wikitext-2", item)
    return buffer.getvalue()


def serve(*answers):
    """An opener that gives these answers in turn (bytes, or an error to raise)."""
    left = list(answers)

    def opener(request, timeout):
        assert 0 < timeout < 600
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    return opener


def test_wikitext_has_its_own_sides_and_an_article_is_a_document(wikitext, tmp_path):
    found = download("wikitext-2", cache=tmp_path, opener=serve(wikitext))
    assert "".join(found.train).strip() == TRAIN.strip()
    assert [document.strip().splitlines()[0].strip() for document in found.train] == [
        f"= Article {n} =" for n in range(4)
    ]
    assert "".join(found.validation).strip() == VALIDATION.strip()
    assert "wikitext" in found.source and "CC BY-SA" in found.source


def test_what_was_fetched_is_kept_and_not_fetched_again(wikitext, tmp_path):
    counted = []
    first = download(
        "wikitext-2",
        cache=tmp_path,
        opener=serve(wikitext),
        progress=lambda done, total: counted.append((done, total)),
    )
    assert counted == [(len(wikitext), None)]
    assert len(list(tmp_path.iterdir())) == 1
    assert download("wikitext-2", cache=tmp_path, opener=serve()) == first


def test_a_kept_file_that_was_damaged_is_fetched_again(wikitext, tmp_path):
    first = download("wikitext-2", cache=tmp_path, opener=serve(wikitext))
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(wikitext[:-1])
    assert download("wikitext-2", cache=tmp_path, opener=serve(wikitext)) == first
    assert kept.read_bytes() == wikitext


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"<html>"])
def test_a_file_with_a_wrong_checksum_is_refused_and_not_kept(wikitext, tmp_path, change):
    with pytest.raises(ValueError, match="wikitext-2 from .* has a wrong checksum.*nothing was kept"):
        download("wikitext-2", cache=tmp_path, opener=serve(change(wikitext)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
        urllib.error.HTTPError("http://x", 403, "Forbidden", Message(), None),
        TimeoutError("timed out"),
        ConnectionResetError("reset"),
        IncompleteRead(b"half"),
    ],
)
def test_without_a_network_the_reason_and_a_way_out_are_said(wikitext, tmp_path, error):
    with pytest.raises(
        ValueError, match="wikitext-2 could not be fetched from https://.*where there is a network"
    ):
        download("wikitext-2", cache=tmp_path, opener=serve(error))
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_written_does_not_stop_a_download(wikitext, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert download("wikitext-2", cache=tmp_path / "file" / "cache", opener=serve(wikitext)).train


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'wikitext-3'.*wikitext-2, wikitext-103, tinyshakespeare"):
        download("wikitext-3", opener=serve())


def test_a_real_server_is_read_with_our_own_name_and_the_size_announced(wikitext, tmp_path, monkeypatch):
    names = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            names.append(self.headers["User-Agent"])
            found = self.path == "/wikitext-2-v1.zip"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(wikitext) if found else 0))
            self.end_headers()
            self.wfile.write(wikitext if found else b"")

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        item = replace(corpus.DOWNLOADS["wikitext-2"], address=f"{address}/wikitext-2-v1.zip")
        monkeypatch.setitem(corpus.DOWNLOADS, "wikitext-2", item)
        counted = []
        assert download("wikitext-2", cache=tmp_path, progress=lambda *count: counted.append(count)).train
        monkeypatch.setitem(
            corpus.DOWNLOADS, "wikitext-2", replace(item, address=f"{address}/gone.zip", sha256="0")
        )
        with pytest.raises(ValueError, match="gone.zip: 404 Not Found"):
            download("wikitext-2", cache=tmp_path)
        server.shutdown()
    assert counted[-1] == (len(wikitext), len(wikitext))
    assert names == ["minitf", "minitf"]


def test_every_address_is_encrypted_and_has_a_whole_checksum():
    for item in corpus.DOWNLOADS.values():
        assert item.address.startswith("https://")
        assert len(bytes.fromhex(item.sha256)) == 32


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason=f"TinyShakespeare is not at {SHAKESPEARE}")
def test_the_true_tinyshakespeare_passes_its_checksum(tmp_path):
    found = download("tinyshakespeare", cache=tmp_path, opener=serve(SHAKESPEARE.read_bytes()))
    assert sum(map(len, found.train + found.validation)) == 1_115_394
    assert any("First Citizen" in document for document in found.train + found.validation)
