"""Commands that tests run again and again compile the same programs: once is enough for all of them."""

import os
import sys
import tempfile
from pathlib import Path

from xla_flags import LIGHTLY, WHOLE

# ``python -m minitf``, with the usual answer to Ctrl-C whoever started the tests: a shell starts what runs in the
# background without one.
INTERRUPTIBLE = [
    sys.executable,
    "-c",
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('minitf', run_name='__main__', alter_sys=True)",
]

_ROOT = Path(__file__).parents[1]
_FOLDER = tempfile.TemporaryDirectory()


def environment(**more):
    """That of this process, with a folder for compiled programs that lasts as long as it."""
    kept = {
        "JAX_COMPILATION_CACHE_DIR": _FOLDER.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    }
    return os.environ | kept | more


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
    return environment(JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS=f"--xla_backend_optimization_level=1 {WHOLE}")
