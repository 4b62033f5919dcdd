"""For all tests."""

import gc
import os

import hypothesis
import jax
import pytest
from compiled_once import kept_in

# An error's message is compared to its end, to which JAX would add what it left out of the stack trace.
jax.config.update("jax_traceback_filtering", "off")

# Where in the source a compiled operation comes from is read by nobody here, and takes a tenth of the time; nearly
# as much goes into looking for garbage among the millions of objects of JAX and of the peers.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(200_000, 20, 50)

# How long an example takes says how busy the machine is, and that compiling takes time, and nothing else.
hypothesis.settings.register_profile("minitf", deadline=None)
hypothesis.settings.load_profile("minitf")

# Begun first, longest first, so that at the end no worker waits minutes for the other.
LONGEST = (
    *("test_command.py", "test_in_models.py", "test_train_command.py", "test_sharding.py", "test_contract.py"),
    *("test_fourbit.py", "test_hybrids.py", "test_edits.py", "test_bench.py", "test_step.py", "test_readme.py"),
    *("test_walk_bench.py", "test_patching.py", "test_plan.py", "test_exact_walk.py", "test_free_when_unused.py"),
    *("test_report_in_a_browser.py", "test_decode.py", "test_mixer_study.py", "test_mixers_command.py"),
)


def pytest_configure(config):
    """A program is compiled once for all modules, all processes and all runs: ``--cache-clear`` forgets them."""
    for name, value in kept_in(config.cache.mkdir("programs")).items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for commands in processes of their own
    # On some processors XLA says of each program that it reads again that it was compiled for another one: what
    # LLVM prefers there is not among what the processor can do.
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def pytest_collection_modifyitems(items):
    """Files stay whole and in order, but for the longest."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish():
    """What is loaded by now stays to the end: to look through it for garbage after every module takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_do_not_pile_up():
    """A thousand tests compile gigabytes of programs, and no module needs those of another."""
    yield
    jax.clear_caches()
