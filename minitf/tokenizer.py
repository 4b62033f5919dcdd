"""Tokens: bytes, a BPE trained here, or GPT-2's, all run by tiktoken.

A `tiktoken.Encoding` is a table of byte strings with ranks and a pattern that cuts text into pieces; inside a
piece the adjacent pair of the lowest rank is merged first (byte pair encoding: Sennrich et al. 2016; on
bytes: Radford et al. 2019). The table here always holds all 256 single bytes, so every byte string has tokens
and comes back exactly. Nothing in this module opens a network connection.
"""

import base64
import binascii
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import rustbpe
import tiktoken
from jaxtyping import Int32
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from minitf.files import write_atomically

BYTES = 256

# GPT-2's division of text into pieces, as tiktoken writes it: contractions, words, numbers, signs, spaces.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_GPT2_FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
_GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_END_OF_TEXT = 50256

_INVALID_BYTES = re.compile("([\udc80-\udcff]+)")


def byte_encoding() -> tiktoken.Encoding:
    """The encoding whose 256 tokens are the single bytes: the id of a token is the value of its byte."""
    return _encoding("bytes", {bytes([value]): value for value in range(BYTES)}, r"[\s\S]")


def train_encoding(
    text: str | Iterable[str],
    vocabulary_size: int,
    *,
    pattern: str = GPT2_PATTERN,
    name: str = "trained",
) -> tiktoken.Encoding:
    """Train a BPE on `text` (one string, or any number of them) with rustbpe and hand it to tiktoken.

    `vocabulary_size` counts tokens, the 256 single bytes included. A text with fewer different pairs than
    that gives a smaller encoding: ask it for `n_vocab`. The same strings give the same encoding on every
    machine.

    Raises ValueError: `vocabulary_size` below 256; no text; a text without a single pair to merge.
    """
    if vocabulary_size < BYTES:
        raise ValueError(
            f"vocabulary_size is {vocabulary_size}, but the {BYTES} single bytes are always tokens: ask for "
            f"{BYTES} or more."
        )
    texts = [_without_surrogates(part) for part in ([text] if isinstance(text, str) else _strings(text))]
    characters = sum(map(len, texts))
    if characters == 0:
        raise ValueError("The text to train the tokenizer on is empty: give at least a few sentences.")
    ranks = _train(texts, vocabulary_size, pattern)
    if vocabulary_size > BYTES and len(ranks) == BYTES:
        raise ValueError(
            f"The text to train the tokenizer on ({characters} characters) has no pair of bytes to merge, "
            f"too little for {vocabulary_size} tokens: give more text, or ask for {BYTES} (plain bytes)."
        )
    return _encoding(name, ranks, pattern)


def save_encoding(encoding: tiktoken.Encoding, path: str | os.PathLike[str]) -> None:
    """Write the encoding's ranks as a tiktoken rank file: per line a token in base64, a space, its rank.

    Such a file holds neither the pattern nor special tokens: `load_encoding` takes the pattern again, and the
    special tokens (GPT-2's one) are left out. The file appears whole or not at all.
    """
    special = {encoding.encode_single_token(text) for text in encoding.special_tokens_set}
    lines = [
        base64.b64encode(encoding.decode_single_token_bytes(rank)) + b" %d\n" % rank
        for rank in range(encoding.n_vocab)
        if rank not in special
    ]
    write_atomically(Path(path), b"".join(lines))


