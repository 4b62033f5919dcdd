"""Where arrays lie on a mesh of devices, from how weights were declared: one line of settings, no second code
path.

The mesh has three axes. ``data`` divides the batch. ``fsdp`` divides the batch too, and the width of every weight
and of what the optimizer keeps of it (gathered where it is used: Zhao et al. 2023). ``tensor`` divides heads,
hidden neurons and the vocabulary (Shoeybi et al. 2019). XLA does the rest; one device is a mesh of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minitf import ModelConfig
from minitf.declaration import Declaration, declared
from minitf.parameters import path_name
from minitf.train.config import MeshSettings, TrainingSettings

Tree = Any
DIVIDED = {
    **dict.fromkeys(("head", "key_value_head", "hidden", "vocabulary"), "tensor"),
    "width": "fsdp",
}
BATCH = ("data", "fsdp")


def mesh_of(settings: MeshSettings, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh. Raises ValueError where there are too few devices, or it has none of a process."""
    devices = jax.devices() if devices is None else devices
    if settings.devices > len(devices):
        raise ValueError(
            f"the mesh needs {settings.data} x {settings.fsdp} x {settings.tensor} = {settings.devices} devices, "
            f"and there {'is' if len(devices) == 1 else 'are'} {len(devices)}; make mesh.data, mesh.fsdp or "
            "mesh.tensor smaller"
        )
    has_one = {device.process_index for device in devices[: settings.devices]}
    without = {device.process_index for device in devices} - has_one
    if without:
        raise ValueError(
            f"the mesh has {settings.devices} of the {len(devices)} devices, and none of process {min(without)}: "
            "every process takes part, so make mesh.data, mesh.fsdp or mesh.tensor larger, or start fewer"
        )
    shape = (settings.data, settings.fsdp, settings.tensor)
    return jax.make_mesh(
        shape,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=list(devices)[: settings.devices],
    )


def check_divides(training: TrainingSettings, mesh: MeshSettings) -> None:
    """Raise ValueError for a mesh whose devices cannot have as many sequences each of a part of the batch."""
    sequences, over = training.batch // training.accumulate, mesh.data * mesh.fsdp
    if sequences % over:
        raise ValueError(
            f"{sequences} sequences (training.batch / training.accumulate) cannot be divided among {mesh.data} x "
            f"{mesh.fsdp} devices (mesh.data x mesh.fsdp); choose a multiple of {over}"
        )


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def of_windows(mesh: Mesh) -> NamedSharding:
    """Of ``[seed, step, batch, length + 1]``: every device has its sequences."""
    return NamedSharding(mesh, P(None, None, BATCH, None))


def of_stream(mesh: Mesh) -> NamedSharding | None:
    """Of the residual stream: divided as the batch is; None on one device."""
    return NamedSharding(mesh, P(BATCH, None, None)) if mesh.size > 1 else None


def of_weight(declaration: Declaration, sizes: Mapping[str, int]) -> P:
    """How a weight is divided by a mesh of these sizes: each axis once at most, and only where it fits evenly."""
    taken: set[str] = set()
    names: list[str | None] = []
    for axis, size in declaration.axes:
        name = DIVIDED.get(axis)
        fits = name is not None and name not in taken and size % sizes[name] == 0
        names.append(name if fits else None)
        if fits:
            taken.add(str(name))
    return P(*names)


def of_state(state: Tree, config: ModelConfig, mesh: Mesh, batched: bool) -> Tree:
    """Where each array of a training state lies.

    What has a weight's name at the end of its own and its shape (moments, means) is divided as that weight is.
    What was made of it in another shape (codes, scales) is divided along those leading axes that are the weight's.
    The rest is whole everywhere. Many models side by side are not divided.
    """
    if batched:
        return jax.tree.map(lambda _: everywhere(mesh), state)
    weights = declared(config)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        of = max((w for w in weights if f".{name}.".find(f".{w}.") >= 0), key=len, default=None)
        if of is None:
            return everywhere(mesh)
        return NamedSharding(mesh, _like(leaf.shape, weights[of], mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def _like(shape: tuple[int, ...], declaration: Declaration, mesh: Mesh) -> P:
    spec = of_weight(declaration, mesh.shape)
    if shape == declaration.shape:
        return spec
    same = 0
    while same < min(len(shape), len(declaration.shape)) and shape[same] == declaration.shape[same]:
        same += 1
    return P(*spec[:same])


def part_of_batch(mesh: Mesh, batch: int) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process reads: all of it where it has no such part."""
    found: Any = of_windows(mesh).addressable_devices_indices_map((1, 1, batch, 1))
    mine = sorted({place[2].indices(batch)[:2] for place in found.values()})
    first, size = mine[0][0], sum(stop - start for start, stop in mine)
    if mine[-1][1] - first != size or batch % size or first % size:
        return 0, 1
    return first // size, batch // size


def placed(windows: np.ndarray, mesh: Mesh, batch: int) -> jax.Array:
    """This process's part of the windows of a batch, or all of them, as an array of all processes."""
    shape = (*windows.shape[:2], batch, *windows.shape[3:])
    return jax.make_array_from_process_local_data(of_windows(mesh), windows, shape)


def placed_whole(tree: Tree, where: Tree) -> Tree:
    """Arrays that every process has whole, each device's part where it belongs."""
    return jax.tree.map(lambda x, at: jax.make_array_from_callback(x.shape, at, lambda part: x[part]), tree, where)
