"""Text to train on: any files, the documentation that every Python carries, or a known corpus by name.

A corpus is documents, each wholly on one side of the split into training and validation. Nothing is fetched
from a network unless `download` is called with a name.
"""

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import stat
import sysconfig
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from minitf.files import settings_of_run, write_atomically
from minitf.train.documentation import documentation_texts

VALIDATION_SHARE = 0.1
# Fewer files than this make too coarse a split for "a file is a document": then every file is cut.
FILES_FOR_A_SPLIT = 10
DOCUMENT_CHARACTERS = 2000
UNDECODABLE_SHARE = 0.1
# To be raised when documentation.py changes, so that no older text is read back.
DOCUMENTATION_FORMAT = 2
DOCUMENTATION_MINIMUM = 50_000
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Corpus:
    """Documents for training and for validation, and one sentence on where they come from."""

    name: str
    train: tuple[str, ...]
    validation: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Download:
    """A corpus that can be had by name. `train` and `validation` are members of a zip; None: the file is the
    text.
    """

    address: str
    sha256: str
    license: str
    train: str | None = None
    validation: str | None = None


DOWNLOADS = {
    "wikitext-2": Download(
        address="https://wikitext.smerity.com/wikitext-2-v1.zip",
        sha256="92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        license="CC BY-SA 3.0, from Wikipedia (Merity et al. 2016)",
        train="wikitext-2/wiki.train.tokens",
        validation="wikitext-2/wiki.valid.tokens",
    ),
    "wikitext-103": Download(
        address="https://wikitext.smerity.com/wikitext-103-v1.zip",
        sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        license="CC BY-SA 3.0, from Wikipedia (Merity et al. 2016)",
        train="wikitext-103/wiki.train.tokens",
        validation="wikitext-103/wiki.valid.tokens",
    ),
    "tinyshakespeare": Download(
        address="https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        license="public domain (Shakespeare)",
    ),
}


def identity(texts: Corpus) -> dict[str, str]:
    """What a text is, so that no run goes on with another one under the same name."""
    digest = hashlib.sha256(json.dumps([texts.train, texts.validation]).encode()).hexdigest()
    return {"text_source": texts.source, "text_sha256": digest[:16]}


def read_paths(paths: Iterable[str | os.PathLike[str]]) -> Corpus:
    """A corpus of the given files and folders. Folders are searched all the way down, in sorted order.

    In a folder, hidden, empty and binary files are passed over; a file named by itself must be text. With ten
    files or more a file is a document; fewer are cut at blank lines into documents of some 2000 characters.
    The text is UTF-8 (a few wrong bytes are replaced by U+FFFD); line ends become "\\n".

    Raises ValueError naming the path: missing, unreadable, empty, binary, too little for two documents.
    """
    given = [Path(path) for path in paths]
    if not given:
        raise ValueError("No text was named: give at least one file or folder.")
    texts: dict[Path, str] = {}
    for path in given:
        found = dict(_texts_in_folder(path) if path.is_dir() else [(path, _read_text(path))])
        if not found:
            raise ValueError(f"The folder {path} holds no text file (hidden, empty and binary ones do not count).")
        texts |= {file.resolve(): text for file, text in found.items()}
    if len(texts) >= FILES_FOR_A_SPLIT:
        documents = list(texts.values())
    else:
        documents = [document for text in texts.values() for document in cut_in_documents(text)]
    named = ", ".join(map(str, given))
    train, validation = split_by_document(documents, f"The text in {named}")
    characters = sum(map(len, texts.values()))
    count = f"{len(texts)} file{'s' if len(texts) > 1 else ''}"
    return Corpus(given[0].name or str(given[0]), train, validation, f"{named} ({count}, {characters} characters)")


def python_documentation(cache: Path | None = None) -> Corpus:
    """The documentation inside every Python: its language reference and the docstrings of its library.

    About 2 MB of English prose about Python (see documentation.py). Modules are parsed, never imported, so
    nothing runs; tests and installed packages are left out; paragraphs that stand twice are kept once. What
    this Python lacks (some distributions strip sources) is left out. The result is kept in the folder `cache`
    (default: `cache_folder()`), by Python version.

    Raises ValueError when less than 50 000 characters are found.
    """
    library = Path(sysconfig.get_path("stdlib"))
    folder = cache or cache_folder()
    # Two Pythons of one version may differ: one may come without its sources.
    place = hashlib.sha256(str(library).encode()).hexdigest()[:12]
    version = f"{platform.python_implementation().lower()}-{platform.python_version()}"
    cached = folder and folder / f"documentation-{version}-{place}-{DOCUMENTATION_FORMAT}.json"
    documents = _read_cached_documents(cached) if cached else None
    if documents is None:
        documents = list(documentation_texts(library))
        characters = sum(map(len, documents))
        if characters < DOCUMENTATION_MINIMUM:
            raise ValueError(
                f"This Python's own documentation, the default text, has only {characters} characters here "
                f"(at least {DOCUMENTATION_MINIMUM} are needed; {library} seems to be stripped): name a text."
            )
        if cached:
            _keep(cached, json.dumps({"documents": documents, "sha256": _digest(documents)}).encode())
    train, validation = split_by_document(documents, "This Python's documentation")
    source = f"the documentation of {platform.python_implementation()} {platform.python_version()}"
    return Corpus("python-documentation", train, validation, source)


