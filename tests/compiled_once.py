"""Commands that tests run again and again compile the same programs: once is enough for all of them."""

import os
import sys
from pathlib import Path

from xla_flags import LIGHTLY

# ``python -m minitf``, with the usual answer to Ctrl-C whoever started the tests: a shell starts what runs in the
# background without one.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('minitf', run_name='__main__', alter_sys=True)",
]

_ROOT = Path(__file__).parents[1]


def kept_in(folder):
    """The settings with which JAX keeps every program that it compiles."""
    return {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }


def environment(**more):
    """That of this process, with the folder for compiled programs that ``conftest.py`` made."""
    return os.environ | {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"} | more


def lightly(devices=1):
    """The same, with little optimization, as the Makefile has it for this process; and so many virtual devices."""
    return environment(
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices} {LIGHTLY}",
        PYTHONPATH=str(_ROOT),
    )


def quickly():
    """The same, for programs that run for seconds, as long as it takes to compile them: half as well is sooner."""
    half = f"--xla_backend_optimization_level=1 {LIGHTLY}"
    return environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS=half)
