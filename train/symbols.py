"""Any sequences of symbols as data to train on: read, split, numbered, written once, and opened where they lie."""

import dataclasses
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, Integer

from minitf.files import write_atomically
from minitf.train.corpus import identity, python_documentation
from minitf.train.data_settings import DataSettings
from minitf.train.encoding import cannot_be_split, known_vocabulary, labelled, learned, measured, text_of
from minitf.train.symbol_files import (
    Document,
    Example,
    Sided,
    fasta_documents,
    source_files,
    text_documents,
    token_documents,
)
from minitf.train.table_files import not_a_label, not_a_name, not_a_number, table_documents, table_examples
from minitf.train.token_file import Tokens, open_tokens, sha256_of, token_writer
from minitf.vocabulary import FILES, Bins, Labelled, Measured, Names, Vocabulary, load_vocabulary

# To be raised when the same files and settings would give other tokens than before.
PREPARED_FORMAT = "minitf data 2"
CHARACTERS_BETWEEN_SENTENCES = 100_000_000
SIDES = ("train", "validation")

WHAT = {"text": "text", "fasta": "sequence", "csv": "row", "tokens": "token"}

Say = Callable[[str], None]
Check = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Data:
    """What a model is trained and validated on.

    Attributes:
        train, validation: token files.
        vocabulary: what the tokens are.
        source: one sentence on where they come from.
        identity: what they are, so that no run goes on with other data.
        numbers: of examples with a number, those of each side (``train``, ``validation``).
    """

    train: Tokens
    validation: Tokens
    vocabulary: Vocabulary
    source: str
    identity: Mapping[str, Any]
    numbers: Mapping[str, Float64[np.ndarray, " example"]]


def prepare(
    settings: DataSettings,
    folder: Path,
    say: Say | None = None,
    vocabulary: Path | None = None,
    check: Check | None = None,
) -> Data:
    """The data of these settings, from ``folder`` when it is there already, else read, encoded and written there.

    The files are read once or twice (for labels and numbers once more), a document at a time. Each document is on
    the side that its SHA-256 says, so equal ones are on the same, or where its file is; a file that is for
    validation is not trained on, also where ``paths`` have it. A folder that was made of the same files (by name,
    size and time of change) with the same settings is used again when its tokens are as they were written; so is
    one whose files are gone, as where a run was moved without them. ``say`` is told what takes its time. Where the
    folder of a ``vocabulary`` is given, that of a model to start from, its tokens are those of the data.
    ``check`` is given the identity of what was made anew, before that takes the place of what is there: where it
    raises an error, all stays as it was.

    The usual encoding: of text bytes; of FASTA and cells of tables characters; of tokens what they are. Alphabets
    and symbols are found in all of the data; a BPE and bins are made from the training documents, of which the
    first 50 million characters or million rows are enough.

    Raises ValueError for files that cannot be read as what they should be, and when one side would be empty.
    """
    say = say or (lambda sentence: None)
    try:
        for_validation = source_files(settings.validation_paths, settings.format)
        files = _others(source_files(settings.paths, settings.format), for_validation, say)
    except ValueError as error:
        kept = _without_sources(folder, settings, say)
        if kept is None:
            raise
        say(f"{error} The data that was made of it is in {folder}, and is used.")
        return kept
    recipe = _recipe(settings, files + for_validation, vocabulary)
    kept = _kept(folder, recipe, say)
    if kept is not None:
        return kept
    known = known_vocabulary(settings, vocabulary)
    of_text = None if known is None else text_of(known)
    if isinstance(of_text, Bins):
        settings = dataclasses.replace(settings, columns=settings.columns or of_text.columns)
        _check_columns(settings, of_text)
    read = lambda doing: _reported(_sided(settings, files, for_validation, of_text), doing, say)
    symbols = known or learned(settings, files + for_validation, read)
    if settings.label:
        symbols = labelled(symbols, settings, read)
    elif settings.target:
        symbols = measured(symbols, settings, read)
    elif isinstance(symbols, Measured):
        symbols = symbols.inner
    making = folder / ".making"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        symbols.save(making)
        source = _sentence(settings, files, symbols)
        made_from = {"source": source, "settings": dataclasses.asdict(settings)}
        _write(making, symbols, read("Encoding"), settings, made_from)
        made_identity = _identity(making)
        if check is not None:
            check(made_identity)
        # What is half replaced is no data: this file is written last.
        for name in ("data.json", *FILES, *map(_numbers_file, SIDES)):
            (folder / name).unlink(missing_ok=True)
        for file in list(making.iterdir()):
            os.replace(file, folder / file.name)
        told = {"recipe": recipe, "source": source, "identity": made_identity}
        write_atomically(folder / "data.json", (json.dumps(told, indent=2) + "\n").encode())
    finally:
        shutil.rmtree(making, ignore_errors=True)
    made = _kept(folder, recipe, say)
    if made is None:
        raise ValueError(f"The data in {folder} changed while it was made: let one program at a time write there.")
    return made