def download(
    name: str,
    *,
    cache: Path | None = None,
    opener: Callable[..., Any] = urllib.request.urlopen,
    progress: Callable[[int, int | None], None] | None = None,
) -> Corpus:
    """A known corpus by name, fetched once and then kept: "wikitext-2", "wikitext-103", "tinyshakespeare".

    WikiText (Merity et al. 2016) comes as published, cut in words, rare ones as <unk>; a document is an
    article. The first home of the archives is gone; they come from the first author's own site. Their SHA-256
    are those that independent data loaders published for the archives at the first home, and the site's ETag
    for wikitext-103 is the MD5 that torchtext published for it (9ddaacaf6af0710eda8c456decff7832).
    TinyShakespeare is Karpathy's file at a fixed revision; its SHA-256 was computed from a copy.

    `opener(request, timeout=seconds)` returns a readable context manager; `progress(done, total)` is in
    bytes. The file is kept in the folder `cache` (default: `cache_folder()`).

    Raises ValueError: unknown name; no network or a refusing server; a wrong checksum (then nothing is kept).
    """
    if name not in DOWNLOADS:
        raise ValueError(f"There is no corpus {name!r} to download: the names are {', '.join(DOWNLOADS)}.")
    item = DOWNLOADS[name]
    folder = cache or cache_folder()
    cached = folder and folder / f"{item.sha256[:16]}-{item.address.rpartition('/')[2]}"
    data = _read_checked(cached, item.sha256) if cached else None
    if data is None:
        data = _fetch(name, item, opener, progress)
        if cached:
            _keep(cached, data)
    source = f"{item.address}, {item.license}"
    if item.train is None or item.validation is None:
        train, validation = split_by_document(cut_in_documents(data.decode("utf-8")), f"The text {name}")
        return Corpus(name, train, validation, source)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sides = [archive.read(member).decode("utf-8") for member in (item.train, item.validation)]
    return Corpus(name, tuple(_articles(sides[0])), tuple(_articles(sides[1])), source)


def cache_folder() -> Path | None:
    """The user's cache folder, $XDG_CACHE_HOME/minitf or ~/.cache/minitf; None when there is no home."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "minitf"
    try:
        return Path.home() / ".cache" / "minitf"
    except RuntimeError:
        return None


def cut_in_documents(text: str, characters: int = DOCUMENT_CHARACTERS) -> list[str]:
    """Cut a text at blank lines into documents of some `characters` or more; joined, they are the text again.

    A stretch without blank lines that is four times too long is cut at line ends, at spaces, or anywhere, in
    this order. A text of fewer than 20 such documents is cut finer, so that it can be split in training and
    validation.
    """
    target = max(1, min(characters, len(text) // 20))
    documents: list[str] = []
    held = target
    for piece in _cut(text, [r"\n[ \t]*\n\s*", r"\n", r"[ \t]+"], 4 * target):
        if held >= target:
            documents.append("")
            held = 0
        documents[-1] += piece
        held += len(piece)
    return documents


def split_by_document(
    documents: Sequence[str], what: str, share: float = VALIDATION_SHARE
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Training and validation documents, each in the given order, the latter about `share` of all characters.

    A document's side depends on the documents alone (they are drawn in the order of their SHA-256), so the
    split is the same everywhere; equal documents are on the same side. Neither side is empty.

    Raises ValueError, beginning with `what`, when there are not two different documents with text.
    """
    lengths: dict[str, int] = {}
    for document in documents:
        if document.strip():
            lengths[document] = lengths.get(document, 0) + len(document)
    if len(lengths) < 2:
        raise ValueError(
            f"{what} cannot be split into training and validation: that takes two different documents, and "
            f"it has {len(lengths)}. Give more text."
        )
    if not 0 < share < 0.5:
        raise ValueError(f"The share of text for validation is {share}; it must be above 0 and below 0.5.")
    wanted = share * sum(lengths.values())
    chosen: set[str] = set()
    held = 0
    for document in sorted(lengths, key=lambda each: hashlib.sha256(each.encode()).digest()):
        if held < wanted and held + lengths[document] <= 2 * wanted:
            chosen.add(document)
            held += lengths[document]
    chosen = chosen or {min(lengths, key=lambda each: (lengths[each], each))}
    kept = [document for document in documents if document in lengths]
    return tuple(each for each in kept if each not in chosen), tuple(each for each in kept if each in chosen)


