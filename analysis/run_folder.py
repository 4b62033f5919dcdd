"""The folder of a run: made, refused or reused, always with a sentence that says why."""

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from minitf.files import write_atomically


class Problem(ValueError):
    """Something that a person can put right; its message says how."""


def open_run_folder(out: Path, config: dict[str, Any], *, overwrite: bool = False, resume: bool = False) -> Path:
    """A folder that can be written, with ``config.json`` in it, for one run.

    A folder that holds a run is refused, unless ``overwrite`` (what the run made is removed) or ``resume`` (it
    must be a run of the same configuration). A folder that holds anything else is always refused.

    Raises:
        Problem: the folder cannot be made, written or used.
    """
    config_file = out / "config.json"
    try:
        entries = sorted(p.name for p in out.iterdir()) if out.exists() else []
        if entries and not config_file.exists():
            raise Problem(
                f"{out} is not empty and holds no run of minitf (there is {entries[0]}, but no config.json). "
                "Choose another folder with --out."
            )
        if entries and resume:
            _check_same(json.loads(config_file.read_text()), json.loads(json.dumps(config)), out)
        elif entries and overwrite:
            _remove_run(out)
        elif entries:
            raise Problem(
                f"{out} already holds a run. Add --resume to go on with it, --overwrite to replace it, or choose "
                "another folder with --out."
            )
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()
        write_atomically(config_file, json.dumps(config, indent=1).encode())
    except (OSError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"its config.json is damaged ({error})"
        raise Problem(
            f"{out} cannot be used for the results: {reason}. Choose another folder with --out."
        ) from error
    return out


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    different = [key for key in now if before.get(key) != now[key]]
    if different:
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in different)
        raise Problem(
            f"{out} holds a run with other settings ({changes}). Use the same settings, or --overwrite to replace "
            "it."
        )


def _remove_run(out: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in ("arrays", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("report.html", "claims.json", "fig6.json", "config.json"):
        (out / name).unlink(missing_ok=True)
