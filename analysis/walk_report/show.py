"""The page of a walk from Python: a notebook shows it, and it can be saved."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitf.analysis.given import check_tokens
from minitf.analysis.walk_report.data import both_sides
from minitf.analysis.walk_report.page import page
from minitf.files import write_atomically
from minitf.pretrained import Pretrained
from minitf.walk import Edit


@dataclass(frozen=True)
class WalkPage:
    """A page that asks nothing of the network; notebooks show it in a frame."""

    html: str

    def save(self, path: Path | str) -> None:
        """Write it as one HTML file. Raises OSError."""
        write_atomically(Path(path), self.html.encode())

    def _repr_html_(self) -> str:
        """The page in a frame, so that its styles and scripts are its own."""
        source = html.escape(self.html, quote=True)
        return f'<iframe srcdoc="{source}" style="width:100%;height:900px;border:1px solid #ddd"></iframe>'

    def __repr__(self) -> str:
        return f"WalkPage of {len(self.html):,} characters; .save(path) writes it"


def show(
    model: Pretrained, text: str | Sequence[int], edit: Edit | None = None, *, name: str = "this model"
) -> WalkPage:
    """The page that ``minitf walk`` writes, for a model, an edit and a text (or token ids) at hand.

    Raises:
        ValueError: a text without tokenizer, no tokens, or tokens that the model cannot read.
    """
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError("minitf has no tokenizer for this model; give token ids")
        text = model.tokenizer.encode(text)
    tokens = np.array(list(text), np.int32)
    if not len(tokens) or len(tokens) > model.config.length:
        raise ValueError(f"{len(tokens)} tokens: the model reads from 1 to {model.config.length}")
    check_tokens(tokens.tolist(), model.config)
    edits = [] if edit is None else ["as the edit says"]
    return WalkPage(page(both_sides(model, tokens, edit), model, name, edits))