def load_encoding(path: str | os.PathLike[str], *, pattern: str = GPT2_PATTERN) -> tiktoken.Encoding:
    """Read a tiktoken rank file, such as `save_encoding` writes.

    `pattern` must be the one that it was trained with (the default is that of `train_encoding`). The file is
    read afresh at each call: tiktoken's own loader keeps a copy by path, and would not see a new training.

    Raises ValueError naming the file (and the line): missing, damaged, a rank or token twice, a rank or byte
    missing.
    """
    file = Path(path)
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"The rank file {file} cannot be read: {error.strerror or error}.") from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            token, rank = _parse(line, f"{file}, line {number}")
            if token in ranks:
                raise ValueError(f"{file}, line {number}: the token {token!r} stands there twice.")
            ranks[token] = rank
    _check_ranks(ranks, file)
    return _encoding(file.stem, ranks, pattern)


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's encoding (50 257 tokens; Radford et al. 2019), when its two files lie in tiktoken's cache.

    The cache is the folder TIKTOKEN_CACHE_DIR, else DATA_GYM_CACHE_DIR, else `data-gym-cache` in the folder
    for temporary files. A file there is named by the SHA-1 of its address. They are checked (SHA-256) before
    tiktoken is asked, because tiktoken would fetch what is missing or damaged.

    Raises ValueError saying which file is missing or damaged and how to get it.
    """
    folder = _tiktoken_cache()
    for file, digest in _GPT2_FILES.items():
        address = _GPT2_ADDRESS + file
        cached = folder / hashlib.sha1(address.encode()).hexdigest() if folder else None
        problem = _problem(cached, digest)
        if problem:
            raise ValueError(
                f"GPT-2's tokenizer is not at hand: its file {file} {problem}. minitf does not download it "
                "unasked. To get it, run this once where there is a network:\n"
                "    python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\"\n"
                "and, to use it elsewhere, copy that cache folder and set TIKTOKEN_CACHE_DIR to it. "
                "Or train a tokenizer on your text, or use bytes: neither needs a file."
            )
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=_GPT2_ADDRESS + "vocab.bpe",
        encoder_json_file=_GPT2_ADDRESS + "encoder.json",
        vocab_bpe_hash=_GPT2_FILES["vocab.bpe"],
        encoder_json_hash=_GPT2_FILES["encoder.json"],
    )
    return _encoding("gpt2", ranks, GPT2_PATTERN, {"<|endoftext|>": _GPT2_END_OF_TEXT})


def encode(encoding: tiktoken.Encoding, data: str | bytes) -> Int32[np.ndarray, " token"]:
    """The tokens of a text or of any bytes, int32 [token]; `decode_bytes` gives back exactly these bytes.

    What looks like a special token ("<|endoftext|>") is plain text. Bytes that are not valid UTF-8 become
    single-byte tokens; the valid text between them is encoded as text.

    Raises ValueError for a str with a lone surrogate, which has no bytes.
    """
    if isinstance(data, str):
        return _encode_text(encoding, _without_surrogates(data))
    # Decoded so, each invalid byte is one lone surrogate, which valid text cannot hold.
    parts = _INVALID_BYTES.split(data.decode("utf-8", errors="surrogateescape"))
    if len(parts) == 1:
        return _encode_text(encoding, parts[0])
    single = np.array([encoding.encode_single_token(bytes([value])) for value in range(BYTES)], np.int32)
    arrays = [
        single[[ord(character) - 0xDC00 for character in part]] if index % 2 else _encode_text(encoding, part)
        for index, part in enumerate(parts)
        if part
    ]
    return np.concatenate(arrays)


def decode_bytes(encoding: tiktoken.Encoding, ids: Iterable[Any]) -> bytes:
    """The bytes of tokens: the exact inverse of `encode`. `ids` is any sequence or 1-D array of integers.

    Raises ValueError for an id outside the vocabulary.
    """
    return encoding.decode_bytes(_checked_ids(encoding, ids))


def token_labels(encoding: Any, ids: Iterable[Any]) -> list[str]:
    r"""A printable label for each token; different tokens have different labels.

    ``encoding`` is a ``tiktoken.Encoding``, or anything with its ``n_vocab`` and ``decode_single_token_bytes``.

    A space is ␣; line breaks, tabs and other unprintable characters are escapes (`\n`, `\t`, `\x00`,
    `\u00a0`); a byte that is not valid UTF-8 by itself is `\xe2`; a backslash is doubled. Labels are not
    escaped for HTML.

    Raises ValueError for an id outside the vocabulary.
    """
    return [_label(encoding.decode_single_token_bytes(token)) for token in _checked_ids(encoding, ids)]


def _encoding(
    name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int] | None = None
) -> tiktoken.Encoding:
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special or {})


def _strings(texts: Iterable[str]) -> list[str]:
    # Iterating over bytes gives numbers, so bytes given by mistake are refused here too.
    parts = list(texts)
    for part in parts:
        if not isinstance(part, str):
            found = type(texts if isinstance(texts, bytes) else part).__name__
            raise ValueError(f"The tokenizer is trained on strings, not on {found}: decode it first.")
    return parts


def _train(texts: list[str], vocabulary_size: int, pattern: str) -> dict[bytes, int]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size=vocabulary_size, pattern=pattern)
    return {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}


def _parse(line: bytes, where: str) -> tuple[bytes, int]:
    fields = line.split()
    try:
        token, rank = base64.b64decode(fields[0], validate=True), int(fields[1])
        if len(fields) != 2 or not token or rank < 0:
            raise ValueError
    except (ValueError, IndexError, binascii.Error):
        shown = line[:60].decode("utf-8", errors="backslashreplace")
        raise ValueError(f"{where}: {shown!r} is not a token in base64, a space and its rank.") from None
    return token, rank


def _check_ranks(ranks: dict[bytes, int], file: Path) -> None:
    missing_bytes = [value for value in range(BYTES) if bytes([value]) not in ranks]
    if missing_bytes:
        raise ValueError(
            f"{file} is not a whole rank file: {len(missing_bytes)} of the {BYTES} single bytes have no rank "
            f"(the first is {missing_bytes[0]})."
        )
    missing_ranks = sorted(set(range(len(ranks))) - set(ranks.values()))
    if missing_ranks:
        raise ValueError(
            f"{file} is damaged: its {len(ranks)} tokens should have the ranks 0 to {len(ranks) - 1}, "
            f"each once, but rank {missing_ranks[0]} is missing."
        )


def _tiktoken_cache() -> Path | None:
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            # An empty name switches tiktoken's cache off: then there is no file that could be used.
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"


def _problem(cached: Path | None, digest: str) -> str:
    if cached is None:
        return "cannot be kept, as the cache is off (TIKTOKEN_CACHE_DIR or DATA_GYM_CACHE_DIR is empty)"
    try:
        data = cached.read_bytes()
    except OSError as error:
        return f"is not in tiktoken's cache ({cached}: {error.strerror or error})"
    if hashlib.sha256(data).hexdigest() != digest:
        return f"in tiktoken's cache is damaged (wrong checksum: {cached})"
    return ""


def _encode_text(encoding: tiktoken.Encoding, text: str) -> Int32[np.ndarray, " token"]:
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)


def _without_surrogates(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}, "
            "which has no bytes in UTF-8: give the bytes themselves instead."
        ) from None
    return text


def _checked_ids(encoding: Any, ids: Iterable[Any]) -> list[int]:
    array = np.asarray(ids if hasattr(ids, "__array__") else list(ids))
    if array.size == 0:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"Token ids are a 1-D sequence of integers, not {array.dtype} of shape {array.shape}.")
    wrong = array[(array < 0) | (array >= encoding.n_vocab)]
    if wrong.size:
        raise ValueError(
            f"There is no token {wrong[0]} in {encoding.name}: its ids go from 0 to {encoding.n_vocab - 1}."
        )
    return [int(token) for token in array]


def _label(token: bytes) -> str:
    return "".join(_visible(character) for character in token.decode("utf-8", errors="surrogateescape"))


def _visible(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    if character == " ":
        return "␣"
    if character in "\\\n\t\r":
        return {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}[character]
    if character != "␣" and character.isprintable():
        return character
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
