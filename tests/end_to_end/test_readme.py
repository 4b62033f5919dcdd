"""What the documents show, runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_the_python_examples_run_from_top_to_bottom(document):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def test_the_package_layout_in_the_readme_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    for folder in ("minitf", "train", "analysis", "tests"):
        assert (ROOT / folder).is_dir()
        assert f"    {folder}/" in readme
