"""PyTorch for the peers of a benchmark, also where there is no minitf."""

import importlib
from typing import Any


def begin_torch(device: str) -> Any:
    """The module: on a CPU with one thread; else all that is made is made on the GPU, if there is one."""
    torch = importlib.import_module("torch")
    if device == "cpu":
        torch.set_num_threads(1)
    elif torch.cuda.is_available():
        torch.set_default_device("cuda")
    return torch


def wait() -> None:
    """Until a GPU has done what it was given."""
    torch = importlib.import_module("torch")
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
