"""What every page of ours is made of: one file that asks nothing of the network.

A page's own content security policy forbids it to: it runs exactly the scripts whose hashes it names, and text
from data is text wherever it stands.
"""

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from minitf import __version__
from minitf.analysis.claims import Claim, is_settled
from minitf.declaration import count
from minitf.pretrained import Pretrained

HERE = Path(__file__).parent
DIGITS = 4  # as many as a picture shows


def render(
    template: Path, scripts: Mapping[str, Markup], data: Any, *, digits: int = DIGITS, **values: Any
) -> str:
    """The page of a template, which gets ``style``, ``scripts``, ``script_hashes``, ``data`` and ``values``.

    Args:
        template: its file; templates beside it, and beside this file, can be included.
        scripts: of :func:`script`, by name, to be inlined as they are.
        data: what the scripts read: numbers, text, arrays, lists and mappings.
        digits: that a number has, significant ones.
        **values: what the template shows; text is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        scripts=scripts,
        script_hashes=" ".join(script_hash(str(s)) for s in scripts.values()),
        data=Markup(script_json(data, digits)),
        **values,
    )


def page_of_model(template: Path, report: Path, data: Any, model: Pretrained, name: str, **values: Any) -> str:
    """The page of a template about a model called ``name``, drawn by plotly and the script ``report``.

    The template also gets ``family``, ``model`` (its configuration), ``parameters`` (how many), ``version``;
    ``values`` are those of :func:`render`.
    """
    return render(
        template,
        drawn_by(report),
        data,
        family=model.family,
        name=name,
        model=model.config,
        parameters=f"{count(model.config):,}",
        version=__version__,
        **values,
    )


def claim_rows(claims: Iterable[Claim]) -> list[dict[str, Any]]:
    """What ``claims.html.j2`` shows of claims."""
    return [
        {
            "statement": one.statement,
            "about": f"{one.source}; {one.statistic}, n = {one.n}" + (f". {one.note}" if one.note else ""),
            "value": _numbers(one.value),
            "interval": "-" if one.ci95 is None else "; ".join(map(_interval, np.reshape(one.ci95, (-1, 2)))),
            "asked": _interval(np.ravel(one.threshold)[:2])
            if one.direction == "within"
            else f"{one.direction} {_numbers(one.threshold)}",
            "verdict": _verdict(one),
            "settled": is_settled(one),
        }
        for one in claims
    ]


def _verdict(one: Claim) -> str:
    if not np.all(np.isfinite(one.value)):
        return "cannot be told"
    return "holds" if one.holds else "does not hold"


def _numbers(value: Any) -> str:
    return ", ".join(f"{x:.3g}" if np.isfinite(x) else "no number" for x in np.ravel(value))


def _interval(ends: np.ndarray) -> str:
    return " to ".join(f"{x:.3g}" for x in ends)


def drawn_by(report: Path) -> dict[str, Markup]:
    """The scripts of a page that plotly and our own script, in that file, draw."""
    return {"report": script(report.read_text(encoding="utf-8")), "plotly": script(get_plotlyjs())}


def script(text: str) -> Markup:
    """A script of our own or plotly's, to stand inside a script element as it is.

    Raises ValueError if the text would end the element early.
    """
    if "</script" in text.lower() or "<!--" in text:
        raise ValueError("the script holds '</script' or '<!--' and cannot be inlined in a page")
    return Markup(text)


def script_hash(text: str) -> str:
    """The source by which a content security policy allows this script."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def script_json(data: Any, digits: int = DIGITS) -> str:
    """JSON that can stand inside a script element: nothing in it ends the element or opens a comment.

    Numbers have so many significant digits; what is not finite is null.
    """
    text = json.dumps(_finite(data, digits), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _finite(item: Any, digits: int) -> Any:
    if isinstance(item, np.ndarray):
        return _finite(item.tolist(), digits)
    if isinstance(item, Mapping):
        return {str(k): _finite(v, digits) for k, v in item.items()}
    if isinstance(item, list | tuple):
        return [_finite(x, digits) for x in item]
    if isinstance(item, float):
        rounded = float(f"{item:.{digits}g}")  # the largest numbers round up to infinity
        return rounded if math.isfinite(rounded) else None
    return item
