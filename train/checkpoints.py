"""Checkpoints by Orbax: written beside the training, whole or not at all; the newest is where a run goes on.

A step's folder appears under its name only when everything in it is on disk, so a run that is killed at any
moment, in the middle of a write too, finds the one before.
"""

import logging
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from orbax.checkpoint import checkpoint_managers

from minitf.train.config import KeepSettings

Tree = Any
# Where a checkpoint is moved before it is removed: killed half-way, that leaves no ruin under its step's name.
ASIDE = ".removed"


class Checkpoints:
    """The checkpoints of a run, in a folder. Use it as a context: leaving it waits until all is written.

    Raises:
        ValueError: the folder cannot be written, now or later (a full disk); what was kept before stays.
    """

    def __init__(self, folder: Path, keep: KeepSettings, steps: int) -> None:
        self.folder = folder.absolute()
        policies = checkpoint_managers.preservation_policy
        kept: list[Any] = [policies.LatestN(keep.last)]
        if keep.every:
            kept.append(policies.EveryNSteps(keep.every))
        if keep.dynamics:
            kept.append(policies.CustomSteps(dynamics_steps(steps)))
        quiet()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            create=True,
            todelete_subdir=ASIDE,
        )
        self._remove_aside()
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise ValueError(f"{self.folder} cannot be used for checkpoints: {error}") from error

    def __enter__(self) -> "Checkpoints":
        self._heard = sys.unraisablehook
        sys.unraisablehook = self._hear
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
                with self._told():
                    self._manager.close()
        except ValueError as said:
            kind = type(said)
            raise
        finally:
            if kind is not None:  # of all that goes wrong people are told the first
                with suppress(Exception):
                    self._manager.close()
            sys.unraisablehook = self._heard

    def _hear(self, unraisable: Any) -> None:
        # When one write has failed, which is told, nobody waits for the others that are under way.
        if str(unraisable.exc_value) != "Event loop is closed":
            self._heard(unraisable)

    def steps(self) -> list[int]:
        """The steps of which there are whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree) -> None:
        """Begin to write; training may go on, and may give the state's memory away."""
        if step in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # On a CPU Orbax would write from the memory that the next steps write to.
            state = _copied(state)
        self.wait()
        with self._told():
            kept = {"state": state, "digests": digests(state)}
            self._manager.save(step, args=ocp.args.StandardSave(kept))

    def wait(self) -> None:
        """Until everything is written."""
        with self._told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._remove_aside()

    def restore(self, like: Tree, step: int | None = None) -> tuple[int, Tree]:
        """The newest state (or that of a step), and its step.

        ``like`` has its shapes and dtypes, and, on several devices, where its parts lie: not necessarily where
        they lay when it was written.

        Raises:
            ValueError: there is none, or it is damaged; then the older ones are named.
        """
        there = self.steps()
        if not there or (step is not None and step not in there):
            raise ValueError(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        step = there[-1] if step is None else step
        wanted = _placed({"state": like, "digests": jax.eval_shape(digests, like)})
        try:
            kept = self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except Exception as error:  # what Orbax and TensorStore raise of damaged files has no common type
            raise ValueError(self._damaged(step, there, said_by(error))) from error
        if not np.array_equal(kept["digests"], digests(kept["state"])):
            raise ValueError(self._damaged(step, there, "its numbers are not those that were written"))
        return step, kept["state"]

    def _remove_aside(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / ASIDE, ignore_errors=True)

    def _damaged(self, step: int, there: Iterable[int], why: str) -> str:
        older = [one for one in there if one < step]
        what = (
            f"Remove that folder, and the same command goes on from step {older[-1]}."
            if older
            else "There is no older one: begin anew in another folder, or with --overwrite."
        )
        return f"the checkpoint {self.folder / str(step)} cannot be read: {why}. {what}"

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Make what goes wrong while writing a sentence for people."""
        try:
            yield
        except Exception as error:
            raise ValueError(
                f"a checkpoint could not be written to {self.folder}: {error}. Those before it are whole; when "
                "this is put right, the same command goes on from the newest."
            ) from error


def said_by(error: Exception) -> str:
    """What Orbax or TensorStore says is wrong, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def quiet() -> None:
    """Of what Orbax does, it tells at length; of what it cannot do, it raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@jax.jit
def digests(state: Tree) -> Array:
    """A number for each array, ``[array]``, that changes with any of its bits and with their places.

    Orbax notices files that are missing or cut short, but not every changed byte in them.
    """
    return jnp.stack([_digest(x) for x in jax.tree.leaves(state)])


def _digest(x: Array) -> Array:
    """The sum of all numbers' bits, each times an odd number of its own, modulo 2^32."""
    bits = x.astype(jnp.uint8) if x.dtype == bool else x
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[bits.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(bits, unsigned).astype(jnp.uint32)
    odd = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape) * jnp.uint32(2654435762) + jnp.uint32(1)
    return jnp.sum(bits * odd, dtype=jnp.uint32)


def dynamics_steps(steps: int) -> list[int]:
    """0, 1, 2, 4, ... 512, then every 1000, and the last: where Pythia was kept (Biderman et al. 2023)."""
    doubled = [0, *(2**power for power in range(10))]
    return sorted({*(step for step in (*doubled, *range(1000, steps, 1000)) if step < steps), steps})


def _placed(like: Tree) -> Tree:
    """The same, with a place for each: what has none, Orbax seeks on the devices that it was written from."""
    meshes = [one.sharding.mesh for one in jax.tree.leaves(like) if isinstance(one.sharding, NamedSharding)]
    elsewhere = NamedSharding(meshes[0], P()) if meshes else SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda one: jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=one.sharding or elsewhere), like
    )


@jax.jit
def _copied(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)
