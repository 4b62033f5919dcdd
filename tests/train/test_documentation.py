import ast
import random
import sys
import sysconfig
from pathlib import Path

import pytest

from minitf.train import corpus, documentation
from minitf.train.corpus import python_documentation


def prose(paragraphs, seed=0):
    words = "the scan is slow and then attention snaps to distinct tokens while common ones fade".split()
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(words, k=60)) for _ in range(paragraphs))


@pytest.fixture(scope="module")
def python_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_the_default_text_is_megabytes_of_prose_in_two_separate_sides(python_cache):
    if not Path(sysconfig.get_path("stdlib"), "argparse.py").exists():
        pytest.skip("this Python comes without the sources of its library")
    found = python_documentation(python_cache)
    train, validation = "\n\n".join(found.train), "\n\n".join(found.validation)
    assert len(train) > 1_000_000 and len(validation) > 100_000
    assert "the" in train.split() and "statement" in train
    assert "\n>>>" not in train
    long = [
        {" ".join(paragraph.split()) for paragraph in side.split("\n\n") if len(paragraph) > 60}
        for side in (train, validation)
    ]
    assert not long[0] & long[1]
    (train + validation).encode("utf-8")


def test_the_default_text_is_kept_and_read_back(python_cache, monkeypatch):
    first = python_documentation(python_cache)

    def parse(*args):
        raise AssertionError("the sources were read again")

    monkeypatch.setattr(ast, "parse", parse)
    assert python_documentation(python_cache) == first


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of one's own, with nothing in it, and no topics."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    (tmp_path / "library").mkdir()
    return tmp_path / "library"


def module(text):
    return f'"""{text}"""\nraise SystemExit("this module must not run")\n'


def test_modules_are_parsed_not_run_and_tests_and_installed_packages_left_out(library, tmp_path):
    for number in range(5):
        (library / f"module{number}.py").write_text(module(prose(60, number)))
    for left_out in ("test", "site-packages", "idlelib", ".hidden", "email/tests"):
        (library / left_out).mkdir(parents=True)
        (library / left_out / "module.py").write_text(module("LEFT OUT " * 100))
    (library / "broken.py").write_text('"""' + prose(3, 9))
    (library / "binary.py").write_bytes(b"\0\xff")
    found = python_documentation(tmp_path / "cache")
    assert sorted(found.train + found.validation) == sorted(prose(60, number) for number in range(5))


def test_half_a_surrogate_pair_in_a_docstring_does_no_harm(library, tmp_path):
    for number in range(5):
        (library / f"module{number}.py").write_text(module(prose(60, number) + " \\ud800 end"))
    found = python_documentation(tmp_path / "cache")
    assert all(document.encode().endswith(b"? end") for document in found.train)


def test_a_python_with_topics_only_will_do(library, tmp_path, monkeypatch):
    topics = type(sys)("pydoc_data.topics")
    topics.topics = {str(number): prose(60, number) for number in range(5)}
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", topics)
    library.rmdir()
    found = python_documentation(tmp_path / "cache")
    assert len(found.train + found.validation) == 5


def test_a_python_without_documentation_says_so(library, tmp_path):
    (library / "module.py").write_text(module(prose(10)))
    with pytest.raises(ValueError, match="has only .* characters here .at least 50000"):
        python_documentation(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1, 2]", b'{"documents": ["a"], "sha256": "0"}', b"\xff\0"])
def test_a_damaged_cache_is_made_again(library, tmp_path, damage):
    for number in range(5):
        (library / f"module{number}.py").write_text(module(prose(60, number)))
    first = python_documentation(tmp_path / "cache")
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert python_documentation(tmp_path / "cache") == first
    assert kept.read_bytes() == whole


def test_without_a_cache_that_can_be_written_the_text_is_there_all_the_same(library, tmp_path, monkeypatch):
    for number in range(5):
        (library / f"module{number}.py").write_text(module(prose(60, number)))
    (tmp_path / "file").write_text("in the way")
    assert python_documentation(tmp_path / "file" / "cache").train
    monkeypatch.setattr(corpus, "cache_folder", lambda: None)
    assert python_documentation().train


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus.cache_folder() == tmp_path / "minitf"
    # The standard says that a relative folder is to be ignored.
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert corpus.cache_folder() == tmp_path / "home" / ".cache" / "minitf"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("A title\n=======\n\nText.", "A title\n\nText."),
        ("Use it:\n\n    >>> f(1)\n    2\n\nThen this.", "Use it:\n\nThen this."),
        ("See :meth:`~a.b` and ``c`` or `d`.", "See a.b and c or d."),
        (".. note::\n   Mind this.", "   Mind this."),
        ("An `old-style' quote and `another'.", "An `old-style' quote and `another'."),
    ],
)
def test_markup_and_sessions_are_taken_out_of_docstrings(docstring, expected):
    assert documentation._cleaned(docstring) == expected.strip()
