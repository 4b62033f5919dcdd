"""Commands that tests run again and again compile the same programs: once is enough for all of them."""

import os
import tempfile

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
