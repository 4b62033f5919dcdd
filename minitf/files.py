"""Writing files so that nobody ever reads half of one."""

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file (and its folders) so that nobody ever sees half of it, were a plug pulled. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # its name may reach the disk before what is in it does
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
