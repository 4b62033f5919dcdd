"""Least squares learned in context (Garg et al. 2022): x_1 y_1 x_2 y_2 ..., other slopes in each sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from minitf.train.batch import Batch
from minitf.train.tasks.task import NONE_DRAWN, Objective, OneSequence, check_at_least, drawn_once


@dataclasses.dataclass(frozen=True)
class LinearRegression:
    """y = w . x + ``noise`` e, with w, x and e standard normal and w the same for all points of a sequence.

    A point is two positions. ``inputs`` holds ``[x, 0]`` at the first and ``[0, y]`` at the second: mixtures of
    ``dimensions`` + 1 tokens, so what enters the model is a linear map of them, as in the paper. The target, at x,
    is y; it is NaN elsewhere. The model's prediction is its logit number 0. ``tokens`` are all 0 and stand for
    nothing. (The paper pads y with zeros to the size of x, where here it has a coordinate of its own.)

    Raises:
        ValueError: no dimension, no point, or a noise that is negative or not finite.
    """

    dimensions: int = 8
    points: int = 16
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_at_least(1, dimensions=self.dimensions, points=self.points)
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise}; it must be a finite number of at least 0")

    @property
    def vocabulary(self) -> int:
        """The coordinates of x, and that of y."""
        return self.dimensions + 1

    @property
    def length(self) -> int:
        """Two positions a point."""
        return 2 * self.points

    @property
    def objective(self) -> Objective:
        """A real number at every x."""
        return "regression"

    def draw(self, key: Key[Array, ""], count: int) -> Batch:
        """Fresh sequences, each with slopes of its own."""
        of_slopes, of_x, of_noise = jax.random.split(key, 3)
        slopes = jax.random.normal(of_slopes, (count, self.dimensions))
        x = jax.random.normal(of_x, (count, self.points, self.dimensions))
        y = jnp.sum(x * slopes[:, None], axis=-1) + self.noise * jax.random.normal(of_noise, x.shape[:2])
        asks = jnp.pad(x, ((0, 0), (0, 0), (0, 1)))
        tells = jnp.pad(y[..., None], ((0, 0), (0, 0), (self.dimensions, 0)))
        targets = jnp.stack([y, jnp.full_like(y, jnp.nan)], axis=-1)
        return Batch(
            tokens=jnp.zeros((count, self.length), jnp.int32),
            targets=targets.reshape(count, self.length),
            inputs=jnp.stack([asks, tells], axis=2).reshape(count, self.length, self.vocabulary),
        )

    def held_out(self) -> Batch:
        """Sequences drawn with a fixed key; training never draws these real numbers again."""
        return drawn_once(self.draw, "linear-regression")

    @property
    def measured_on(self) -> str:
        """What ``held_out`` is, for people."""
        return NONE_DRAWN

    def references(self) -> dict[str, float]:
        """The mean squared errors of answering 0, and of `least_squares`, over all points of `held_out`."""
        batch = self.held_out()
        y = np.asarray(batch.targets, np.float64)[:, ::2]
        wrong = self.least_squares(batch) - y
        return {"zero": float(np.mean(y**2)), "least squares": float(np.mean(wrong**2))}

    def least_squares(self, batch: Batch) -> Float[np.ndarray, "batch point"]:
        """Each point's y as ridge regression on the points before it predicts it, in float64.

        The penalty is ``noise`` ** 2, with which it is the mean of w's posterior: nothing predicts better. Without
        noise it is the limit, the shortest w that fits all points before.
        """
        inputs = np.asarray(batch.inputs, np.float64)
        x, y = inputs[:, ::2, :-1], inputs[:, 1::2, -1]
        # The penalty as further equations: noise * w = 0.
        penalty = np.broadcast_to(self.noise * np.eye(self.dimensions), (len(x), self.dimensions, self.dimensions))
        predictions = np.zeros_like(y)
        for point in range(1, self.points):
            rows = np.concatenate([x[:, :point], penalty], axis=1) if self.noise else x[:, :point]
            # The rows of the penalty have the answer 0, so only the inverse's first columns are needed.
            slopes = np.einsum("bdp,bp->bd", np.linalg.pinv(rows)[:, :, :point], y[:, :point])
            predictions[:, point] = np.sum(x[:, point] * slopes, axis=-1)
        return predictions

    def spell(self, tokens: OneSequence) -> str:
        """``x1 y1 x2 y2 ...``: the numbers themselves are in ``inputs``."""
        return " ".join(f"{'xy'[place % 2]}{place // 2 + 1}" for place in range(len(tokens)))
