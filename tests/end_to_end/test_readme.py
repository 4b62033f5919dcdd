"""What the documents show, runs."""

import re
import shlex
from pathlib import Path

import pytest

from minitf import cli
from minitf.cli_training import Train
from minitf.train.settings import as_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_python_examples_run_from_top_to_bottom(document):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def test_the_commands_that_it_shows_can_be_understood():
    shown = re.findall(r"^    minitf ([a-z-]+ [^\[\n]*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(shown) >= 3
    for line in shown:
        command = cli.parsed(shlex.split(line))
        if isinstance(command, Train):
            as_config(command.tables())
    fresh, going_on = (cli.parsed(shlex.split(line)) for line in shown if "--text" in line)
    assert fresh.text == going_on.text == ("shakespeare.txt",)
    assert as_config(going_on.tables()).model == {"length": 256}
    assert going_on.tables()["training"]["start_from"] == "hub:openai-community/gpt2"


def test_the_package_layout_in_the_readme_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    for folder in ("minitf", "train", "analysis", "tests"):
        assert (ROOT / folder).is_dir()
        assert f"    {folder}/" in readme
