"""Where a large file cannot be written, by the operating system's own word."""

import resource
from contextlib import contextmanager


@contextmanager
def no_file_larger_than(size):
    """In this process, writing beyond so many bytes of a file raises OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
