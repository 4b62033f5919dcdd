"""Several processes of one run: the first writes what there is one of; the others wait for it where they must."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join() -> None:
    """Find the other processes: by the environment's variables, or as the cluster says.

    Raises ValueError where they are not found.
    """
    given = {name: os.environ.get(name) for name in VARIABLES}
    try:
        if all(given.values()):
            address, many, number = given.values()
            jax.distributed.initialize(address, int(str(many)), int(str(number)))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the other processes of this run were not found: {error}. On TPU pods, Slurm and Open MPI they are; "
            f"elsewhere set {', '.join(VARIABLES)} in each of them."
        ) from error


def is_first() -> bool:
    """Whether this process writes what there is one of."""
    return jax.process_index() == 0


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process does what is inside, then the others."""
    if not is_first():
        wait(name)
    yield
    if is_first():
        wait(name)


def agreed(asked: int | None) -> int | None:
    """The signal that any of the processes was sent; the same in all of them, so that they end after one step."""
    if jax.process_count() == 1:
        return asked
    return int(np.max(multihost_utils.process_allgather(np.int32(asked or 0)))) or None


def wait(name: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
