"""Any sequences of symbols as data to train on: read, split, numbered, written once, and opened where they lie."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from minitf.files import write_atomically
from minitf.tokenizer import gpt2_encoding, load_encoding, train_encoding
from minitf.tokenizer_file import NAMES, load_tokenizer_file
from minitf.train.corpus import identity, python_documentation
from minitf.train.data_settings import LEARNED, MOST_NAMES, DataSettings
from minitf.train.symbol_files import (
    fasta_documents,
    not_a_name,
    not_a_number,
    source_files,
    table_columns,
    table_documents,
    table_examples,
    text_documents,
    token_array,
    token_documents,
)
from minitf.train.token_file import Tokens, open_tokens, sha256_of, token_writer
from minitf.vocabulary import (
    FILE,
    FILES,
    Bins,
    Bytes,
    Characters,
    Ids,
    Labelled,
    Names,
    Pieces,
    Vocabulary,
    bins_of,
    load_vocabulary,
    numbers,
)

# To be raised when the same files and settings would give other tokens than before.
PREPARED_FORMAT = "minitf data 2"
MOST_CHARACTERS = 4096
MOST_LABELS = 4096
BPE_PIECES = 4096
BPE_CHARACTERS = 50_000_000  # that a BPE is trained on, at most
BIN_ROWS = 1_000_000  # that the limits of bins come from, at most
CHARACTERS_BETWEEN_SENTENCES = 100_000_000


@dataclass(frozen=True)
class Example:
    """A sequence, and the label that is to be told from it."""

    text: str
    label: str

    def __len__(self) -> int:
        return len(self.text)


Document = str | Integer[np.ndarray, " token"] | Example
# What is trained on, False, and what only measures, True.
Sided = tuple[bool, Document]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """What a model is trained and validated on.

    Attributes:
        train, validation: token files.
        vocabulary: what the tokens are.
        source: one sentence on where they come from.
        identity: what they are, so that no run goes on with other data.
    """

    train: Tokens
    validation: Tokens
    vocabulary: Vocabulary
    source: str
    identity: Mapping[str, Any]


def prepare(settings: DataSettings, folder: Path, say: Say | None = None, vocabulary: Path | None = None) -> Data:
    """The data of these settings, from ``folder`` when it is there already, else read, encoded and written there.

    The files are read once or twice (for labels once more), a document at a time. Each document is on the side
    that its SHA-256 says, so equal ones are on the same, or where its file is. A folder that was made of the same
    files (by name, size and time of change) with the same settings is used again when its tokens are as they were
    written; so is one whose files are gone, as where a run was moved without them. ``say`` is told what takes its
    time. Where the folder of a ``vocabulary`` is given, that of a model to start from, its tokens are those of the
    data.

    The usual encoding: of text bytes; of FASTA and cells of tables characters; of tokens what they are. Alphabets
    and symbols are found in all of the data; a BPE and bins are made from the training documents, of which the
    first 50 million characters or million rows are enough.

    Raises ValueError for files that cannot be read as what they should be, and when one side would be empty.
    """
    say = say or (lambda sentence: None)
    try:
        files, for_validation = source_files(settings.paths), source_files(settings.validation_paths)
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
    known = _known(settings, vocabulary)
    of_text = known.inner if isinstance(known, Labelled) else known
    if isinstance(of_text, Bins):
        settings = dataclasses.replace(settings, columns=settings.columns or of_text.columns)
        _check_columns(settings, of_text)
    read = lambda doing: _reported(_sided(settings, files, for_validation, of_text), doing, say)
    symbols = known or _learn(settings, files + for_validation, read)
    if settings.label:
        symbols = _labelled(symbols, settings, read)
    folder.mkdir(parents=True, exist_ok=True)
    # What is half made, or half replaced, is no data: this file is written last.
    for name in ("data.json", *FILES):
        (folder / name).unlink(missing_ok=True)
    for unfinished in folder.glob(".*.tokens.*"):
        unfinished.unlink(missing_ok=True)
    symbols.save(folder)
    source = _sentence(settings, files, symbols)
    made_from = {"source": source, "settings": dataclasses.asdict(settings)}
    _write(folder, symbols, read("Encoding"), settings, made_from)
    told = {"recipe": recipe, "source": source, "identity": _identity(folder)}
    write_atomically(folder / "data.json", (json.dumps(told, indent=2) + "\n").encode())
    made = _kept(folder, recipe, say)
    if made is None:
        raise ValueError(f"The data in {folder} changed while it was made: let one program at a time write there.")
    return made


def _sided(
    settings: DataSettings, files: list[Path], for_validation: list[Path], known: Vocabulary | None
) -> Iterator[Sided]:
    """Every document, and whether it is for validation: of files of its own, or else by its hash."""
    for document in _documents(settings, files, known):
        yield not for_validation and on_validation_side(document, settings.validation), document
    if for_validation:
        yield from ((True, document) for document in _documents(settings, for_validation, known))


def on_validation_side(document: Document, share: float) -> bool:
    """Whether a document is for validation, of which its SHA-256 alone decides; of an example its sequence's."""
    if isinstance(document, Example):
        document = document.text
    data = document.encode() if isinstance(document, str) else document.astype("<u4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") < share * 2**64


