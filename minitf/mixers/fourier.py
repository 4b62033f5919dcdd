"""FNet (Lee-Thorp et al. 2022): a Fourier transform over features and positions, and no weight."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from minitf.config import ModelConfig
from minitf.mixers.contract import About, At, Filtered, Heads, Mixer, Pairs, Seen, State, Weights


@dataclasses.dataclass(frozen=True)
class Fourier(Mixer):
    """The real part of the two-dimensional transform: two fixed heads, ``cos(2 pi t s / T)`` and ``-sin(...)``.

    Their values are the features' cosine and sine transforms. Every position sees all others.
    """

    def about(self, config: ModelConfig) -> About:
        """The places alone count."""
        return About(causal=False, heads=2, granularity="head")

    def declare(self, config: ModelConfig, make: Any) -> Mapping[str, Any]:
        """Nothing."""
        return {}

    def filter(
        self, weights: Weights, x: Seen, config: ModelConfig, positions: At, state: State = None
    ) -> Filtered:
        """Transforms over the features."""
        over_features = jnp.fft.fft(x, axis=-1)
        return Filtered(v=jnp.stack([over_features.real, -over_features.imag], axis=2).astype(x.dtype))

    def association(self, weights: Weights, f: Filtered, config: ModelConfig) -> Pairs:
        """Cosines and minus sines of all pairs of places."""
        length = f.v.shape[1]
        turn = np.arange(length)[:, None] * np.arange(length)[None, :] % length
        angle = 2 * np.pi * turn / length
        return jnp.asarray(np.stack([np.cos(angle), -np.sin(angle)])[None], f.v.dtype)

    def aggregate(self, weights: Weights, f: Filtered, config: ModelConfig) -> Heads:
        """A fast Fourier transform over the positions."""
        over_positions = jnp.fft.fft(f.v, axis=1)
        z = jnp.stack([over_positions[:, :, 0].real, over_positions[:, :, 1].imag], axis=2)
        return z.astype(f.v.dtype)
