"""The prose inside this Python: the text behind `help("topics")` and the docstrings of the standard library.

Modules are parsed, never imported, so nothing of them runs.
"""

import ast
import inspect
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path

NO_DOCUMENTATION = {
    *("test", "tests", "idle_test", "idlelib", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"),
    *("site-packages", "dist-packages"),
}


def documentation_texts(library: Path) -> Iterator[str]:
    """The topics of the language reference, then one text per module under `library`: its docstrings.

    Texts are cleaned, and paragraphs that stood before are left out. What is missing is passed over.
    """
    yield from _unrepeated(chain(_topics(), _modules(library)))


def _topics() -> Iterator[str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):
        return
    yield from (_cleaned(topics[topic]) for topic in sorted(topics))


def _modules(library: Path) -> Iterator[str]:
    for place, folders, files in os.walk(library):
        folders[:] = sorted(name for name in folders if name not in NO_DOCUMENTATION and name[0] != ".")
        for name in sorted(files):
            if name.endswith(".py"):
                yield "\n\n".join(_cleaned(docstring) for docstring in _docstrings(Path(place, name)))


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=False) or ""


def _cleaned(text: str) -> str:
    """The prose of a docstring or topic, without interactive sessions, underlined titles and most markup."""
    lines: list[str] = []
    in_session = False
    for line in inspect.cleandoc(text).splitlines():
        in_session = bool(line.strip()) and (in_session or line.lstrip().startswith(">>>"))
        if not in_session and not re.fullmatch(r"\s*(?:([*=~^#+\"'.-])\1{2,}|\.\. [\w-]+::.*)", line):
            lines.append(line.rstrip())
    plain = re.sub(r"(?::[a-z:]+:)?(`{1,2})~?([^`'\n]+)\1", r"\2", "\n".join(lines))
    # A docstring may spell out half of a surrogate pair, which has no bytes and so no tokens.
    encodable = plain.encode("utf-8", errors="replace").decode("utf-8")
    # Lines are broken where the source was, which says nothing about English.
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", encodable)).strip()


def _unrepeated(documents: Iterable[str]) -> Iterator[str]:
    """Each document without the paragraphs that stood before; those under 40 characters may stand again."""
    seen: set[str] = set()
    for document in documents:
        fresh: list[str] = []
        for paragraph in document.split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                fresh.append(paragraph)
            if len(words) >= 40:
                seen.add(words)
        if sum(map(len, fresh)) >= 100:
            yield "\n\n".join(fresh)