def _others(files: list[Path], for_validation: list[Path], say: Say) -> list[Path]:
    """Those that are not for validation. Raises ValueError where all are."""
    taken = {file.resolve() for file in for_validation}
    others = [file for file in files if file.resolve() not in taken]
    if len(others) < len(files):
        told = f"{len(files) - len(others)} of the files of data.paths are for validation"
        if not others:
            raise ValueError(f"{told} (data.validation_paths): there is none to train on")
        say(f"{told}, and are not trained on")
    return others


def _sided(
    settings: DataSettings, files: list[Path], for_validation: list[Path], known: Vocabulary | None
) -> Iterator[Sided]:
    """Every document, and whether it is for validation: of files of its own, or else by its hash."""
    document = None
    for document in _documents(settings, files, known):
        yield not for_validation and on_validation_side(document, settings.validation), document
    if document is None:
        raise ValueError(f"there is nothing in {', '.join(settings.paths)}: no {WHAT[settings.format]}")
    if for_validation:
        yield from ((True, document) for document in _documents(settings, for_validation, known))


def on_validation_side(document: Document, share: float) -> bool:
    """Whether a document is for validation, of which its SHA-256 alone decides; of an example its sequence's."""
    if isinstance(document, Example):
        document = document.text
    data = document.encode() if isinstance(document, str) else document.astype("<u4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < share * 2**64


def _check_columns(settings: DataSettings, known: Bins) -> None:
    if settings.columns != known.columns:
        raise ValueError(
            f"data.columns are {', '.join(settings.columns)}; the bins of this vocabulary are those of "
            f"{', '.join(known.columns)}, in this order"
        )


def _documents(settings: DataSettings, files: list[Path], known: Vocabulary | None) -> Iterator[Document]:
    if not files:
        texts = python_documentation()
        return (f"{document.rstrip()}\n\n" for document in texts.train + texts.validation)
    if settings.format == "fasta":
        return fasta_documents(files)
    if settings.format == "csv":
        names = settings.encoding == "symbols" or isinstance(known, Names)
        numbered = bool(settings.bins) or isinstance(known, Bins)
        check = not_a_number if numbered else not_a_name if names else None
        if settings.told:
            of_told = not_a_label if settings.label else not_a_number
            return table_examples(files, settings.columns, settings.told, settings.dialect, check, of_told)
        return table_documents(files, settings.columns, settings.dialect, check, series=numbered or names)
    if settings.format == "tokens":
        return token_documents(files, settings.raw, settings.vocabulary or (known.size if known else None))
    return text_documents(files)


def _write(
    folder: Path,
    vocabulary: Vocabulary,
    documents: Iterable[Sided],
    settings: DataSettings,
    made_from: Mapping[str, Any],
) -> None:
    count, numbers = {True: 0, False: 0}, {True: array("d"), False: array("d")}
    is_measured = isinstance(vocabulary, Measured)
    size = vocabulary.size + is_measured
    with (
        token_writer(folder / "train.tokens", size, made_from) as train,
        token_writer(folder / "validation.tokens", size, made_from) as validation,
    ):
        for is_validation, document in documents:
            ids = _encoded(vocabulary, document)
            (validation if is_validation else train)(ids)
            count[is_validation] += len(ids)
            if is_measured and isinstance(document, Example):
                numbers[is_validation].append(float(document.cell))
        for is_validation, name in ((True, "validation"), (False, "training")):
            if not count[is_validation]:
                raise ValueError(cannot_be_split(settings, name))
    if is_measured:
        for side, found in zip(SIDES, (numbers[False], numbers[True]), strict=True):
            write_atomically(folder / _numbers_file(side), np.array(found, "<f8").tobytes())


def _encoded(vocabulary: Vocabulary, document: Document) -> Integer[np.ndarray, " token"]:
    if isinstance(document, str):
        return vocabulary.encode(document)
    if not isinstance(document, Example):
        return document
    if isinstance(vocabulary, Labelled):
        return vocabulary.example(document.text, document.cell)
    # A number is no token: the first that there is not says where its sequence ends.
    return np.append(vocabulary.encode(document.text), np.int32(vocabulary.size))


def _numbers_file(side: str) -> str:
    """The file of the numbers of a side's sequences, little-endian float64, one after another."""
    return f"{side}.numbers"


def _reported(documents: Iterable[Sided], doing: str, say: Say) -> Iterator[Sided]:
    held, told = 0, CHARACTERS_BETWEEN_SENTENCES
    for is_validation, document in documents:
        yield is_validation, document
        held += len(document)
        if held >= told:
            say(f"{doing}: {held / 1e6:.0f} million symbols so far")
            told += CHARACTERS_BETWEEN_SENTENCES


def _recipe(settings: DataSettings, files: list[Path], vocabulary: Path | None) -> dict[str, Any]:
    """Everything that the tokens depend on, as JSON gives it back."""
    found: list[Any] = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    if not files:
        found = [identity(python_documentation())]
    ranks = vocabulary or (Path(settings.encoding) if settings.encoding else None)
    used = [ranks / name for name in FILES] if ranks and ranks.is_dir() else [ranks] if ranks else []
    encoding = [sha256_of(file) for file in used if file.is_file()]
    recipe = {
        "format": PREPARED_FORMAT,
        "settings": _plain(settings),
        "files": found,
        "encoding_sha256": encoding,
    }
    return json.loads(json.dumps(recipe))


def _kept(folder: Path, recipe: Mapping[str, Any], say: Say) -> Data | None:
    """The data in a folder, when it is that of the recipe and not damaged."""
    try:
        told = json.loads((folder / "data.json").read_bytes())
        if told["recipe"] != recipe:
            return None
        data = Data(
            open_tokens(folder / "train.tokens"),
            open_tokens(folder / "validation.tokens"),
            load_vocabulary(folder),
            told["source"],
            told["identity"],
            {side: np.fromfile(file, "<f8") for side, file in _numbers_of(folder).items()},
        )
        if _identity(folder) != told["identity"]:
            raise ValueError(f"The vocabulary or the numbers in {folder} are not those of its tokens.")
        return data
    except OSError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        say(f"{error} The data in {folder} is made anew.")
        return None


def _without_sources(folder: Path, settings: DataSettings, say: Say) -> Data | None:
    """The data in a folder, made with these settings and not damaged, whatever became of its files."""
    try:
        recipe = json.loads((folder / "data.json").read_bytes())["recipe"]
        # What was made before there was a setting had what is usual.
        made_with = {**_plain(DataSettings()), **recipe["settings"]}
        same = (recipe["format"], made_with) == (PREPARED_FORMAT, _plain(settings))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return _kept(folder, recipe, say) if same else None


def _plain(settings: DataSettings) -> Any:
    """As JSON gives them back."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _identity(folder: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    for name in ("train.tokens", "validation.tokens"):
        digest.update(open_tokens(folder / name, check=False).sha256.encode())
    for file in (*(folder / name for name in FILES), *_numbers_of(folder).values()):
        if file.is_file():
            digest.update(sha256_of(file).encode())
    return {"data_sha256": digest.hexdigest()[:16]}


def _numbers_of(folder: Path) -> dict[str, Path]:
    files = {side: folder / _numbers_file(side) for side in SIDES}
    return {side: file for side, file in files.items() if file.is_file()}


def _sentence(settings: DataSettings, files: list[Path], vocabulary: Vocabulary) -> str:
    if not files:
        return f"{python_documentation().source}, {vocabulary.size} different tokens"
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    size = sum(file.stat().st_size for file in files)
    named = ", ".join(settings.paths)
    return f"{named} ({settings.format}, {count}, {size} bytes), {vocabulary.size} different tokens"
