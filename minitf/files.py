"""Files: written so that nobody ever reads half of one; known as those of a command."""

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any


def settings_of_run(file: Path) -> dict[str, Any] | None:
    """What the config.json in the folder of a command says; None when it is damaged, or another program's.

    Raises OSError.
    """
    try:
        settings = json.loads(file.read_bytes())
    except ValueError:
        return None
    return settings if isinstance(settings, dict) and settings.get("made_by") == "minitf" else None


def is_unfinished(path: Path) -> bool:
    """Whether a file is what a write that was killed left, under a name that nobody reads."""
    return re.fullmatch(r"\..+[.-][0-9a-f]{32}", path.name) is not None and path.is_file()


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
