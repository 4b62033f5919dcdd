"""llama2.c's tokenizer (Karpathy 2023): pieces with scores, merged greedily, single bytes as a last resort.

The file: int32 length of the longest piece; then for every token its float32 score, the int32 length of its piece,
and the piece. Token 0 stands for the unknown, 1 begins a text, 2 ends one, 3 to 258 are the single bytes, written
``<0x0A>``.
"""

import heapq
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

UNKNOWN, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3
_FIRST_PIECE = FIRST_BYTE + 256


class Llama2cTokenizer:
    """Text to tokens and back. Its methods have the names of those of ``tiktoken.Encoding``.

    ``file`` is what it was read from; the model's embedding has as many ``rows`` as there are tokens.
    """

    def __init__(self, pieces: list[bytes], scores: list[float], name: str = "llama2c", file: bytes = b""):
        self.name, self.file = name, file
        self.n_vocab = self.rows = len(pieces)
        self.mask_token: int | None = None
        self._pieces = [*([b""] * FIRST_BYTE), *(bytes([value]) for value in range(256)), *pieces[_FIRST_PIECE:]]
        self._scores = scores
        # Only real pieces are looked up: the text "<0x0A>" is six characters. Of equal pieces the first counts.
        self._ids = {piece: token for token, piece in reversed(list(enumerate(pieces))) if token >= _FIRST_PIECE}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, BOS (1) first; the text is taken as if a space preceded it.

        While any two neighbors make a piece, those whose piece has the highest score are merged (the leftmost
        of equals). Raises ValueError on a lone surrogate, which has no bytes.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text holds a lone surrogate at position {error.start}") from None
        tokens = [token for character in (" " + text if text else "") for token in self._character(character)]
        return [BEGIN, *self._merged(tokens)]

    def _merged(self, tokens: list[int]) -> list[int]:
        """Tokens after all merges, of a long text too: what could be merged waits in the order of its merging."""
        before, after = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
        waiting: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right < len(tokens):
                piece = self._ids.get(self._pieces[tokens[left]] + self._pieces[tokens[right]])
                if piece is not None:
                    heapq.heappush(waiting, (-self._scores[piece], left, right, piece))

        for left, right in enumerate(after):
            offer(left, right)
        there = [True] * len(tokens)
        while waiting:
            _, left, right, piece = heapq.heappop(waiting)
            # What was offered before one of the two was merged with another is no longer there.
            if not (there[left] and there[right] and after[left] == right):
                continue
            if self._pieces[tokens[left]] + self._pieces[tokens[right]] != self._pieces[piece]:
                continue
            tokens[left], there[right], after[left] = piece, False, after[right]
            if after[right] < len(tokens):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [token for token, one in zip(tokens, there, strict=True) if one]

    def decode(self, ids: Iterable[Any]) -> str:
        """The text of tokens; what is not valid UTF-8 becomes U+FFFD. Raises ValueError on an unknown id."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[Any]) -> bytes:
        """The bytes of tokens, BOS and EOS as nothing; a space at the start of the piece after BOS is dropped.

        Raises ValueError on an id that is not in the vocabulary.
        """
        found, begins = b"", False
        for token in ids:
            piece = self.decode_single_token_bytes(token)
            found += piece.removeprefix(b" ") if begins else piece
            begins = int(token) == BEGIN
        return found

    def decode_single_token_bytes(self, token: Any) -> bytes:
        """The bytes of one token. Raises ValueError on an id that is not in the vocabulary."""
        if not 0 <= int(token) < self.n_vocab:
            raise ValueError(f"there is no token {token}; the ids go from 0 to {self.n_vocab - 1}")
        return self._pieces[int(token)]

    def _character(self, character: str) -> list[int]:
        data = character.encode()
        return [self._ids[data]] if data in self._ids else [FIRST_BYTE + value for value in data]


def load_tokenizer(path: Path, rows: int | None = None) -> Llama2cTokenizer:
    """The tokenizer of a file, for a model of ``rows`` tokens, of which it must have as many (None: of any size).

    Raises:
        ValueError: the file is missing, damaged, of another size, or lacks the single bytes.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    pieces: list[bytes] = []
    scores: list[float] = []
    place = 4
    while place < len(raw):
        if place + 8 > len(raw):
            raise ValueError(f"{path} is cut off in token {len(pieces)}")
        score, length = struct.unpack_from("<fi", raw, place)
        if length < 0 or place + 8 + length > len(raw):
            raise ValueError(f"{path} is damaged or cut off in token {len(pieces)}: its piece has {length} bytes")
        pieces.append(raw[place + 8 : place + 8 + length])
        scores.append(score)
        place += 8 + length
    if rows is not None and len(pieces) != rows:
        raise ValueError(f"{path} has {len(pieces)} tokens, but the model has {rows}")
    if pieces[FIRST_BYTE:_FIRST_PIECE] != [b"<0x%02X>" % value for value in range(256)]:
        raise ValueError(f"{path} does not have the 256 single bytes as its tokens 3 to 258")
    return Llama2cTokenizer(pieces, scores, path.stem, raw)
