"""The same numbers on other people's boards, where the user asked for it by name."""

from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minitf.train.config import KeepSettings


@runtime_checkable
class Board(Protocol):
    """Takes numbers by name."""

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Of a step."""


class TensorBoard:
    """Event files in a folder, by tensorboardX or PyTorch."""

    def __init__(self, folder: Path) -> None:
        module = _first_of(("tensorboardX", "torch.utils.tensorboard"), "keep.tensorboard", "tensorboardX")
        self._writer = module.SummaryWriter(str(folder))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write them, so that a killed run has shown them."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class WeightsAndBiases:
    """A run of a project of wandb, which sends them over the network."""

    def __init__(self, folder: Path, project: str) -> None:
        module = _first_of(("wandb",), "keep.wandb", "wandb")
        # The same folder is the same run, also when it goes on.
        self._run = module.init(project=project, dir=str(folder), name=folder.name, id=folder.name, resume="allow")

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send them."""
        self._run.log(dict(numbers), step=step)


def boards(keep: KeepSettings, out: Path) -> list[Board]:
    """Those that were asked for. Raises ValueError where a package is missing."""
    found: list[Board] = []
    if keep.tensorboard:
        found.append(TensorBoard(out / "tensorboard"))
    if keep.wandb:
        found.append(WeightsAndBiases(out, keep.wandb))
    return found


def show(boards: Iterable[Board], lines: Iterable[Mapping[str, Any]]) -> None:
    """Put lines of a log on all boards; of many models each number's mean."""
    for line in lines:
        numbers = {
            name: float(np.mean(value)) for name, value in line.items() if name not in ("step", "steps", "text")
        }
        for board in boards:
            board.add(line["step"], numbers)


def _first_of(modules: Iterable[str], setting: str, package: str) -> Any:
    for name in modules:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ValueError(f"{setting} needs the package {package}: pip install {package}")