def _texts_in_folder(folder: Path) -> Iterator[tuple[Path, str]]:
    for file in files_below(folder):
        text, problem = _as_text(_read_bytes(file))
        if not problem:
            yield file, text


def _read_text(file: Path) -> str:
    text, problem = _as_text(_read_bytes(file))
    if problem:
        raise ValueError(f"The file {file} {problem}.")
    return text


def _read_bytes(file: Path) -> bytes:
    try:
        # Reading a pipe or a device might never end.
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file} is neither a file nor a folder: text is read from ordinary files only.")
        return file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"There is no file or folder {file}.") from None
    except OSError as error:
        raise ValueError(f"The file {file} cannot be read: {error.strerror or error}.") from error


def _as_text(data: bytes) -> tuple[str, str]:
    """The text of a file, or what is wrong with it."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "", "is UTF-16, but text is read as UTF-8: save it as UTF-8"
    if b"\0" in data:
        return "", "is binary, not text (it holds NUL bytes)"
    text = data.decode("utf-8-sig", errors="replace")
    wrong = text.count("\ufffd") - data.count("\ufffd".encode())
    if wrong > UNDECODABLE_SHARE * len(text):
        return "", f"is not UTF-8 text ({wrong} of its {len(text)} characters cannot be decoded)"
    if not text.strip():
        return "", "is empty: it holds no text"
    return text.replace("\r\n", "\n").replace("\r", "\n"), ""


def files_below(folder: Path) -> Iterator[Path]:
    """Ordinary files under a folder, not the hidden ones, in sorted order, files before subfolders.

    Subfolders that a command of minitf made are passed over: what it writes is not what it reads.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"The folder {error.filename} cannot be read: {error.strerror or error}.") from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _is_run(Path(place, name))
        )
        for name in sorted(files):
            if not name.startswith(".") and Path(place, name).is_file():
                yield Path(place, name)


def _is_run(folder: Path) -> bool:
    """Whether a command of minitf keeps what it made in this folder."""
    try:
        return settings_of_run(folder / "config.json") is not None
    except OSError:
        return False


def _cut(text: str, separators: list[str], limit: int) -> Iterator[str]:
    """The text cut after each match of the first separator; pieces over `limit` are cut by the next one."""
    if not separators:
        yield from (text[start : start + limit] for start in range(0, len(text), limit))
        return
    ends = [match.end() for match in re.finditer(separators[0], text)] + [len(text)]
    for start, end in zip([0, *ends], ends, strict=False):
        if end - start > limit:
            yield from _cut(text[start:end], separators[1:], limit)
        elif end > start:
            yield text[start:end]


def _articles(text: str) -> list[str]:
    """WikiText cut before each title, a line like " = Title = " (sections have more signs)."""
    return [article for article in re.split(r"(?m)^(?= = [^=\n][^\n]* = *$)", text) if article.strip()]


def _fetch(
    name: str, item: Download, opener: Callable[..., Any], progress: Callable[[int, int | None], None] | None
) -> bytes:
    # The site of WikiText refuses urllib's own name.
    request = urllib.request.Request(item.address, headers={"User-Agent": "minitf"})
    data = bytearray()
    try:
        with opener(request, timeout=TIMEOUT_SECONDS) as response:
            announced = getattr(response, "headers", {}).get("Content-Length")
            while block := response.read(1 << 20):
                data += block
                if progress:
                    progress(len(data), int(announced) if announced else None)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        code = f"{error.code} " if isinstance(error, urllib.error.HTTPError) else ""
        raise ValueError(
            f"{name} could not be fetched from {item.address}: {code}{reason}. Try again where "
            "there is a network, or fetch it by other means and name its files as your text."
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != item.sha256:
        raise ValueError(
            f"{name} from {item.address} has a wrong checksum: SHA-256 {found} ({len(data)} bytes), "
            f"expected {item.sha256}. The transfer was damaged or the file has changed; nothing was kept."
        )
    return bytes(data)


def _read_checked(file: Path, sha256: str) -> bytes | None:
    try:
        data = file.read_bytes()
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _keep(file: Path, data: bytes) -> None:
    # A cache that cannot be written costs time at the next run, not this run.
    with contextlib.suppress(OSError):
        write_atomically(file, data)


def _digest(documents: list[str]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()


def _read_cached_documents(file: Path) -> list[str] | None:
    """The documents kept in a file; None when it is missing or damaged."""
    try:
        kept = json.loads(file.read_bytes())
        return kept["documents"] if kept["sha256"] == _digest(kept["documents"]) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
