"""The same numbers on other people's boards, where the user asked for it by name."""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minitf.files import write_atomically
from minitf.train.config import KeepSettings


@runtime_checkable
class Board(Protocol):
    """Takes numbers by name."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Of a step."""

    def close(self, failed: bool) -> None:
        """Nothing more will come."""


class TensorBoard:
    """Event files in a folder, by tensorboardX or PyTorch."""

    def __init__(self, folder: Path, done: int) -> None:
        module = _first_of(("tensorboardX", "torch.utils.tensorboard"), "keep.tensorboard", "tensorboardX")
        # What a killed run has shown of steps that will be taken again is hidden.
        self._writer = module.SummaryWriter(str(folder), purge_step=done + 1 if done else 0)

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write them, so that a killed run has shown them."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project of wandb, which sends them over the network.

    Raises:
        ValueError: wandb is not installed, or does not begin: nobody is logged in, or no server answers.
    """

    def __init__(self, out: Path, project: str, settings: Mapping[str, Any], quiet: bool) -> None:
        module = _first_of(("wandb",), "keep.wandb", "wandb")
        try:
            self._run = module.init(
                project=project,
                dir=str(out),
                name=out.resolve().name,
                id=_its_own(out / "wandb" / "run_id"),
                resume="allow",
                config=dict(settings),
                settings=module.Settings(silent=quiet),
            )
        except module.Error as error:
            raise ValueError(f"keep.wandb is {project}, but Weights & Biases says: {error}") from error

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send them; of steps that a killed run has sent before, it keeps the first."""
        self._run.log(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(failed))


@contextmanager
def boards(
    keep: KeepSettings, out: Path, *, done: int = 0, settings: Mapping[str, Any] | None = None, quiet: bool = False
) -> Iterator[list[Board]]:
    """Those that were asked for, until the run ends.

    Args:
        keep: says which.
        out: the run's folder.
        done: steps that were taken before.
        settings: of the run, by name, for boards that show them.
        quiet: nothing is printed.

    Raises:
        ValueError: a package is missing, or its board cannot be used.
    """
    with ExitStack() as ends:
        found: list[Board] = []

        def add(board: Board) -> None:
            found.append(board)
            ends.push(lambda error, *_: board.close(failed=error is not None))

        if keep.tensorboard:
            add(TensorBoard(out / "tensorboard", done))
        if keep.wandb:
            add(WeightsAndBiases(out, keep.wandb, settings or {}, quiet))
        yield found


def show(boards: Iterable[Board], lines: Iterable[Mapping[str, Any]]) -> None:
    """Put lines of a log on all boards; of many models each number's mean over those that are not lost."""
    for line in lines:
        numbers = {
            name: _mean_of_finite(value) for name, value in line.items() if name not in ("step", "steps", "text")
        }
        for board in boards:
            board.add(line["step"], numbers)


def _mean_of_finite(value: Any) -> float:
    numbers = np.asarray(value, float)
    finite = numbers[np.isfinite(numbers)]
    return float(np.mean(finite if finite.size else numbers))


def _its_own(file: Path) -> str:
    """The name by which a board knows the run of this folder, also when it goes on; made up once."""
    if not file.exists():
        write_atomically(file, secrets.token_hex(8).encode())
    return file.read_text().strip()


def _first_of(modules: Iterable[str], setting: str, package: str) -> Any:
    for name in modules:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ValueError(f"{setting} needs the package {package}: pip install {package}")
