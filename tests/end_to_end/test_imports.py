"""Imports point one way: minitf <- minitf.train <- minitf.analysis, and nobody needs a peer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = sorted(
    [
        p
        for p in (ROOT / "minitf").glob("*.py")
        if p.name not in ("cli.py", "cli_training.py", "cli_words.py", "__main__.py")
    ]
    + list((ROOT / "minitf" / "families").glob("*.py"))
)
TRAIN = sorted((ROOT / "train").rglob("*.py"))
ANALYSIS = sorted((ROOT / "analysis").rglob("*.py"))
PEERS = {"torch", "transformers", "transformer_lens", "tensorflow"}


def imported(file):
    """Every module that a file imports, wherever in the file, by its full name; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relative to itself"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def of(file):
    return file.relative_to(ROOT).as_posix()


def within(name, package):
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("file", CORE, ids=of)
def test_the_core_imports_neither_training_nor_analysis(file):
    assert not [m for m in imported(file) if within(m, "minitf.train") or within(m, "minitf.analysis")]


@pytest.mark.parametrize("file", TRAIN, ids=of)
def test_training_does_not_import_analysis(file):
    assert not [m for m in imported(file) if within(m, "minitf.analysis")]


@pytest.mark.parametrize("file", [*CORE, *TRAIN, *ANALYSIS], ids=of)
def test_the_folders_at_the_top_are_imported_only_as_parts_of_minitf(file):
    assert not [m for m in imported(file) if m.split(".")[0] in ("train", "analysis")]


@pytest.mark.parametrize("file", [*CORE, *TRAIN], ids=of)
def test_no_peer_is_imported(file):
    assert not [m for m in imported(file) if m.split(".")[0] in PEERS]


def test_the_core_loads_without_training_analysis_or_a_peer():
    program = (
        "import sys, minitf, minitf.tokenizer, minitf.cli\n"
        f"print([m for m in sys.modules if m.split('.')[0] in {PEERS!r} "
        "or m.startswith(('minitf.train', 'minitf.analysis'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
