"""What symbols are numbered as: a small object that is kept with a run, so that its tokens can be read.

Each kind is a frozen dataclass with the methods of :class:`Vocabulary`; `load_vocabulary` reads any of them back.
"""

from minitf.vocabulary.bins import Bins, bins_of, is_number, numbers
from minitf.vocabulary.examples import Labelled, Measured
from minitf.vocabulary.kept import load_vocabulary
from minitf.vocabulary.kinds import FILE, FILES, Bytes, Characters, Ids, Names, Pieces, Vocabulary
from minitf.vocabulary.tokenizer import Tokenizer, mask_token_of, vocabulary_of

__all__ = [
    "FILE",
    "FILES",
    "Bins",
    "Bytes",
    "Characters",
    "Ids",
    "Labelled",
    "Measured",
    "Names",
    "Pieces",
    "Tokenizer",
    "Vocabulary",
    "bins_of",
    "is_number",
    "load_vocabulary",
    "mask_token_of",
    "numbers",
    "vocabulary_of",
]
