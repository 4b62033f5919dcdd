"""For tests that look at pages."""

import pytest
from browsing import a_browser


@pytest.fixture(scope="module")
def browser():
    """A headless browser, or a reason to skip."""
    yield from a_browser()
