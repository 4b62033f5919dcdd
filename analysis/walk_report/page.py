"""The page of a walk: one self-contained file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitf.analysis import page_parts
from minitf.pretrained import Pretrained

HERE = Path(__file__).parent


def as_json(data: Mapping[str, Any]) -> str:
    """The numbers of the page, for other programs."""
    return json.dumps(json.loads(page_parts.script_json(data)), indent=1)


def page(
    data: Mapping[str, Any],
    model: Pretrained,
    name: str,
    edits: Sequence[str] = (),
    settings: Sequence[tuple[str, Any]] = (),
) -> str:
    """The whole report as HTML text.

    Args:
        data: as :func:`minitf.analysis.walk_report.data.both_sides` makes it.
        model: whose walk it is, called ``name``.
        edits: what was changed, in words.
        settings: names and values for the table at the end.
    """
    return page_parts.page_of_model(
        HERE / "walk.html.j2",
        HERE / "walk.js",
        data,
        model,
        name,
        tokens=data["tokens"],
        prompt=data["prompt"],
        edits=edits,
        told=data.get("told"),
        settings=settings,
    )
