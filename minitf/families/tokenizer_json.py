"""The tokenizer of a ``tokenizer.json``, run by the package ``tokenizers``, where that is installed.

The file says everything: how text is cleaned and cut, the pieces and how they merge, and which tokens go before
and after a text (Llama 3's ``<|begin_of_text|>``, BERT's ``[CLS]`` and ``[SEP]``; Pythia, Qwen, BLOOM add none).
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# The character that byte-level tokenizers write for each byte: its own where that can be seen, else one beyond all
# bytes (Radford et al. 2019).
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [value for value in range(256) if value not in _SEEN]
_CHARACTERS = {value: chr(value) for value in _SEEN} | {v: chr(0x100 + i) for i, v in enumerate(_UNSEEN)}
_BYTES = {character: value for value, character in _CHARACTERS.items()}


class NotInstalled(ValueError):
    """The package that runs a tokenizer.json is not there."""

    def __init__(self, file: Path):
        super().__init__(f"{file} is run by the package tokenizers: pip install 'minitf[hub]'")


class JsonTokenizer:
    """Text to tokens and back. Its methods have the names of those of ``tiktoken.Encoding``.

    ``n_vocab`` is one more than the largest id. A model may have more ``rows`` in its embedding, to make their
    number round: those are ids without a token, which decode to nothing. ``file`` is what it was read from,
    ``mask_token`` stands for what is to be guessed, if any does.
    """

    def __init__(
        self, tokenizer: Any, rows: int | None = None, name: str = "tokenizer.json", file: bytes | None = None
    ):
        self.name = name
        self.file = tokenizer.to_str().encode() if file is None else file
        self._tokenizer = tokenizer
        self.n_vocab = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.rows = self.n_vocab if rows is None else rows
        masks = [tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>")]
        self.mask_token: int | None = next((token for token in masks if token is not None), None)
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._decoders = _flat(json.loads(tokenizer.to_str())["decoder"])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the file adds before and after every text.

        What is written like a special token ("<|endoftext|>", "[MASK]") is that token.

        Raises:
            ValueError: a lone surrogate, which no text has; a token for which the model has no embedding; a file
                that names tokens which it does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at position {error.start}") from None
        try:
            ids = self._tokenizer.encode(text).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the package is no Exception
            raise ValueError(f"{self.name} cannot encode this text: {error}") from error
        for token in ids:
            if token >= self.rows:
                raise ValueError(
                    f"the text has the token {self._tokenizer.id_to_token(token)!r}, number {token}, but the "
                    f"model's embedding ends with {self.rows - 1}"
                )
        return ids

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of tokens, special ones left out; what is not valid UTF-8 becomes U+FFFD.

        Raises ValueError on an id that the model does not have.
        """
        tokens = [int(token) for token in ids]
        for token in tokens:
            if not 0 <= token < self.rows:
                raise ValueError(f"there is no token {token}; the model's go from 0 to {self.rows - 1}")
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def decode_single_token_bytes(self, token: Any) -> bytes:
        """The bytes that a token stands for; of special tokens and pieces within a word ("##ing"), the name.

        Raises ValueError on an id without a token.
        """
        name = self._tokenizer.id_to_token(int(token)) if 0 <= int(token) < self.n_vocab else None
        if name is None:
            raise ValueError(f"{self.name} has no token {token}; its ids go from 0 to {self.n_vocab - 1}")
        return name.encode() if int(token) in self._special else _bytes(name, self._decoders)


def byte_level(token: bytes) -> str:
    """How a byte-level tokenizer.json writes a token: a character for each byte."""
    return "".join(_CHARACTERS[value] for value in token)


def load_tokenizer(path: Path, rows: int | None = None) -> JsonTokenizer | None:
    """The tokenizer of a file, for a model of ``rows`` tokens (None: as many as it has itself).

    None where ``tokenizers`` is not installed.

    Raises:
        ValueError: the file is missing or damaged, or has more tokens than the model, not counting those that
            were added to the file later, which may be more and then cannot be encoded.
    """
    try:
        import tokenizers  # noqa: PLC0415
    except ImportError:
        return None
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        found = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the package raises no narrower one
        raise ValueError(f"{path} is no tokenizer that the package tokenizers can read: {error}") from error
    most = max(found.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if rows is not None and most > rows:
        raise ValueError(
            f"{path} has {most} tokens, but the model's embedding has {rows}: they do not belong together. "
            "Take the file away to use the model by token ids"
        )
    # A file may say that texts are cut or filled up to some length: that is for batches, not for reading.
    found.no_truncation()
    found.no_padding()
    return JsonTokenizer(found, rows, str(path), raw)


def _flat(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, one after another."""
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _flat(part)]
    return [decoder]


def _bytes(name: str, decoders: list[dict[str, Any]]) -> bytes:
    """What the file's decoder makes of one token, but for what depends on its neighbors."""
    for step in decoders:
        kind = step["type"]
        if kind == "ByteLevel" and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if kind == "Metaspace":
            name = name.replace(step["replacement"], " ")
        if kind == "Replace" and "String" in step["pattern"]:
            name = name.replace(step["pattern"]["String"], step["content"])
    return name.encode()
