"""What devices can do at most, as their makers state it: dense bfloat16 matrix products, operations a second."""

import re

# By a part of the name that JAX gives a device. Sources: the makers' data sheets.
PEAKS = {
    "H200": 989e12,
    "GH200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
}


def peak(kind: str) -> float | None:
    """Of a device, by its ``device_kind``; None where it is not known, which is no guess."""
    return next((rate for name, rate in PEAKS.items() if names(name, kind)), None)


def names(part: str, kind: str) -> bool:
    """Whether a part of a device's name says which it is: an L40 is no L4, and an RTX A1000 no A100."""
    return re.search(rf"(?<![a-z0-9]){re.escape(part.lower())}(?![0-9])", kind.lower()) is not None
