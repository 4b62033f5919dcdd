"""Tensors coded once: how far off what comes back is, for scales of blocks, and of rows and columns.

The statistics are those of Li, Chen and Zhu (NeurIPS 2023), figures 1 to 3; the tensors are made up, and differ in
where their large numbers stand.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minitf.train.fourbit import Codebook, dequantize, dynamic_exponent, linear, quantize
from minitf.train.fourbit.quantized import ScaleKind

ROWS, COLUMNS = 512, 768
OUTLIER = 60.0
# Adam's step is 1 / (sqrt(v) + epsilon), here with the paper's epsilon.
EPSILON = 1e-6
# Of second moments in trained models spans of 1e3 to 1e6 between median and maximum are usual.
ROW_SPREAD, COLUMN_SPREAD = 1.0, 1.0


@dataclass(frozen=True)
class Coding:
    """A way to code a tensor."""

    codebook: Codebook
    block: int = 128
    scale: ScaleKind = "block"

    def there_and_back(self, x: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row column"]:
        """The tensor, coded and decoded."""
        given = jnp.asarray(x, jnp.float32)
        coded = quantize(given, self.codebook, block=self.block, scale=self.scale)
        return np.asarray(dequantize(coded, x.shape, self.codebook, block=self.block, scale=self.scale))


FIRST: Mapping[str, Coding] = {
    f"{bits}-bit B{block}": Coding(dynamic_exponent(bits, signed=True), block)
    for bits in (4, 8)
    for block in (128, 2048)
}
SECOND: Mapping[str, Coding] = {
    "B2048/DE": Coding(dynamic_exponent(signed=False), 2048),
    "B128/DE": Coding(dynamic_exponent(signed=False)),
    "B128/linear with 0": Coding(linear(zero=True)),
    "B128/DE-0": Coding(dynamic_exponent(signed=False, zero=False)),
    "B128/linear": Coding(linear()),
    "rank-1/DE-0": Coding(dynamic_exponent(signed=False, zero=False), scale="rank1"),
    "rank-1/linear": Coding(linear(), scale="rank1"),
    "8-bit B2048/DE": Coding(dynamic_exponent(8, signed=False), 2048),
}
PATTERNS = ("plain", "rows", "columns", "rows and columns")


def first_moment(pattern: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A normal tensor, of which one row in 64, a column or nothing is 60 times as large; and where it is not."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, COLUMNS))
    large = np.zeros(x.shape, bool)
    if pattern == "rows":
        large[rng.choice(ROWS, ROWS // 64, replace=False)] = True
    elif pattern == "columns":
        large[:, rng.integers(COLUMNS)] = True
    return np.where(large, OUTLIER * x, x), ~large


def first_error(coding: Coding, pattern: str, seed: int = 0) -> tuple[float, float]:
    """Of the numbers that are not outliers: the relative error (Euclidean), and the share that becomes 0."""
    x, usual = first_moment(pattern, seed)
    back = coding.there_and_back(x)
    error = np.linalg.norm((back - x)[usual]) / np.linalg.norm(x[usual])
    return float(error), float(np.mean(back[usual] == 0))


def second_moment(pattern: str, seed: int = 0) -> Float[np.ndarray, "row column"]:
    """Log-normal rows times columns times numbers; one row or column in 64 is 1000 times as large."""
    rng = np.random.default_rng(seed)
    rows, columns = (np.exp(s * rng.normal(size=n)) for n, s in ((ROWS, ROW_SPREAD), (COLUMNS, COLUMN_SPREAD)))
    if "rows" in pattern:
        rows[rng.choice(ROWS, ROWS // 64, replace=False)] *= 1000
    if "columns" in pattern:
        columns[rng.choice(COLUMNS, COLUMNS // 64, replace=False)] *= 1000
    return 1e-6 * np.outer(rows, columns) * np.exp(0.5 * rng.normal(size=(ROWS, COLUMNS)))


def second_error(coding: Coding, pattern: str, seed: int = 0) -> tuple[float, float]:
    """How far off a step would be: root mean square of log10 of h(decoded) / h(v), h(v) = 1 / (sqrt(v) + 1e-6).

    And the share of numbers that become 0.
    """
    v = second_moment(pattern, seed)
    back = coding.there_and_back(v)
    step = lambda x: 1 / (np.sqrt(x) + EPSILON)
    ratio = np.log10(step(back.astype(np.float64)) / step(v))
    return float(np.sqrt(np.mean(ratio**2))), float(np.mean(back == 0))
