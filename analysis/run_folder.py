"""The folder of a run: made, refused or reused, always with a sentence that says why."""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minitf.files import is_unfinished, settings_of_run, write_atomically
from minitf.memory import out_of_memory

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
FOLDERS = ("arrays", "figures", "checkpoints", "data", "start", "model", "models", "tensorboard", "wandb")
FILES = (
    *("report.html", "claims.json", "fig6.json", "ablate.json", "mixers.json", "walk.json", CONFIG),
    *("config.toml", "data.json", "metrics.jsonl", "samples.jsonl", "statistics.safetensors"),
)

# What to do when results can be written again.
WITH_RESUME = "What was finished is there; when this is put right, the same command with --resume goes on."
ANEW = "When this is put right, run the same command again."


class Problem(ValueError):
    """Something that a person can put right; its message says how. ``exit_code`` is that of the command."""

    exit_code = 2


class Diverged(Problem):
    """Training stopped at a loss that is not finite."""

    exit_code = 1


@contextmanager
def told_to_people() -> Iterator[None]:
    """Make a problem of the errors of code that reads what a person gave, whose messages are for people."""
    try:
        yield
    except Problem:
        raise
    except (ValueError, OSError) as error:
        raise Problem(str(error)) from error


@contextmanager
def telling_of_memory(then: str) -> Iterator[None]:
    """Tell people where a device has no room, and what to do ``then``; raises Problem in place of JAX's error."""
    try:
        yield
    except Exception as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise Problem(f"there is not enough memory on the device: {said}. {then}") from error


@contextmanager
def writing_results(folder: Path, then: str = WITH_RESUME) -> Iterator[None]:
    """Tell people where results cannot be written, and what to do then; raises Problem in place of OSError.

    A file that vanished meanwhile, of the run or one that it reads, is told by its own name.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise Problem(f"{error.filename or error} is not there any more. {then}") from error
    except OSError as error:
        raise Problem(f"the results could not be written to {folder}: {error}. {then}") from error


def open_run_folder(
    out: Path,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
    changed: Collection[str] = (),
    usual: Mapping[str, Any] = MappingProxyType({}),
    resumable: bool = True,
) -> Path:
    """A folder that can be written, with ``config.json`` in it, for one run.

    A folder that holds a run is refused, unless ``overwrite`` (what the run made is removed, other files stay) or
    ``resume`` (it must be a run of the same configuration, but for what is ``changed``; what an older run did not
    record was as is ``usual``), which a command that is not ``resumable`` does not have. A folder that holds
    anything else is always refused.

    Raises:
        Problem: the folder cannot be made, written or used.
    """
    check_run_folder(
        out, config, overwrite=overwrite, resume=resume, changed=changed, usual=usual, resumable=resumable
    )
    try:
        if overwrite:
            _remove_run(out)
        _remove_unfinished(out)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / CONFIG, _as_json(config).encode())
    except OSError as error:
        raise _unusable(out, error) from error
    return out


def hold(out: Path, until: ExitStack) -> None:
    """Make a folder and hold it, ``until`` the end of a context or of this process, so that no other one does.

    Where the system or the file system has no locks, or there is no such folder but a file, nothing is held.

    Raises:
        Problem: another process holds it, or it cannot be made.
    """
    if not out.exists():
        check_writable(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(out, error) from error
    if fcntl is not None and out.is_dir():
        descriptor = os.open(out, os.O_RDONLY)
        until.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Problem(
                f"another process is at work in {out}. Wait until it ends, or choose another folder with --out."
            ) from None
        except OSError:
            pass


def recorded(out: Path) -> dict[str, Any]:
    """The configuration of the run in ``out``; empty where there is none that can be read."""
    try:
        return settings_of_run(out / CONFIG) or {}
    except OSError:
        return {}


def check_run_folder(
    out: Path,
    config: dict[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
    changed: Collection[str] = (),
    usual: Mapping[str, Any] = MappingProxyType({}),
    resumable: bool = True,
) -> None:
    """Refuse what :func:`open_run_folder` would refuse, as far as that can be told without writing.

    Raises:
        Problem: the folder cannot be used.
    """
    if overwrite and resume:
        raise Problem("--overwrite and --resume exclude each other: replace the run, or go on with it.")
    try:
        entries = sorted(p.name for p in out.iterdir() if not is_unfinished(p)) if out.exists() else []
        if not entries:
            check_writable(out)
            return
        if CONFIG not in entries:
            raise Problem(
                f"{out} is not empty and holds no run of minitf (there is {entries[0]}, but no {CONFIG}). "
                "Choose another folder with --out."
            )
        before = settings_of_run(out / CONFIG)
    except OSError as error:
        raise _unusable(out, error) from error
    if before is None and not set(entries) <= {*FOLDERS, *FILES}:
        raise Problem(
            f"{out / CONFIG} is not that of a run of minitf, and {out} holds other files. "
            "Choose another folder with --out."
        )
    if overwrite:
        return
    if before is None:
        raise Problem(f"{out / CONFIG} is damaged. Use --overwrite to run anew, or another folder with --out.")
    if not resume:
        go_on = "--resume to go on with it, " if resumable else ""
        raise Problem(
            f"{out} already holds a run. Add {go_on}--overwrite to replace it, or choose another folder with "
            "--out."
        )
    plain = lambda one: json.loads(_as_json(dict(one)))
    held = lambda one: {name: value for name, value in one.items() if name not in changed}
    _check_same(held({**plain(usual), **before}), held(plain(config)), out)


def check_writable(out: Path) -> None:
    """Refuse a folder when it, or the nearest one above it that exists, takes no new entries.

    Raises:
        Problem: the folder cannot be written or made.
    """
    nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise _unusable(out, f"{nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unusable(out, f"{nearest} is not yours to write in")


def _as_json(config: dict[str, Any]) -> str:
    return json.dumps({"made_by": "minitf", **config}, indent=1)


def _unusable(out: Path, reason: object) -> Problem:
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    return Problem(f"{out} cannot be used for the results: {reason}. Choose another folder with --out.")


def _check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    told = lambda one, name: repr(one[name]) if name in one else "not given"
    changes = [
        f"{name} was {told(before, name)} and is {told(now, name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changes:
        raise Problem(
            f"{out} holds a run with other settings ({', '.join(changes)}). Use the same settings, or --overwrite "
            "to replace it."
        )


def _remove_unfinished(out: Path) -> None:
    """Remove what writes that were killed left in the folders of a run."""
    own = [out / name for name in FOLDERS]
    for folder in (out, *own, *(inner for one in own for inner in one.glob("*/"))):
        for file in folder.glob(".*"):
            if is_unfinished(file):
                file.unlink(missing_ok=True)


def _remove_run(out: Path) -> None:
    """Remove what a run writes, and nothing else."""
    for name in FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    for name in FILES:
        (out / name).unlink(missing_ok=True)