def _known(settings: DataSettings, vocabulary: Path | None) -> Vocabulary | None:
    """The vocabulary, where it does not follow from the data."""
    if vocabulary is None:
        return None if settings.bins or settings.encoding in LEARNED else _given(settings.encoding)
    for name in ("encoding", "vocabulary", "bins"):
        if getattr(settings, name):
            raise ValueError(
                f"data.{name} is {getattr(settings, name)!r}; with a model to start from, data has the tokens of "
                "that model: leave it out"
            )
    return load_vocabulary(vocabulary)


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
        if settings.label:
            rows = table_examples(files, settings.columns, settings.label, settings.delimiter, check)
            return (Example(*row) for row in rows)
        return table_documents(files, settings.columns, settings.delimiter, check, series=numbered or names)
    return token_documents(files, settings.raw) if settings.format == "tokens" else text_documents(files)


def _learn(settings: DataSettings, files: list[Path], read: Callable[[str], Iterator[Any]]) -> Vocabulary:
    """The encoding, as far as it follows from the data: from all of it, or from the training documents."""
    training = lambda: _texts(_training(read("Learning the encoding"), settings))
    encoding = settings.encoding or {"text": "bytes", "tokens": "ids"}.get(settings.format, "characters")
    if settings.bins:
        columns = table_columns(files[0], settings.columns, settings.delimiter)
        return bins_of(columns, _first_rows(training(), len(columns)), settings.bins)
    if encoding == "ids":
        return Ids(settings.vocabulary or 1 + max(int(token_array(file, settings.raw).max()) for file in files))
    if encoding == "bpe":
        return Pieces(train_encoding(_beginning(training()), settings.vocabulary or BPE_PIECES))
    if encoding in ("characters", "symbols"):
        return _listed(encoding, _texts(document for _, document in read(f"Finding the {encoding}")))
    return Bytes()


def _labelled(symbols: Vocabulary, settings: DataSettings, read: Callable[[str], Iterator[Sided]]) -> Labelled:
    """With a token for each label. Raises ValueError where there are too many, or a single one."""
    if isinstance(symbols, Labelled):  # of a model to start from
        return symbols
    labels = ([one.label] for _, one in read("Finding the labels") if isinstance(one, Example))
    found = tuple(_found(labels, MOST_LABELS, f"labels in the column {settings.label}", ""))
    if len(found) < 2:
        raise ValueError(f"every row has the {settings.label} {found[0]!r}: there is nothing to tell")
    return Labelled(symbols, found)


def _texts(documents: Iterable[Document]) -> Iterator[Any]:
    return (document.text if isinstance(document, Example) else document for document in documents)


