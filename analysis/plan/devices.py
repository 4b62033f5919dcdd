"""What devices hold, and how fast they read it and tell each other, as their makers state it."""

from dataclasses import dataclass
from typing import Literal

from minitf.analysis.training.devices import peak

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
        """Bytes that each of n devices sends round a ring: 2 (n - 1) / n of an all-reduce, (n - 1) / n of others."""
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
# four of 100 for eight V100); Google Cloud's pages on TPU versions (ICI is stated for all ports of a chip together,
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
    if "a100" in name.lower():
        return known["A100-80" if "80" in name else "A100-40"]
    for part in (*known, *OTHER_NAMES):
        if part.lower() in name.lower():
            return known[OTHER_NAMES.get(part, part)]
    raise ValueError(f"device is {name!r}, which is not known; those that are: {', '.join(known)}")
