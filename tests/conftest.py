"""For all tests."""

import hypothesis
import jax
import pytest

# An error's message is compared to its end, to which JAX would add what it left out of the stack trace.
jax.config.update("jax_traceback_filtering", "off")

# How long an example takes says how busy the machine is, and that compiling takes time, and nothing else.
hypothesis.settings.register_profile("minitf", deadline=None)
hypothesis.settings.load_profile("minitf")


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """A thousand tests compile gigabytes of programs, and no module needs those of another."""
    yield
    jax.clear_caches()
