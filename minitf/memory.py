"""How much memory the machine has, and what JAX says when there is not enough."""

import os


def machine_bytes() -> int | None:
    """Bytes of this machine's memory; None where its system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # of systems without sysconf, or without these names
        return None


def out_of_memory(error: BaseException) -> str | None:
    """What JAX says of memory that it asked for in vain, in one line; None for any other error."""
    _, exhausted, said = str(error).partition("RESOURCE_EXHAUSTED:")
    if not isinstance(error, RuntimeError) or not exhausted:  # JAX's own error is one
        return None
    return said.strip().partition("\n")[0][:200].rstrip(".")
