"""A fixture for modules of tests in which compiling takes longest; a module that imports it uses it."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def quick_compiling():
    """XLA optimizes next to nothing: for tests of what programs compute, not of what they cost."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
