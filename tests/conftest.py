"""For all tests."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """A thousand tests compile gigabytes of programs, and no module needs those of another."""
    yield
    jax.clear_caches()
