"""What devices hold, how fast they read it and tell each other, as their makers state it; what programs tell."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from minitf.analysis.training.devices import names, peak

# NVIDIA's: JAX takes three quarters of the memory, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
OF_GPU = 0.75
# Google's: what the runtime keeps for itself, about.
OF_TPU = 0.92
# Without a maker's figure (cards in any server): 100 Gb/s for a node of eight.
SHARED_NETWORK = 12.5e9 / 8


@dataclass(frozen=True)
class Device:
    """One device, and the network around it; rates are a second and one way.

    Attributes:
        name: as JAX's ``device_kind`` has it, in part.
        kind: as JAX names the platform.
        memory: bytes.
        memory_rate: bytes read or written.
        near: bytes that it sends to others of its node (NVLink, PCIe), or along one axis of its pod (both ways
            round a ring of ICI).
        node: how many devices are near.
        far: bytes that each sends to other nodes or pods.
        usable: share of the memory that a program can have.
        float32: share of the peak that products of float32 have (TF32; a TPU multiplies them in bfloat16).
    """

    name: str
    kind: Literal["gpu", "tpu"]
    memory: float
    memory_rate: float
    near: float
    node: int
    far: float
    usable: float = OF_GPU
    float32: float = 0.5

    @property
    def operations(self) -> float:
        """Dense bfloat16 products, operations a second."""
        found = peak(self.name)
        assert found is not None, self.name
        return found

    def ring(self, apart: int, size: int) -> float:
        """Bytes a second that each of ``size`` devices, so many places apart, sends round a ring of them.

        Where the ring leaves the node, as many rings run as the node has devices of it, each over the network port
        of another.
        """
        if apart * size <= self.node:
            return self.near
        return min(self.near, max(self.node // apart, 1) * self.far)


@dataclass(frozen=True)
class Collective:
    """What the devices of one axis tell each other in a step.

    ``bytes`` are those of the whole arrays that each device gives or gets, in ``calls`` calls.
    """

    axis: str
    kind: str
    what: str
    bytes: int
    calls: int

    def sent(self, devices: int) -> float:
        """Bytes that each of n devices sends round a ring: 2 (n - 1) / n of an all-reduce, else (n - 1) / n."""
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (devices - 1) / devices


@dataclass(frozen=True)
class Time:
    """Seconds of a step.

    Attributes:
        compute: operations at the assumed share of the device's peak.
        update: reading and writing the state once.
        tensor: told within layers, which wait for it.
        fsdp, data: weights and gradients, told while layers compute.
    """

    compute: float
    update: float
    tensor: float
    fsdp: float
    data: float

    @property
    def total(self) -> float:
        """Weights and gradients hide behind the arithmetic as far as it takes; nothing else does."""
        return max(self.compute, self.fsdp + self.data) + self.tensor + self.update


def _tpu(name: str, memory: float, memory_rate: float, near: float, node: int, far: float) -> Device:
    return Device(name, "tpu", memory, memory_rate, near, node, far, usable=OF_TPU, float32=1.0)


# Sources: NVIDIA's data sheets of the SXM modules, where there are any (NVLink's figures there are both ways
# together: here half) and of DGX systems (a network port for each GPU: 400 Gb/s with H100 and H200, 200 with A100;
# four of 100 for eight V100); Google Cloud's pages on TPU versions (ICI is that of all ports of a chip together,
# both ways: a ring takes two of the four or six); "How to scale your model" (Austin et al. 2025) for the network
# between pods, v4's taken as v5p's.
DEVICES = (
    Device("H200", "gpu", 141e9, 4.8e12, 450e9, 8, 50e9),
    Device("H100", "gpu", 80e9, 3.35e12, 450e9, 8, 50e9),
    Device("A100-80", "gpu", 80e9, 2.039e12, 300e9, 8, 25e9),
    Device("A100-40", "gpu", 40e9, 1.555e12, 300e9, 8, 25e9),
    Device("V100", "gpu", 32e9, 0.9e12, 150e9, 8, 6.25e9, float32=15.7 / 125),
    Device("L40S", "gpu", 48e9, 0.864e12, 32e9, 8, SHARED_NETWORK),
    Device("L4", "gpu", 24e9, 0.3e12, 32e9, 8, SHARED_NETWORK),
    Device("A10G", "gpu", 24e9, 0.6e12, 32e9, 8, SHARED_NETWORK),
    Device("T4", "gpu", 16e9, 0.3e12, 16e9, 8, SHARED_NETWORK, float32=8.1 / 65),
    Device("RTX 4090", "gpu", 24e9, 1.008e12, 32e9, 8, SHARED_NETWORK),
    Device("RTX 3090", "gpu", 24e9, 0.936e12, 32e9, 8, SHARED_NETWORK),
    _tpu("TPU v6e", 32e9, 1.638e12, 200e9, 256, 12.5e9),
    _tpu("TPU v5p", 95e9, 2.765e12, 200e9, 8960, 6.25e9),
    _tpu("TPU v5e", 16e9, 0.819e12, 100e9, 256, 3.125e9),
    _tpu("TPU v4", 32 * 2.0**30, 1.2e12, 100e9, 4096, 6.25e9),
)
# JAX's names for a v5e and a v6e.
OTHER_NAMES = {"TPU v5 lite": "TPU v5e", "TPU v6 lite": "TPU v6e"}


def named(name: str) -> Device:
    """The device of that name, in any case and with or without "NVIDIA" and the like around it.

    An A100 has 40 GB unless its name has an 80 in it. Raises ValueError for a device that is not known.
    """
    known = {d.name: d for d in DEVICES}
    if names("A100", name):
        return known["A100-80" if "80" in name else "A100-40"]
    for part in (*known, *OTHER_NAMES):
        if names(part, name):
            return known[OTHER_NAMES.get(part, part)]
    raise ValueError(f"device is {name!r}, which is not known; those that are: {', '.join(known)}")


# Bytes of a number, by the name that XLA has for its type.
NUMBERS = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


def told_by(text: str, mesh: dict[str, int]) -> list[Collective]:
    """The collectives of a compiled program, from its text (``compiled.as_text()``); bytes are those of results.

    Args:
        text: XLA's, of a program for as many devices as the mesh has.
        mesh: sizes of its axes by name, the last one's devices side by side. An ``axis`` of several is ``a+b``.

    A loop's collectives count as often as it runs; of a loop that runs until data says so, once.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            name = head[2]
            entry = name if head[1] else entry
        bodies.setdefault(name, []).append(line)

    def walk(name: str, times: int) -> Iterator[Collective]:
        for line in bodies.get(name, ()):
            found = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if found is None:
                continue
            kind = found[2].removesuffix("-start")
            if kind in KINDS:
                axis = "+".join(_varying(_group(line, math.prod(mesh.values())), mesh))
                yield Collective(axis, kind, "", times * _size(found[1]), times)
            elif kind == "while":
                often = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                body = re.search(r"body=%?([\w.\-]+)", line)
                yield from walk(body[1] if body else "", times * (int(often[1]) if often else 1))
            else:
                for other in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line):
                    yield from walk(other, times)

    return list(walk(entry, 1))


def _size(shapes: str) -> int:
    found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    return sum(NUMBERS.get(kind, 0) * math.prod(_numbers(axes)) for kind, axes in found)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _group(line: str, devices: int) -> list[int]:
    """The first group of devices that tell each other, in any of XLA's ways to write it; all, if it is silent."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", line)
    if listed:
        return _numbers(listed[1])
    counted = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if counted:
        order = np.arange(devices).reshape(_numbers(counted[2]))
        order = order.transpose(_numbers(counted[3])) if counted[3] else order
        return order.reshape(_numbers(counted[1]))[0].tolist()
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?", line)
    if named and named[2]:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        among = re.findall(r"'(\w+)'", named[2])
        order = np.arange(devices).reshape([int(size) for size in sizes.values()])
        return order[tuple(slice(None) if axis in among else 0 for axis in sizes)].reshape(-1).tolist()
    return list(range(devices))


def _varying(group: list[int], mesh: dict[str, int]) -> list[str]:
    """The axes of the mesh on which the devices of a group differ."""
    places = np.stack(np.unravel_index(group, tuple(mesh.values())))
    return [name for name, at in zip(mesh, places, strict=True) if len(set(at.tolist())) > 1]
