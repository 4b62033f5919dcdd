"""A vocabulary as the tokenizer of a model, and the vocabulary of a model's tokenizer."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tiktoken

from minitf.families.llama2c_tokenizer import Llama2cTokenizer
from minitf.families.tokenizer_json import JsonTokenizer
from minitf.tokenizer import GPT2_PATTERN
from minitf.tokenizer_file import DESCRIPTION as FILE
from minitf.tokenizer_file import TokenizerFile
from minitf.vocabulary.kinds import Pieces, Vocabulary


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with the methods of a ``tiktoken.Encoding`` that readers of a model use."""

    vocabulary: Vocabulary
    name: str = FILE

    @property
    def n_vocab(self) -> int:
        """How many tokens there are."""
        return self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. Raises ValueError naming what has none."""
        return self.vocabulary.encode(text).tolist()

    def decode(self, ids: Iterable[Any]) -> str:
        """Their text; of tokens that only fill up a model's vocabulary, none."""
        return self.vocabulary.decode([one for one in ids if one < self.vocabulary.size])

    def decode_single_token_bytes(self, token: int) -> bytes:
        """What one token stands for."""
        return self.vocabulary.piece(token)


def vocabulary_of(tokenizer: Any) -> Vocabulary | None:
    """The vocabulary of a model's tokenizer, which can be kept with another model; None where there is none."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.vocabulary
    if isinstance(tokenizer, tiktoken.Encoding):
        # A rank file holds no pattern, and with another one the same ranks are another encoding.
        return Pieces(tokenizer) if tokenizer._pat_str == GPT2_PATTERN else None
    return TokenizerFile(tokenizer) if isinstance(tokenizer, JsonTokenizer | Llama2cTokenizer) else None


def mask_token_of(vocabulary: Vocabulary) -> int | None:
    """The token that stands for what is to be guessed, where a vocabulary has one."""
    return vocabulary.tokenizer.mask_token if isinstance(vocabulary, TokenizerFile) else None