def _given(encoding: str) -> Vocabulary:
    if encoding == "gpt2":
        return Pieces(gpt2_encoding())
    if not Path(encoding).exists():
        raise ValueError(
            f"encoding is {encoding!r}, which is neither bytes, characters, bpe, gpt2 or symbols, nor a file: a "
            "rank file, a tokenizer.json, llama2.c's tokenizer.bin, or the folder of one"
        )
    path = Path(encoding)
    if path.is_dir() and not (path / FILE).exists():
        # The folder of a model that was made elsewhere.
        path = next((path / name for name in NAMES.values() if (path / name).exists()), path)
    if path.is_dir():
        return load_vocabulary(path)
    return load_tokenizer_file(path) if path.suffix in (".json", ".bin") else Pieces(load_encoding(path))


def _listed(encoding: str, documents: Iterator[str]) -> Vocabulary:
    if encoding == "characters":
        return Characters("".join(_found(map(set, documents), MOST_CHARACTERS, "characters", "bytes or bpe")))
    lines = (text.removesuffix("\n").split("\n") for text in documents)
    return Names(tuple(_found(lines, MOST_NAMES, "symbols", "characters or bpe")))


def _found(groups: Iterable[Iterable[str]], most: int, what: str, instead: str) -> list[str]:
    found: set[str] = set()
    for group in groups:
        found.update(group)
        if len(found) > most:
            use = f": use the encoding {instead}" if instead else ""
            raise ValueError(f"the data has more than {most} different {what}{use}")
    return sorted(found)


def _training(documents: Iterable[Sided], settings: DataSettings) -> Iterator[Document]:
    kept = (document for is_validation, document in documents if not is_validation)
    first = next(kept, None)
    if first is None:
        raise ValueError(_cannot_be_split(settings, "training"))
    return itertools.chain([first], kept)


def _first_rows(documents: Iterable[str], columns: int) -> np.ndarray:
    blocks, held = [], 0
    for document in documents:
        blocks.append(numbers(document, columns))
        held += len(blocks[-1])
        if held >= BIN_ROWS:
            break
    return np.concatenate(blocks)[:BIN_ROWS]


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    held = 0
    for document in documents:
        if held >= BPE_CHARACTERS:
            return
        yield document
        held += len(document)


def _write(
    folder: Path,
    vocabulary: Vocabulary,
    documents: Iterable[Sided],
    settings: DataSettings,
    made_from: Mapping[str, Any],
) -> None:
    count = {True: 0, False: 0}
    with (
        token_writer(folder / "train.tokens", vocabulary.size, made_from) as train,
        token_writer(folder / "validation.tokens", vocabulary.size, made_from) as validation,
    ):
        for is_validation, document in documents:
            ids = _encoded(vocabulary, document)
            (validation if is_validation else train)(ids)
            count[is_validation] += len(ids)
        for side, name in ((True, "validation"), (False, "training")):
            if not count[side]:
                raise ValueError(_cannot_be_split(settings, name))


def _encoded(vocabulary: Vocabulary, document: Document) -> Integer[np.ndarray, " token"]:
    if isinstance(document, Example):
        assert isinstance(vocabulary, Labelled)
        return vocabulary.example(document.text, document.label)
    return vocabulary.encode(document) if isinstance(document, str) else document


def _cannot_be_split(settings: DataSettings, side: str) -> str:
    if settings.validation_paths:
        return f"the files for {side} hold nothing"
    return (
        f"the data cannot be split into training and validation: with a share of {settings.validation} for "
        f"validation (by the hash of each document) no document is for {side}. Give more data, or another share."
    )


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
        )
        if _identity(folder) != told["identity"]:
            raise ValueError(f"The vocabulary in {folder} is not the one that its tokens were written with.")
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
        same = (recipe["format"], recipe["settings"]) == (PREPARED_FORMAT, _plain(settings))
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
    for name in FILES:
        if (folder / name).is_file():
            digest.update(sha256_of(folder / name).encode())
    return {"data_sha256": digest.hexdigest()[:16]}


def _sentence(settings: DataSettings, files: list[Path], vocabulary: Vocabulary) -> str:
    if not files:
        return f"{python_documentation().source}, {vocabulary.size} different tokens"
    count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
    size = sum(file.stat().st_size for file in files)
    named = ", ".join(settings.paths)
    return f"{named} ({settings.format}, {count}, {size} bytes), {vocabulary.size} different tokens"
